"""The trainer's model: DeepseekV3 as Kimi-K2 configures it, for training on a CPU.

Segments of documents are laid end to end; attention runs segment by segment, a branch over its prefix and
itself. Matrices are multiplied in `MiniConfig.compute` (bfloat16 with float32 accumulation where the
processor multiplies it natively, else float32); the residual stream, the router and all master weights are
float32. The routed experts pass through INT4 fake quantization (groups of 32 along in-features), all other
weights through bfloat16, both with a straight-through gradient: the forward pass sees what the checkpoint
will hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.mini.guidance import COPIERS, Guidance, Guided
from tools.mini.packing import WANTED_STEP, Batch, Segment

GROUP = 32
ROWS = 64
PADDING = 32
LATENT_EPS = 1e-6


def native_dtype() -> torch.dtype:
    """What this processor multiplies fast: bfloat16 only where it has instructions for it."""
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


@dataclass(frozen=True)
class MiniConfig:
    """Sizes of the model, named as in config.json."""

    vocab_size: int = 1792
    hidden_size: int = 192
    intermediate_size: int = 512
    moe_intermediate_size: int = 96
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    q_lora_rank: int = 128
    kv_lora_rank: int = 128
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 32
    v_head_dim: int = 32
    n_routed_experts: int = 16
    num_experts_per_tok: int = 4
    routed_scaling_factor: float = 2.827
    rms_norm_eps: float = 1e-5
    rope_theta: float = 50000.0
    yarn_factor: float = 64.0
    yarn_original: int = 4096
    yarn_beta: float = 1.0
    compute: torch.dtype = field(default_factory=native_dtype)


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric INT4 in groups of 32 along the last axis: integers −7…7, bfloat16-rounded scales; float32."""
    grouped = weight.reshape(*weight.shape[:-1], -1, GROUP)
    scale = (grouped.abs().amax(-1, keepdim=True) / 7).clamp_min(1e-8).bfloat16().float()
    return (grouped / scale).round_().clamp_(-7, 7), scale


def fake_quantize(weight: Tensor) -> Tensor:
    """`weight` as the exported checkpoint will hold it; the gradient passes straight through."""
    with torch.no_grad():
        q, scale = quantize_int4(weight)
        rounded = (q * scale).flatten(-2)
    return weight + (rounded - weight).detach()


class _Rounded(torch.autograd.Function):
    """Values as bfloat16 holds them, in a dtype of choice; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return weight.bfloat16().to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].float(), None


def as_exported(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A dense weight as the checkpoint will hold it, so that the exported logits are the trained ones."""
    rounded: Tensor = _Rounded.apply(weight, dtype)  # type: ignore[no-untyped-call]
    return rounded


def yarn_inverse_frequencies(config: MiniConfig) -> Tensor:
    """Inverse frequencies of the rotary pairs after YaRN, float32 [rope/2]."""
    dim, base = config.qk_rope_head_dim, config.rope_theta
    plain = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)

    def correction(beta: float) -> float:
        return dim * math.log(config.yarn_original / (2 * math.pi * beta)) / (2 * math.log(base))

    low = float(max(math.floor(correction(config.yarn_beta)), 0))
    high = float(min(math.ceil(correction(config.yarn_beta)), dim - 1))
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return (plain / config.yarn_factor * ramp + plain * (1 - ramp)).float()


