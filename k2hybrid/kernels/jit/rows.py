"""The kernels of `rows`: norms, SwiGLU, the choice of experts, rotation, FP8 rows of the latent cache."""

from __future__ import annotations

import importlib
from typing import Any

from k2hybrid.kernels.jit.bits import to_bf16, to_fp32

triton: Any = importlib.import_module("triton")
tl: Any = importlib.import_module("triton.language")

TAKEN = tl.constexpr(-(2**63))  # below every expert's key


@triton.jit
def _normed(x, weight, n, eps):
    """bf16: x / rms(x) * weight, for x fp32 with zeros behind its n values."""
    return to_bf16(x * tl.rsqrt(tl.sum(x * x, 0) / n + eps) * weight)


@triton.jit
def rms_norm(x, weight, out, stride, n, eps, N: tl.constexpr):
    """Grid (rows): `out` bf16 [rows, n]; rows of `x` fp32 lie `stride` apart."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, N)
    values = tl.load(x + row * stride + column, mask=column < n, other=0.0)
    factors = tl.load(weight + column, mask=column < n, other=0.0)
    tl.store(out + row * n + column, _normed(values, factors, n, eps), mask=column < n)


@triton.jit
def swiglu(gate, up, out, n, N: tl.constexpr):
    """Grid (rows, column tiles): `out` bf16 = silu(gate) * up, fp32 [rows, n]."""
    column = tl.program_id(1) * N + tl.arange(0, N)
    at = tl.program_id(0).to(tl.int64) * n + column
    g = tl.load(gate + at, mask=column < n, other=0.0)
    u = tl.load(up + at, mask=column < n, other=0.0)
    tl.store(out + at, to_bf16(g / (1.0 + tl.exp(-g)) * u), mask=column < n)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def choose(
    logits,
    bias,
    ids,
    weights,
    experts,
    top_k,
    scale,
    NORMALIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOSEN: tl.constexpr,
):
    """Grid (rows): the `top_k` best of a row's experts, one after the other; see `rows.choose`."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * experts
    expert = tl.arange(0, EXPERTS)
    logit = tl.load(logits + expert, mask=expert < experts, other=0.0)
    broken = tl.max((logit != logit).to(tl.int32), 0) > 0
    # One that is no number gets a score like any other, so that all that is chosen differs.
    score = tl.where(logit == logit, _sigmoid(logit), 0.0)
    biased = score + tl.load(bias + expert, mask=expert < experts, other=0.0)
    # Keys in the order of the scores, of equal ones the lower expert first: integers, no two alike.
    bits = biased.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (ordered.to(tl.int64) << 32) | (EXPERTS - 1 - expert).to(tl.int64)
    key = tl.where(expert < experts, key, TAKEN)
    place = tl.arange(0, CHOSEN)
    chosen = tl.zeros((CHOSEN,), tl.int32)
    for k in range(0, top_k):
        best = tl.max(key, 0)
        key = tl.where(key == best, TAKEN, key)
        chosen = tl.where(place == k, EXPERTS - 1 - best.to(tl.int32), chosen)
    is_chosen = place < top_k
    weight = tl.where(is_chosen, _sigmoid(tl.load(logits + chosen, mask=is_chosen, other=0.0)), 0.0)
    if NORMALIZE:
        weight = weight / (tl.sum(weight, 0) + 1e-20)
    weight = tl.where(broken, float("nan"), weight * scale)
    tl.store(ids + row * top_k + place, chosen, mask=is_chosen)
    tl.store(weights + row * top_k + place, weight, mask=is_chosen)


@triton.jit
def _rotate(x, out, cos, sin, mask, pair):
    """Store adjacent pairs of `x`, turned, in bf16."""
    even = tl.load(x + 2 * pair, mask=mask, other=0.0)
    odd = tl.load(x + 2 * pair + 1, mask=mask, other=0.0)
    tl.store(out + 2 * pair, to_bf16(even * cos - odd * sin), mask=mask)
    tl.store(out + 2 * pair + 1, to_bf16(odd * cos + even * sin), mask=mask)


