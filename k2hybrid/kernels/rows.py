"""What is done to rows between products, one launch each: norms, SwiGLU, the choice of experts, rotation.

A captured decode step is bound by its launches, so each of these is one, as on the CPU (`native.rows`): this
module is the `RowKernels` of a device. A row is computed by itself, whatever rows are beside it, and in one
order. Memory is torch's, under capture the graph's own; shapes alone decide what is launched.
"""

from __future__ import annotations

import torch

from k2hybrid.errors import KernelError
from k2hybrid.kernels.card import card_of, expect, power_of_two

MOST_VALUES = 32_768  # of a row that is normed: it lies in the registers of a block
MOST_EXPERTS = 4096
MOST_CHOSEN = 64
SWIGLU_COLUMNS = 1024
QUERY_VALUES = 1024  # of the heads that a block rotates


def warps_for(values: int) -> int:
    """Of a block with so many values, a power of two: 16 a thread, as far as that goes."""
    return min(max(values // 512, 1), 16)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x fp32 [T, n] (row stride free), weight fp32 [n] -> bf16 [T, n]: x / rms(x) · weight.

    Raises:
        KernelError: a tensor of another type or shape, or no Triton.
    """
    rows, n = x.shape
    if x.dtype != torch.float32 or (rows and n > 1 and x.stride(1) != 1) or not 0 < n <= MOST_VALUES:
        raise KernelError(
            f"x must be float32 [rows, 1 to {MOST_VALUES}] with adjoining columns; "
            f"it is {x.dtype} {list(x.shape)}, strides {x.stride()}"
        )
    expect(weight, "weight", torch.float32, (n,))
    card_of(x, weight)
    out = torch.empty((rows, n), dtype=torch.bfloat16, device=x.device)
    if rows:
        from k2hybrid.kernels.jit import rows as jit

        width = power_of_two(n)
        jit.rms_norm[(rows,)](x, weight, out, x.stride(0), n, eps, N=width, num_warps=warps_for(width))
    return out


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """fp32 [T, n] -> bf16 [T, n]: silu(gate) · up.

    Raises:
        KernelError: a tensor of another type or shape, or no Triton.
    """
    rows, n = gate.shape
    expect(gate, "gate", torch.float32, (rows, n))
    expect(up, "up", torch.float32, (rows, n))
    card_of(gate, up)
    out = torch.empty((rows, n), dtype=torch.bfloat16, device=gate.device)
    if rows and n:
        from k2hybrid.kernels.jit import rows as jit

        jit.swiglu[rows, -(-n // SWIGLU_COLUMNS)](gate, up, out, n, N=SWIGLU_COLUMNS, num_warps=4)
    return out


def choose(
    logits: torch.Tensor, bias: torch.Tensor, top_k: int, *, normalize: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts with the greatest sigmoid(logits) + bias, best first, equal ones by number.

    Args:
        logits: fp32 [T, experts].
        bias: fp32 [experts].
        normalize: divide the weights by their sum.
        scale: of the weights.

    Returns:
        ids int32 [T, top_k], weights fp32 [T, top_k]: the sigmoids; NaN where a logit of the row is.

    Raises:
        KernelError: a tensor of another type or shape, or no Triton.
    """
    rows, experts = logits.shape
    if not 0 < top_k <= min(experts, MOST_CHOSEN) or experts > MOST_EXPERTS:
        raise KernelError(
            f"a row chooses at most {MOST_CHOSEN} of at most {MOST_EXPERTS} experts, not {top_k} of {experts}"
        )
    expect(logits, "logits", torch.float32, (rows, experts))
    expect(bias, "bias", torch.float32, (experts,))
    card_of(logits, bias)
    ids = torch.empty((rows, top_k), dtype=torch.int32, device=logits.device)
    weights = torch.empty((rows, top_k), dtype=torch.float32, device=logits.device)
    if rows:
        from k2hybrid.kernels.jit import rows as jit

        width = power_of_two(experts)
        jit.choose[(rows,)](
            logits,
            bias,
            ids,
            weights,
            experts,
            top_k,
            scale,
            NORMALIZE=normalize,
            EXPERTS=width,
            CHOSEN=power_of_two(top_k),
            num_warps=warps_for(width),  # of 512, one: its maxima need no shared memory
        )
    return ids, weights


def prepare_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Turn the rotary parts of queries and keys, norm the latents, and round all to bf16.

    Args:
        q: fp32 [T, heads, nope + rope].
        kv: fp32 [T, latent + rope].
        norm: fp32 [latent].
        cos, sin: fp32 [T, 1, rope / 2], of each row's angles.

    Returns:
        bf16 [T, heads, nope], [T, heads, rope] and [T, latent + rope].

    Raises:
        KernelError: a tensor of another type or shape, or no Triton.
    """
    rows, heads, width = q.shape
    latent, pairs = norm.shape[0], cos.shape[-1]
    nope = width - 2 * pairs
    if not 0 < latent <= MOST_VALUES or nope < 0 or not heads:
        raise KernelError(f"q {list(q.shape)}, norm {list(norm.shape)} and cos {list(cos.shape)} do not fit")
    expect(q, "q", torch.float32, (rows, heads, width))
    expect(kv, "kv", torch.float32, (rows, latent + 2 * pairs))
    expect(norm, "norm", torch.float32, (latent,))
    expect(cos, "cos", torch.float32, (rows, 1, pairs))
    expect(sin, "sin", torch.float32, (rows, 1, pairs))
    card_of(q, kv, norm, cos, sin)
    q_nope, q_rope, latents = (
        torch.empty(shape, dtype=torch.bfloat16, device=q.device)
        for shape in ((rows, heads, nope), (rows, heads, 2 * pairs), (rows, latent + 2 * pairs))
    )
    if rows:
        from k2hybrid.kernels.jit import rows as jit

        columns, half = power_of_two(nope), power_of_two(pairs)
        tile = min(power_of_two(heads), max(QUERY_VALUES // max(columns, 2 * half), 1))
        jit.prepare_attention[rows, 1 + -(-heads // tile)](
            q,
            kv,
            norm,
            cos,
            sin,
            q_nope,
            q_rope,
            latents,
            heads,
            nope,
            pairs,
            latent,
            eps,
            HEADS=tile,
            NOPE=columns,
            PAIRS=half,
            LATENT=power_of_two(latent),
            num_warps=4,
        )
    return q_nope, q_rope, latents


def store_fp8(
    rows: torch.Tensor,
    slots: torch.Tensor,
    stored: torch.Tensor,
    *,
    latent: int,
    group: int,
    exponents: tuple[int, int],
) -> None:
    """Encode latent rows and write them to their slots: the bytes of `cache.rows.Fp8Rows`.

    Args:
        rows: bf16 [n, latent + rope].
        slots: int64 [n].
        stored: uint8 [slots, row bytes].
        group: values under one scale, a power of two.
        exponents: of the smallest and the largest scale.

    Raises:
        KernelError: a tensor of another type or shape, or no Triton.
    """
    n, width = rows.shape
    rope, groups = width - latent, -(-latent // group)
    if not 0 < latent <= MOST_VALUES or rope < 0:
        raise KernelError(f"rows {list(rows.shape)} have no latent of {latent}")
    expect(rows, "rows", torch.bfloat16, (n, width))
    expect(slots, "slots", torch.int64, (n,))
    expect(stored, "stored", torch.uint8, (stored.shape[0], latent + 4 * groups + 2 * rope))
    card_of(rows, slots, stored)
    if n:
        from k2hybrid.kernels.jit import rows as jit

        jit.store_fp8[(n,)](
            rows,
            slots,
            stored,
            latent,
            rope,
            stored.shape[1],
            GROUP=group,
            GROUPS=power_of_two(groups),
            ROPE=power_of_two(rope),
            LEAST=exponents[0],
            MOST=exponents[1],
            num_warps=warps_for(power_of_two(groups) * group),
        )