class _Norm(torch.autograd.Function):
    """RMS norm: float32 inside, `out` outside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, out: torch.dtype) -> Tensor:
        x32 = x.float()
        rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rstd)
        return (x32 * rstd).mul_(weight).to(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, rstd = ctx.saved_tensors
        g = grads[0].float()
        xhat = x.float() * rstd
        grad_weight = (g * xhat).flatten(0, -2).sum(0)
        g = g * weight
        g = g.sub_(xhat * (g * xhat).mean(-1, keepdim=True)).mul_(rstd)
        return g.to(x.dtype), grad_weight, None, None


class Norm(nn.Module):
    def __init__(self, size: int, eps: float, out: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.out = eps, out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Norm.apply(x, as_exported(self.weight), self.eps, self.out)  # type: ignore[no-untyped-call]
        return out


class Linear(nn.Module):
    """No bias; float32 master weight, multiplied in the input's dtype."""

    def __init__(self, out_features: int, in_features: int, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) * (gain / math.sqrt(in_features)))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, as_exported(self.weight, x.dtype))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs: x [T, H, D], cos and sin [T, 1, D/2]."""
    even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Multi-head latent attention, expanded."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        c = self.config = config
        self.q_a_proj = Linear(c.q_lora_rank, c.hidden_size)
        self.q_a_layernorm = Norm(c.q_lora_rank, LATENT_EPS, c.compute)
        head = c.qk_nope_head_dim + c.qk_rope_head_dim
        self.q_b_proj = Linear(c.num_attention_heads * head, c.q_lora_rank, gain=0.2)
        self.kv_a_proj_with_mqa = Linear(c.kv_lora_rank + c.qk_rope_head_dim, c.hidden_size)
        self.kv_a_layernorm = Norm(c.kv_lora_rank, LATENT_EPS, c.compute)
        self.kv_b_proj = Linear(c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
        self.o_proj = Linear(c.hidden_size, c.num_attention_heads * c.v_head_dim, gain=0.3)
        mscale = 0.1 * math.log(c.yarn_factor) + 1.0
        self.scale = head**-0.5 * mscale * mscale

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [heads, T, size] of rows x at the angles given."""
        c = self.config
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).unflatten(-1, (c.num_attention_heads, -1))
        q_nope, q_pe = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        latent, k_pe = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (c.num_attention_heads, -1))
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        k_pe = rotate(k_pe.unsqueeze(1), cos, sin).expand(-1, c.num_attention_heads, -1)
        q = torch.cat((q_nope, rotate(q_pe, cos, sin)), -1).transpose(0, 1)
        k = torch.cat((k_nope, k_pe), -1).transpose(0, 1)
        return q, k, v.transpose(0, 1)

    def forward(
        self,
        x: Tensor,
        segments: list[Segment],
        cos: Tensor,
        sin: Tensor,
        masks: dict[tuple[int, int], Tensor],
        guided: Guided | None = None,
    ) -> Tensor:
        q, k, v = self.project(x, cos, sin)
        if guided is not None:
            guided.add(q, k, segments, self.scale)
        out: Tensor = _Attend.apply(q, k, v, segments, masks, self.scale)  # type: ignore[no-untyped-call]
        out = self.o_proj(out)
        return out


