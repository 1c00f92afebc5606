"""The network from token ids to logits, part by part over explicit state: DeepSeek-V3's graph.

A layer has several parts: attention, by groups of heads, and feed-forward. A pass may stop after each and go
on later.

The residual stream is fp32; what a linear reads is in the model's dtype (bf16). `docs/numerics.md` derives
what that costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from k2hybrid.cache.pages import LatentPages
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.errors import ConfigError
from k2hybrid.model import fused
from k2hybrid.model.batch import Batch
from k2hybrid.model.layers import MLP, Linear, LinearKernels, RMSNorm, row_kernels, unquantized
from k2hybrid.model.mla import MLA, Attending, AttentionPlan, attention_sizes, plan_attention
from k2hybrid.model.moe import MoE
from k2hybrid.model.paged import PagedDecode
from k2hybrid.model.rope import Rope
from k2hybrid.model.router import Router
from k2hybrid.types import LinearWeight, RoutedExperts, WeightSource


@dataclass(slots=True)
class ForwardState:
    """A pass under way. hidden fp32 [T, hidden]; `part` runs next; rows in `failed_rows` are lost.

    `attending`: of the layer that the pass is in, between two of its groups of heads.

    `rows` are those that functions built on exp take at a time: see `layers.span_by_span`.
    """

    batch: Batch
    hidden: torch.Tensor
    plan: AttentionPlan
    rows: Sequence[slice]
    part: int = 0
    attending: Attending | None = None
    failed_rows: set[int] = field(default_factory=set)


class Layer:
    """One decoder layer, in `parts`: attention by groups of heads, then feed-forward."""

    def __init__(
        self, input_norm: RMSNorm, attention: MLA, post_norm: RMSNorm, feed_forward: MLP | MoE
    ) -> None:
        self.input_norm = input_norm
        self.attention = attention
        self.post_norm = post_norm
        self.feed_forward = feed_forward

    @property
    def parts(self) -> int:
        """As many for every layer of a network."""
        return len(self.attention.groups) + 1

    def run(self, state: ForwardState, part: int) -> None:
        """One part, in order. The last of attention, and feed-forward, advance the residual stream."""
        if part == self.parts - 1:
            self._feed(state)
            return
        attention = self.attention
        if part == 0:
            state.attending = attention.begin(self.input_norm(state.hidden), state.plan)
        assert state.attending is not None
        attention.attend(state.attending, part)
        if part == self.parts - 2:
            state.hidden += attention.end(state.attending)
            state.attending = None

    def _feed(self, state: ForwardState) -> None:
        rows, hidden = state.rows, state.hidden
        x = self.post_norm(hidden)
        if isinstance(self.feed_forward, MoE):
            mixed = self.feed_forward(x, rows)
            state.failed_rows.update(mixed.failed_rows)
            hidden += mixed.out
        else:
            hidden += self.feed_forward(x, rows)


class Kimi:
    """The model. Weights are taken from `weights`, each once, and stay where they are.

    Everything but the embedding lies on one device, the pages' own; the embedding stays in RAM.

    Args:
        experts: the routed experts of all layers.
        kernels: what multiplies: `native.machine`, `DeviceLinears`, or `TorchLinears` in tests.
        pages: the latent cache; `pages.format` must hold spec.latent_dim values a row.
        decode: attends for all sequences that have one token in a pass, in one call; None: one by one.
        latent_norm_eps: of the q_a and kv_a norms; 1e-6 in the published code, whatever the config says.
        dtype: of activations that a linear reads; float32 is for tests alone.

    Raises:
        ConfigError: pages or dtype do not fit the model.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: WeightSource,
        experts: RoutedExperts,
        kernels: LinearKernels,
        pages: LatentPages,
        *,
        latent_norm_eps: float = 1e-6,
        dtype: torch.dtype = torch.bfloat16,
        decode: PagedDecode | None = None,
    ) -> None:
        if pages.format.latent_dim != spec.latent_dim:
            raise ConfigError(
                f"latent pages hold {pages.format.latent_dim} values a row; the model needs {spec.latent_dim}"
            )
        if dtype not in (torch.bfloat16, torch.float32):
            raise ConfigError(f"activations can be bfloat16 (or float32, in tests), not {dtype}")
        self.spec = spec
        self.pages = pages
        self.dtype = dtype
        self.decode = decode
        self.sizes = attention_sizes(spec, fused=decode is None and fused.serves(kernels, dtype))
        self.rope = Rope(spec)
        self.embedding = unquantized(weights.take(None, "embed_tokens"))
        self.layers = [
            self._layer(layer, weights, experts, kernels, latent_norm_eps) for layer in range(spec.num_layers)
        ]
        self.norm = RMSNorm(
            unquantized(weights.take(None, "norm")), spec.rms_norm_eps, dtype, row_kernels(kernels, dtype)
        )
        self.head = Linear(kernels, weights.take(None, "lm_head"))

    def _layer(
        self,
        layer: int,
        weights: WeightSource,
        experts: RoutedExperts,
        kernels: LinearKernels,
        latent_norm_eps: float,
    ) -> Layer:
        def take(role: str) -> LinearWeight:
            return weights.take(layer, role)

        def norm(role: str) -> RMSNorm:
            return RMSNorm(unquantized(take(role)), eps, self.dtype, row_kernels(kernels, self.dtype))

        def mlp(prefix: str = "") -> MLP:
            gate, up, down = (take(f"{prefix}{part}_proj") for part in ("gate", "up", "down"))
            return MLP(kernels, gate, up, down, self.dtype)

        spec, eps = self.spec, self.spec.rms_norm_eps
        feed_forward: MLP | MoE
        input_norm = norm("input_layernorm")
        mla = MLA(
            layer, spec, self.sizes, take, kernels, self.pages, latent_norm_eps, self.dtype, self.decode
        )
        post_norm = norm("post_attention_layernorm")
        if spec.is_moe(layer):
            router = Router(spec, kernels, *(unquantized(take(role)) for role in ("router", "router_bias")))
            feed_forward = MoE(layer, router, experts, mlp("shared_"))
        else:
            feed_forward = mlp()
        return Layer(input_norm, mla, post_norm, feed_forward)

    @torch.no_grad()
    def begin(self, batch: Batch) -> ForwardState:
        """Look the tokens up; nothing is stored yet. The batch lies in RAM."""
        plan = plan_attention(batch, self.sizes, self.rope, self.pages, paged=self.decode is not None)
        hidden = self.embed(batch.ids).to(self.pages.device)
        return ForwardState(batch, hidden, plan, batch.row_slices() if self.decode is None else [slice(None)])

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [T] -> fp32 [T, hidden], in RAM."""
        return self.embedding[ids].float()

    @torch.no_grad()
    def forward(self, state: ForwardState, until: int | None = None) -> ForwardState:
        """Run parts state.part … until−1 (default: all that are left), in place.

        Between two calls other passes may run, as long as this one's pages stay held.
        """
        for at in range(state.part, self.parts if until is None else until):
            layer, part = divmod(at, self.layers[0].parts)
            self.layers[layer].run(state, part)
            state.part = at + 1
        return state

    @property
    def parts(self) -> int:
        """Of all layers together, the same number of each."""
        return len(self.layers) * self.layers[0].parts

    def routed(self, first: int, until: int) -> list[int]:
        """Layers whose routed experts are asked by parts `first` … `until` − 1."""
        each = self.layers[0].parts
        return [layer for layer in self.spec.moe_layers if first < (layer + 1) * each <= until]

    @torch.no_grad()
    def logits(self, state: ForwardState) -> torch.Tensor:
        """fp32 [R, vocab] of the rows that the batch asks for. Call it after the last layer."""
        return self.logits_of(state.hidden[state.batch.logit_rows.to(state.hidden.device)])

    def logits_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 [R, hidden], as the last layer left it -> fp32 [R, vocab]."""
        return self.head(self.norm(hidden))
