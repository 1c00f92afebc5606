"""The two kernels of `mla`: attention of a head tile over a part of one context; the merge of parts."""

from __future__ import annotations

import importlib
from typing import Any

from k2hybrid.kernels.jit.bits import dot, e4m3, to_bf16, to_fp32

triton: Any = importlib.import_module("triton")
tl: Any = importlib.import_module("triton.language")

# Of the factor 2^120 that `e4m3` leaves out, what queries and weights carry: both operands stay far from the
# ends of bf16's range, and the products far from those of fp32's.
CARRIED = tl.constexpr(2.0**96)
LEFT = tl.constexpr(2.0**24)


@triton.jit
def _parts(lengths, batch, spread, MIN_PART: tl.constexpr, BATCH: tl.constexpr):
    """Lengths and numbers of parts of all sequences, int32 [BATCH] each.

    A part is as long as all contexts together divided by `spread`, so there are at most spread + batch parts,
    and a long context beside short ones gets most of them.
    """
    number = tl.arange(0, BATCH)
    length = tl.load(lengths + number, mask=number < batch, other=0)
    longest = tl.maximum(tl.cdiv(tl.sum(length, 0), spread), MIN_PART)
    return length, tl.cdiv(length, longest)


@triton.jit
def _pick(values, number, BATCH: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, BATCH) == number, values, 0), 0)