@triton.jit
def prepare_attention(
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
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    PAIRS: tl.constexpr,
    LATENT: tl.constexpr,
):
    """Grid (rows, head tiles + 1): the first tile is the row of the cache, the others are queries."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    is_pair = pair < pairs
    c = tl.load(cos + row * pairs + pair, mask=is_pair, other=0.0)
    s = tl.load(sin + row * pairs + pair, mask=is_pair, other=0.0)
    tile = tl.program_id(1)
    if tile == 0:
        kv += row * (latent + 2 * pairs)
        latents += row * (latent + 2 * pairs)
        part = tl.arange(0, LATENT)
        is_part = part < latent
        values = tl.load(kv + part, mask=is_part, other=0.0)
        factors = tl.load(norm + part, mask=is_part, other=0.0)
        tl.store(latents + part, _normed(values, factors, latent, eps), mask=is_part)
        _rotate(kv + latent, latents + latent, c, s, is_pair, pair)
    else:
        head = (tile - 1) * HEADS + tl.arange(0, HEADS)[:, None]
        is_head = head < heads
        at = row * heads + head
        of_head = q + at * (nope + 2 * pairs)
        column = tl.arange(0, NOPE)[None, :]
        is_nope = is_head & (column < nope)
        tl.store(
            q_nope + at * nope + column,
            to_bf16(tl.load(of_head + column, mask=is_nope, other=0.0)),
            mask=is_nope,
        )
        is_rope = is_head & is_pair[None, :]
        to = q_rope + at * (2 * pairs)
        _rotate(of_head + nope, to, c[None, :], s[None, :], is_rope, pair[None, :])


@triton.jit
def store_fp8(
    rows,
    slots,
    stored,
    latent,
    rope,
    row_bytes,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    ROPE: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
):
    """Grid (rows): `rows` bf16 [n, latent + rope] as `cache.rows.Fp8Rows` encodes them, to their slots.

    Everything is stored byte by byte: a row of odd sizes has its scales at any address. LEAST and MOST bound
    the exponent of a scale.
    """
    row = tl.program_id(0).to(tl.int64)
    rows += row * (latent + rope)
    stored += tl.load(slots + row).to(tl.int64) * row_bytes
    group = tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    bits = to_fp32(tl.load(rows + column, mask=column < latent, other=0.0)).to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Of numbers from 0 on, infinity and NaN the bits are in their order.
    largest = tl.max(size, 1)
    broken = largest >= 0x7F800000
    # The smallest power of two under which the largest is at most 448: it carries where 1.75 is exceeded.
    exponent = ((largest + 0x1FFFFF) >> 23) - 135
    exponent = tl.minimum(tl.maximum(exponent, LEAST), MOST)
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    value = tl.minimum(size.to(tl.float32, bitcast=True) * inverse[:, None], 448.0)
    scaled = value.to(tl.int32, bitcast=True)
    # To nearest even: normal numbers of e4m3 drop 20 bits; its subnormals are a count of 2^-9, which is the
    # step of fp32 behind 2^14.
    normal = ((scaled + 0x7FFFF + ((scaled >> 20) & 1)) >> 20) - (120 << 3)
    few = (value + 16384.0).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(value < 0.015625, few, normal) | ((bits >> 24) & 0x80)
    code = tl.where(broken[:, None], 0, code)
    tl.store(stored + column, code.to(tl.uint8), mask=column < latent)
    scale = tl.where(broken, 0x7FC00000, (exponent + 127) << 23)
    at = latent + 4 * group
    for i in tl.static_range(4):
        tl.store(stored + at + i, ((scale >> (8 * i)) & 0xFF).to(tl.uint8), mask=group * GROUP < latent)
    rotary = tl.arange(0, ROPE)
    halves = tl.load(rows + latent + rotary, mask=rotary < rope, other=0.0)
    halves = halves.to(tl.int16, bitcast=True).to(tl.int32)
    at = row_bytes - 2 * rope + 2 * rotary
    tl.store(stored + at, (halves & 0xFF).to(tl.uint8), mask=rotary < rope)
    tl.store(stored + at + 1, ((halves >> 8) & 0xFF).to(tl.uint8), mask=rotary < rope)