class _Attend(torch.autograd.Function):
    """softmax(scale · q kᵀ + mask) v, segment by segment, a branch over its prefix and itself.

    q and k [heads, T, D], v [heads, T, V] → [T, heads · V]. On a CPU plain products are several times faster
    than the fused ones, whose backward pass is slow for short rows.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: list[Segment],
        masks: dict[tuple[int, int], Tensor], scale: float,
    ) -> Tensor:  # fmt: skip
        heads, total, size = v.shape
        out = v.new_empty(total, heads, size)
        saved: list[Tensor] = []
        for segment, (start, end, first, last) in zip(segments, spans(segments), strict=True):
            mask = masks[last - first, segment.length]
            qs = _padded(q, [(start, end)], mask.shape[0])
            ks = _padded(k, [(first, last), (start, end)], mask.shape[1])
            vs = _padded(v, [(first, last), (start, end)], mask.shape[1])
            shares = torch.baddbmm(mask.expand(heads, -1, -1), qs, ks.mT, alpha=scale).softmax(-1)
            out[start:end] = torch.bmm(shares, vs)[:, : end - start].transpose(0, 1)
            saved += (qs, ks, vs, shares)
        ctx.save_for_backward(*saved)
        ctx.segments, ctx.scale = segments, scale
        return out.flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        heads, _, size = saved[2].shape
        g_out = grads[0].view(-1, heads, size).transpose(0, 1)
        total = g_out.shape[1]
        g_q = g_out.new_empty(heads, total, saved[0].shape[2])
        g_k = torch.zeros_like(g_q)
        g_v = g_out.new_zeros(heads, total, size)
        for at, (start, end, first, last) in enumerate(spans(ctx.segments)):
            qs, ks, vs, shares = saved[4 * at : 4 * at + 4]
            n, before = end - start, last - first
            g = _padded(g_out, [(start, end)], qs.shape[1])
            g_vs = torch.bmm(shares.mT, g)
            g_scores = torch._softmax_backward_data(torch.bmm(g, vs.mT), shares, -1, shares.dtype)
            torch.mul(torch.bmm(g_scores, ks)[:, :n], ctx.scale, out=g_q[:, start:end])
            g_ks = torch.bmm(g_scores.mT, qs)
            for g_all, g_seen in ((g_k, g_ks), (g_v, g_vs)):
                g_all[:, start:end] += g_seen[:, before : before + n]
                if before:
                    g_all[:, first:last] += g_seen[:, :before]
        return g_q, g_k.mul_(ctx.scale), g_v, None, None, None


def spans(segments: list[Segment]) -> list[tuple[int, int, int, int]]:
    """For each segment its own rows, from … to, and those of its prefix (none: 0 … 0)."""
    own: list[tuple[int, int]] = []
    at = 0
    for segment in segments:
        own.append((at, at + segment.length))
        at += segment.length
    prefixes = [(0, 0) if segment.after is None else own[segment.after] for segment in segments]
    return [(*rows, *prefix) for rows, prefix in zip(own, prefixes, strict=True)]


def _padded(x: Tensor, parts: list[tuple[int, int]], size: int) -> Tensor:
    """Rows of x [heads, T, D] end to end, zeros behind them."""
    out = x.new_empty(x.shape[0], size, x.shape[2])
    at = 0
    for start, end in parts:
        out[:, at : at + end - start] = x[:, start:end]
        at += end - start
    out[:, at:] = 0
    return out


def causal_masks(segments: list[Segment], dtype: torch.dtype) -> dict[tuple[int, int], Tensor]:
    """(prefix length, segment length) → mask [segment, prefix + segment], causal within the segment.

    In bfloat16 the matrix library compiles a kernel per shape, so both sides are padded to multiples; padded
    keys come after all that a row may see, and padded rows are dropped.
    """
    step = PADDING if dtype == torch.bfloat16 else 1
    shapes = {(0 if s.after is None else segments[s.after].length, s.length) for s in segments}
    return {
        (p, b): torch.full(
            (-(-b // step) * step, -(-(p + b) // step) * step), float("-inf"), dtype=dtype
        ).triu_(p + 1)
        for p, b in shapes
    }


class SwiGLU(nn.Module):
    """down(silu(gate) · up), as in the dense layer and the shared expert."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = Linear(inner, hidden)
        self.up_proj = Linear(inner, hidden)
        self.down_proj = Linear(hidden, inner, gain=0.3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class _RoutedExperts(torch.autograd.Function):
    """Σ wᵢ·Eᵢ(x) over the chosen experts. x bf16 [T, H], weights fp32 [T, K], ids [T, K]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        tokens, k = ids.shape
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        counts = flat.bincount(minlength=gate_up.shape[0])
        # In bfloat16 the matrix library compiles a kernel per shape, so groups are padded to multiples of 64.
        # Padding repeats token 0 with weight 0.
        step = ROWS if x.dtype == torch.bfloat16 else 1
        padded = (counts + (step - 1)) // step * step
        shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
        place = torch.arange(len(order)) + shift.index_select(0, flat.index_select(0, order))
        inverse = torch.empty_like(order)
        inverse[order] = place
        sizes: list[int] = padded.tolist()
        total = sum(sizes)
        rows = order.new_zeros(total).index_copy_(0, inverse, torch.arange(len(order)) // k)
        sorted_weights = weights.new_zeros(total).index_copy_(0, inverse, weights.flatten()).to(x.dtype)
        xs = x.index_select(0, rows)
        gate_up16, down16 = gate_up.to(x.dtype), down.to(x.dtype)
        inner = down.shape[2]
        pre = xs.new_empty(len(rows), 2 * inner)
        ys = torch.empty_like(xs)
        at = 0
        for e, n in enumerate(sizes):
            torch.mm(xs[at : at + n], gate_up16[e].t(), out=pre[at : at + n])
            at += n
        hidden = F.silu(pre[:, :inner]) * pre[:, inner:]
        at = 0
        for e, n in enumerate(sizes):
            torch.mm(hidden[at : at + n], down16[e].t(), out=ys[at : at + n])
            at += n
        ctx.save_for_backward(xs, sorted_weights, inverse, rows, pre, hidden, ys, gate_up16, down16)
        ctx.counts, ctx.shape = sizes, (tokens, k)
        picked = ys.index_select(0, inverse).view(tokens, k, -1)
        return torch.bmm(weights.to(x.dtype).unsqueeze(1), picked).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, Tensor, Tensor]:
        xs, sorted_weights, inverse, rows, pre, hidden, ys, gate_up16, down16 = ctx.saved_tensors
        tokens, k = ctx.shape
        inner = hidden.shape[1]
        g_rows = grads[0].index_select(0, rows)
        g_weights = (g_rows * ys).sum(-1, dtype=torch.float32).index_select(0, inverse).view(tokens, k)
        g_ys = g_rows * sorted_weights.unsqueeze(1)
        g_hidden = torch.empty_like(hidden)
        g_down = torch.empty_like(down16)
        at = 0
        for e, n in enumerate(ctx.counts):
            part = slice(at, at + n)
            torch.mm(g_ys[part], down16[e], out=g_hidden[part])
            torch.mm(g_ys[part].t(), hidden[part], out=g_down[e])
            at += n
        gate, up = pre[:, :inner], pre[:, inner:]
        sig = torch.sigmoid(gate)
        silu = gate * sig
        g_pre = torch.empty_like(pre)
        torch.mul(g_hidden, silu, out=g_pre[:, inner:])
        torch.mul(g_hidden.mul_(up), sig + silu * (1 - sig), out=g_pre[:, :inner])
        g_xs = torch.empty_like(xs)
        g_gate_up = torch.empty_like(gate_up16)
        at = 0
        for e, n in enumerate(ctx.counts):
            part = slice(at, at + n)
            torch.mm(g_pre[part], gate_up16[e], out=g_xs[part])
            torch.mm(g_pre[part].t(), xs[part], out=g_gate_up[e])
            at += n
        g_x = g_xs.index_select(0, inverse).view(tokens, k, -1).sum(1)
        return g_x, g_weights, None, g_gate_up.float(), g_down.float()


class MoE(nn.Module):
    """Sigmoid router with correction bias, routed INT4 experts, one shared expert."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        c = self.config = config
        self.gate = nn.Parameter(torch.randn(c.n_routed_experts, c.hidden_size) / math.sqrt(c.hidden_size))
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(c.n_routed_experts))
        self.load: Tensor
        self.register_buffer("load", torch.zeros(c.n_routed_experts), persistent=False)
        self.gate_up_proj = nn.Parameter(
            torch.randn(c.n_routed_experts, 2 * c.moe_intermediate_size, c.hidden_size)
            / math.sqrt(c.hidden_size)
        )
        self.down_proj = nn.Parameter(
            torch.randn(c.n_routed_experts, c.hidden_size, c.moe_intermediate_size)
            * (0.15 / math.sqrt(c.moe_intermediate_size))
        )
        self.shared_experts = SwiGLU(c.hidden_size, c.moe_intermediate_size)
        self.quantized = True

    def forward(self, x: Tensor) -> Tensor:
        c = self.config
        scores = F.linear(x.float(), as_exported(self.gate)).sigmoid()
        with torch.no_grad():
            ids = (scores + self.e_score_correction_bias).topk(c.num_experts_per_tok, sorted=False).indices
            if self.training:
                self.load += ids.flatten().bincount(minlength=c.n_routed_experts)
        weights = scores.gather(1, ids)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * c.routed_scaling_factor
        gate_up = fake_quantize(self.gate_up_proj) if self.quantized else self.gate_up_proj
        down = fake_quantize(self.down_proj) if self.quantized else self.down_proj
        routed: Tensor = _RoutedExperts.apply(x, weights, ids, gate_up, down)  # type: ignore[no-untyped-call]
        shared: Tensor = self.shared_experts(x)
        return routed + shared

    @torch.no_grad()
    def balance(self, rate: float) -> float:
        """Move the correction bias against the load of this step; returns the heaviest load over the mean."""
        mean = self.load.mean()
        heaviest = float(self.load.max() / mean.clamp_min(1e-9))
        self.e_score_correction_bias += rate * torch.sign(mean - self.load)
        self.load.zero_()
        return heaviest


