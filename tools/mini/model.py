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

from tools.mini.packing import Batch, Segment

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
    num_hidden_layers: int = 5
    num_attention_heads: int = 6
    q_lora_rank: int = 128
    kv_lora_rank: int = 128
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64
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
    ) -> Tensor:
        lengths = [segment.length for segment in segments]
        # Splitting once keeps the gradient one concatenation; slices would each bring a full tensor of zeros.
        queries, keys, values = (torch.split(t, lengths, 1) for t in self.project(x, cos, sin))
        outs = []
        for segment, q, k, v in zip(segments, queries, keys, values, strict=True):
            before = 0 if segment.after is None else lengths[segment.after]
            if segment.after is not None:
                k, v = torch.cat((keys[segment.after], k), 1), torch.cat((values[segment.after], v), 1)
            outs.append(attend(q, k, v, masks[before, segment.length], self.scale))
        out: Tensor = self.o_proj(torch.cat(outs, 1).transpose(0, 1).flatten(1))
        return out


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(scale · q kᵀ + mask) v for q [heads, n, D], k and v [heads, m, D]; `mask` may be larger.

    On a CPU two plain products are several times faster than the fused ones, whose backward pass is slow for
    short rows.
    """
    n, m = q.shape[1], k.shape[1]
    q = F.pad(q, (0, 0, 0, mask.shape[0] - n))
    k, v = (F.pad(t, (0, 0, 0, mask.shape[1] - m)) for t in (k, v))
    scores = torch.baddbmm(mask.expand(len(q), -1, -1), q, k.mT, alpha=scale)
    return torch.bmm(scores.softmax(-1), v)[:, :n]


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

    def forward(self, batch: Batch) -> Tensor:
        """Logits [len(wanted), vocab] at the batch's wanted positions, in the compute dtype."""
        cos, sin = self.rotation(batch.positions)
        masks = causal_masks(batch.segments, self.config.compute)
        x = F.embedding(batch.ids, as_exported(self.embed_tokens))
        for index, layer in enumerate(self.blocks):
            x = x + layer.self_attn(layer.input_layernorm(x), batch.segments, cos, sin, masks)
            if index == len(self.layers) - 1:
                # Nothing after the last attention mixes tokens, so only the wanted rows go on.
                x = x.index_select(0, batch.wanted)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        logits: Tensor = self.lm_head(self.norm(x))
        return logits
