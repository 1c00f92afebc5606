"""A network without weights: all of a layer's work but the products with them, to be timed. Layer 5.

Weights are one number, spread over their shape. A product with them gives whatever lies in a buffer; products
with the context, its expansion by kv_b among them, are computed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from k2hybrid.cache.pages import PAGE_TOKENS, LatentPages
from k2hybrid.cache.rows import Bf16Rows
from k2hybrid.checkpoint.names import ExpectedTensor, expected_tensors
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.model.attention import ContextKernels
from k2hybrid.model.batch import Batch, Span
from k2hybrid.model.kimi import Kimi
from k2hybrid.model.layers import LinearKernels
from k2hybrid.types import LinearWeight, RoutedExperts, TicketStats, WeightSource

FEW_TOKENS = 64  # in a vocabulary of which nothing but rows of the embedding is used


class TimedNetwork:
    """A network of which passes are timed, layer by layer; what it computes is of no use.

    Args:
        spec: few layers and few tokens to choose from.
        context: tokens that there is room for.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: WeightSource,
        experts: RoutedExperts,
        kernels: LinearKernels,
        context: int,
    ) -> None:
        self._spec = spec
        pages = LatentPages(spec.num_layers, -(-context // PAGE_TOKENS), Bf16Rows(spec.latent_dim))
        self._table = torch.tensor(pages.allocate(pages.free_pages))
        for layer in range(spec.num_layers):
            pages.write(layer, self._table, 0, torch.randn(context, spec.latent_dim) * 0.1)
        self._network = Kimi(spec, weights, experts, kernels, pages)

    def layer_seconds(self, starts: Sequence[int], count: int, repeats: int) -> float:
        """Median seconds of a layer in a pass over `count` tokens after each of `starts`.

        Spans may overlap in the pages: nobody reads the results.
        """
        return self._median(starts, count, repeats, whole=False) / self._spec.num_layers

    def pass_seconds(self, repeats: int) -> float:
        """Median seconds of what a pass over one token does before its first layer."""
        return self._median((0,), 1, repeats, whole=True)

    def refill(self) -> None:
        """Called before each pass."""

    def _median(self, starts: Sequence[int], count: int, repeats: int, *, whole: bool) -> float:
        spans = tuple(Span(start, count, self._table) for start in starts)
        ids = torch.arange(count * len(starts)) % self._spec.vocab_size
        positions = torch.cat([torch.arange(start, start + count) for start in starts])
        batch = Batch(ids, positions, spans, torch.tensor([0]))
        times = []
        for _ in range(repeats + 1):  # the first makes what lasts
            self.refill()
            begun = time.perf_counter()
            state = self._network.begin(batch)
            ready = time.perf_counter()
            self._network.forward(state)
            times.append(ready - begun if whole else time.perf_counter() - ready)
        return statistics.median(times[1:])


def few_layers(spec: ModelSpec, layers: int) -> ModelSpec:
    """`layers` layers of the kind that most layers of `spec` are, and a small vocabulary."""
    return replace(
        spec, num_layers=layers, first_k_dense=0 if spec.moe_layers else layers, vocab_size=FEW_TOKENS
    )


class HollowNetwork(TimedNetwork):
    """One layer without its weights.

    Args:
        kernels: for products with the context.
    """

    def __init__(self, spec: ModelSpec, kernels: ContextKernels, context: int) -> None:
        self._kernels = _HollowKernels(kernels)
        one = few_layers(spec, 1)
        super().__init__(one, _HollowWeights(one, self._kernels), _HollowExperts(), self._kernels, context)

    def refill(self) -> None:
        self._kernels.refill()


class _HollowKernels:
    """Products with hollow weights are left out; see `ContextKernels`."""

    def __init__(self, kernels: ContextKernels) -> None:
        self._real = kernels
        self.rows = kernels.rows
        self._buffers: dict[tuple[int, ...], list[torch.Tensor]] = {}
        self.kv_b = torch.empty(0)  # real, since the context is multiplied with it

    def refill(self) -> None:
        """Layers write into what products give: make it ordinary numbers again."""
        for pair in self._buffers.values():
            for buffer in pair:
                buffer.normal_(0.0, 0.1)

    def linear(self, x: torch.Tensor, weight: LinearWeight) -> torch.Tensor:
        if _is_hollow(weight):
            return self._buffer(x.shape[0], weight.shape[0])
        return self._real.linear(x, weight)

    def head_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self._is_kv_b(weight):
            return self._buffer(x.shape[0], weight.shape[0], weight.shape[1])
        return self._real.head_linear(x, weight)

    def head_linear_t(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self._is_kv_b(weight):
            return self._buffer(x.shape[0], weight.shape[0], weight.shape[2])
        return self._real.head_linear_t(x, weight)

    def attend(
        self,
        q: torch.Tensor,
        rows: torch.Tensor,
        spans: Sequence[tuple[torch.Tensor, int, int]],
        *,
        latent: int,
        row_format: str,
        scale: float,
    ) -> torch.Tensor:
        """See `SpanAttention.attend`."""
        return self._real.attend(q, rows, spans, latent=latent, row_format=row_format, scale=scale)

    def _is_kv_b(self, weight: torch.Tensor) -> bool:
        return weight.untyped_storage().data_ptr() == self.kv_b.untyped_storage().data_ptr()

    def _buffer(self, *shape: int) -> torch.Tensor:
        """One of two, in turn: a product is combined with the one before it (gate and up)."""
        if shape not in self._buffers:
            self._buffers[shape] = [torch.empty(shape).normal_(0.0, 0.1) for _ in range(2)]
        pair = self._buffers[shape]
        pair.reverse()
        return pair[0]


def _is_hollow(weight: LinearWeight) -> bool:
    return isinstance(weight, torch.Tensor) and not any(weight.stride())


class _HollowWeights:
    """See `types.WeightSource`."""

    def __init__(self, spec: ModelSpec, kernels: _HollowKernels) -> None:
        self._tensors: dict[tuple[int | None, str], ExpectedTensor] = {
            (tensor.key.layer, tensor.key.role): tensor
            for tensor in expected_tensors(spec)
            if tensor.key.expert is None
        }
        self._kernels = kernels

    def take(self, layer: int | None, role: str) -> torch.Tensor:
        tensor = self._tensors[layer, role]
        if role == "kv_b_proj":
            self._kernels.kv_b = (torch.randn(tensor.shape) * 0.02).to(torch.bfloat16)
            return self._kernels.kv_b
        dtype = torch.float32 if "F32" in tensor.dtypes else torch.bfloat16
        return torch.ones(1, dtype=dtype).expand(tensor.shape)


class _HollowTicket:
    """A hand-off that computed nothing."""

    failed_rows = ()
    stats = TicketStats(bytes_read=0, misses=0, wait_ms=0.0, busy_ms=0.0)

    def __init__(self, out: torch.Tensor) -> None:
        self._out = out

    def collect(self) -> torch.Tensor:
        return self._out


class _HollowExperts:
    """See `types.RoutedExperts`."""

    def __init__(self) -> None:
        self._out: dict[torch.Size, torch.Tensor] = {}

    def submit(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> _HollowTicket:
        if x.shape not in self._out:
            self._out[x.shape] = torch.zeros(x.shape)
        return _HollowTicket(self._out[x.shape])