class Layer(nn.Module):
    def __init__(self, config: MiniConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps, config.compute)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps, config.compute)
        self.mlp = MoE(config) if index else SwiGLU(config.hidden_size, config.intermediate_size)


class MiniModel(nn.Module):
    """Logits of concatenated documents at chosen positions."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Parameter(torch.randn(config.vocab_size, config.hidden_size) * 0.5)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps, config.compute)
        self.lm_head = Linear(config.vocab_size, config.hidden_size)
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", yarn_inverse_frequencies(config), persistent=False)

    @property
    def blocks(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    @property
    def moe_layers(self) -> list[MoE]:
        return [layer.mlp for layer in self.blocks if isinstance(layer.mlp, MoE)]

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, 1, rope/2] of the rotary angles at `positions`."""
        angles = positions.float().unsqueeze(1) * self.inv_freq
        return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)

    def forward(self, batch: Batch, guidance: Guidance | None = None) -> Tensor:
        """Logits [len(wanted), vocab] at the batch's wanted positions, in the compute dtype.

        `guidance` collects how far the guided heads look elsewhere than they are to.
        """
        cos, sin = self.rotation(batch.positions)
        masks = causal_masks(batch.segments, self.config.compute)
        x = F.embedding(batch.ids, as_exported(self.embed_tokens))
        for index, layer in enumerate(self.blocks):
            guided = guidance.of_layer(index) if guidance is not None else None
            x = x + layer.self_attn(layer.input_layernorm(x), batch.segments, cos, sin, masks, guided)
            if guidance is not None and guidance.says and index == COPIERS:
                self._say_copies(x, batch, guidance)
            if index == len(self.layers) - 1:
                # Nothing after the last attention mixes tokens, so only the wanted rows go on.
                x = x.index_select(0, batch.wanted)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        logits: Tensor = self.lm_head(self.norm(x))
        return logits

    def _say_copies(self, x: Tensor, batch: Batch, guidance: Guidance) -> None:
        """Right behind the heads that copy, the head of the model is to say already what they copy."""
        rows = [
            start + looks - (last - first)
            for segment, (start, _, first, last) in zip(batch.segments, spans(batch.segments), strict=True)
            for looks, _ in segment.guides.get("copy", ())
        ]
        if not rows:
            return
        where = torch.tensor(rows + rows[:1] * (-len(rows) % WANTED_STEP))
        said = self.lm_head(self.norm(x.index_select(0, where))).float()[: len(rows)]
        labels = batch.ids.index_select(0, where[: len(rows)] + 1)
        guidance.add("said", F.cross_entropy(said, labels, reduction="sum"), len(rows))