@triton.jit
def _latents(
    words,
    halves,
    row,
    inside,
    g: tl.constexpr,
    LATENT: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    FP8: tl.constexpr,
):
    """Latent values g * GROUP … of some rows, bf16 [tokens, GROUP]; FP8: without scale, times 2^-120."""
    if FP8:
        column = tl.arange(0, GROUP // 4)
        mask = inside[:, None]
        if LATENT % GROUP:
            mask = mask & (g * GROUP + 4 * column < LATENT)[None, :]
        at = row[:, None] * (ROW_BYTES // 4) + g * (GROUP // 4) + column[None, :]
        return e4m3(tl.load(words + at, mask=mask, other=0))
    else:
        column = tl.arange(0, GROUP)
        mask = inside[:, None]
        if LATENT % GROUP:
            mask = mask & (g * GROUP + column < LATENT)[None, :]
        at = row[:, None] * (ROW_BYTES // 2) + g * GROUP + column[None, :]
        return tl.load(halves + at, mask=mask, other=0.0)


@triton.jit
def attend(
    q_latent,
    q_rope,
    words,
    halves,
    floats,
    tables,
    lengths,
    partial,
    lse,
    scale,
    batch,
    heads,
    pages,
    spread,
    latent_stride,
    rope_stride,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    FP8: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    ROPE_TILE: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    BATCH: tl.constexpr,
    MIN_PART: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Grid (head tiles, parts): `partial` fp32 [parts, heads, LATENT], `lse` fp32 [parts, heads] (base 2)."""
    worker = tl.program_id(1)
    length, counts = _parts(lengths, batch, spread, MIN_PART, BATCH)
    b = tl.sum((tl.cumsum(counts, 0) <= worker).to(tl.int32), 0)
    if b >= batch:
        return
    count = _pick(counts, b, BATCH)
    part = worker - tl.sum(tl.where(tl.arange(0, BATCH) < b, counts, 0), 0)
    tokens = _pick(length, b, BATCH)
    step = tl.cdiv(tl.cdiv(tokens, count), TOKENS) * TOKENS
    start = part * step
    end = tl.minimum(start + step, tokens)

    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    is_head = (head < heads)[:, None]
    column = tl.arange(0, GROUP)
    of_latent = q_latent + b.to(tl.int64) * latent_stride + head[:, None] * LATENT
    of_rope = q_rope + b.to(tl.int64) * rope_stride + head[:, None] * ROPE
    queries = ()
    outs = ()
    for g in tl.static_range(GROUPS):
        mask = is_head
        if LATENT % GROUP:
            mask = mask & (g * GROUP + column < LATENT)[None, :]
        q = tl.load(of_latent + g * GROUP + column[None, :], mask=mask, other=0.0)
        if FP8:
            q = to_bf16(to_fp32(q) * CARRIED)
        queries = queries + (q,)
        outs = outs + (tl.zeros((HEADS, GROUP), tl.float32),)
    rope = tl.arange(0, ROPE_TILE)
    is_rope = (rope < ROPE)[None, :]
    q_r = tl.load(of_rope + rope[None, :], mask=is_head & is_rope, other=0.0)

    peak = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    table = tables + b.to(tl.int64) * pages
    # Read one block ahead, so that a row's address is at hand when its turn comes.
    next_page = tl.load(table + start // PAGE, mask=start < end, other=0)
    for at in range(start, end, TOKENS):
        page = next_page
        next_page = tl.load(table + (at + TOKENS) // PAGE, mask=at + TOKENS < end, other=0)
        token = tl.arange(0, TOKENS)
        # What lies behind the end may be anything, NaN too: it is never read.
        inside = at + token < end
        row = page.to(tl.int64) * PAGE + at % PAGE + token
        k_r = tl.load(
            halves + row[:, None] * (ROW_BYTES // 2) + (ROW_BYTES // 2 - ROPE) + rope[None, :],
            mask=inside[:, None] & is_rope,
            other=0.0,
        )
        scores = dot(q_r, tl.trans(k_r), tl.zeros((HEADS, TOKENS), tl.float32))
        values = ()
        scales = ()
        for g in tl.static_range(GROUPS):
            k = _latents(words, halves, row, inside, g, LATENT, GROUP, ROW_BYTES, FP8)
            values = values + (k,)
            if FP8:
                factor = tl.load(floats + row * (ROW_BYTES // 4) + LATENT // 4 + g, mask=inside, other=0.0)
                scales = scales + (factor,)
                unscaled = dot(queries[g], tl.trans(k), tl.zeros((HEADS, TOKENS), tl.float32))
                scores += unscaled * (factor * LEFT)[None, :]
            else:
                scores = dot(queries[g], tl.trans(k), scores)
        scores = tl.where(inside[None, :], scores * scale, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(peak - higher)
        total = total * fade + tl.sum(weights, 1)
        peak = higher
        faded = ()
        for g in tl.static_range(GROUPS):
            w = weights
            if FP8:
                w = weights * (scales[g] * CARRIED)[None, :]
            faded = faded + (dot(to_bf16(w), values[g], outs[g] * fade[:, None]),)
        outs = faded

    slot = (worker * heads + head).to(tl.int64)
    tl.store(lse + slot, peak + tl.log2(total), mask=head < heads)
    if start < end:
        share = 1.0 / total
        if FP8:
            share = share * LEFT
        for g in tl.static_range(GROUPS):
            mask = is_head
            if LATENT % GROUP:
                mask = mask & (g * GROUP + column < LATENT)[None, :]
            tl.store(
                partial + slot[:, None] * LATENT + g * GROUP + column[None, :],
                outs[g] * share[:, None],
                mask=mask,
            )


@triton.jit
def merge(
    partial,
    lse,
    lengths,
    out,
    batch,
    heads,
    spread,
    LATENT: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    BATCH: tl.constexpr,
    MIN_PART: tl.constexpr,
):
    """Grid (column tiles, heads, batch): the parts of a sequence, each times its share of all weight."""
    head, b = tl.program_id(1), tl.program_id(2)
    _, counts = _parts(lengths, batch, spread, MIN_PART, BATCH)
    first = tl.sum(tl.where(tl.arange(0, BATCH) < b, counts, 0), 0)
    count = _pick(counts, b, BATCH)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    peak = float("-inf")
    total = 0.0
    mixed = tl.zeros((COLUMNS,), tl.float32)
    for at in range(0, count, PARTS):
        part = at + tl.arange(0, PARTS)
        slot = ((first + part) * heads + head).to(tl.int64)
        log = tl.load(lse + slot, mask=part < count, other=float("-inf"))
        mask = (log > float("-inf"))[:, None] & (column < LATENT)[None, :]
        values = tl.load(partial + slot[:, None] * LATENT + column[None, :], mask=mask, other=0.0)
        higher = tl.maximum(peak, tl.max(log, 0))
        weights = tl.exp2(log - higher)
        fade = tl.exp2(peak - higher)
        total = total * fade + tl.sum(weights, 0)
        mixed = mixed * fade + tl.sum(values * weights[:, None], 0)
        peak = higher
    # A sequence without context has no parts: zeros.
    share = 1.0 / tl.where(count > 0, total, 1.0)
    tl.store(out + (b * heads + head).to(tl.int64) * LATENT + column, mixed * share, mask=column < LATENT)
