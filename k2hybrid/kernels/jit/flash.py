"""The kernel of `flash`: attention of a tile of queries, one head, over a block of context."""

from __future__ import annotations

import importlib
from typing import Any

from k2hybrid.kernels.jit.bits import dot, to_bf16

triton: Any = importlib.import_module("triton")
tl: Any = importlib.import_module("triton.language")


@triton.jit
def _columns(base, row, stride, inside, ALL: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr):
    """bf16 [rows, TILE]: the first COLUMNS values of rows behind `base`, then zeros; of rows that are not
    `inside`, zeros. ALL: they all are. Rows lie within 2^31 values: what is far is the base."""
    column = tl.arange(0, TILE)
    values = base + (row[:, None] * stride + column[None, :])
    if ALL and COLUMNS == TILE:
        return tl.load(values)
    else:
        return tl.load(values, mask=(inside[:, None] | ALL) & (column < COLUMNS)[None, :], other=0.0)


@triton.jit
def _over(
    peak,
    total,
    mixed,
    q_nope,
    q_rope,
    both,
    rope,
    both_stride,
    rope_stride,
    seen,
    scale,
    begin,
    end,
    rows,
    MASKED: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    NOPE_TILE: tl.constexpr,
    ROPE_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Take in rows [begin, end) of the block, in tiles; `seen` is how many of the block a query sees."""
    number = tl.arange(0, ROWS)
    for at in range(begin, end, ROWS):
        row = at + number
        inside = row < rows
        keys = both + tl.cast(at, tl.int64) * both_stride
        k = _columns(keys, number, both_stride, inside, not MASKED, NOPE, NOPE_TILE)
        rotary = rope + tl.cast(at, tl.int64) * rope_stride
        k_r = _columns(rotary, number, rope_stride, inside, not MASKED, ROPE, ROPE_TILE)
        v = _columns(keys + NOPE, number, both_stride, inside, not MASKED, VALUE, VALUE_TILE)
        scores = dot(q_nope, tl.trans(k), tl.zeros((QUERIES, ROWS), tl.float32))
        scores = dot(q_rope, tl.trans(k_r), scores)
        if MASKED:
            scores = tl.where(row[None, :] < seen[:, None], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
        fade = tl.exp2(peak - higher)
        total = total * fade + tl.sum(weights, 1)
        mixed = dot(to_bf16(weights), v, mixed * fade[:, None])
        peak = higher
    return peak, total, mixed


# Integers that differ from call to call: else a kernel for each of their kinds would be compiled while
# somebody waits.
@triton.jit(do_not_specialize=["queries", "rows", "start", "position"])
def attend(
    q,
    both,
    rope,
    out,
    mixed,
    sums,
    scale,
    queries,
    heads,
    rows,
    start,
    position,
    q_stride,
    rope_stride,
    out_stride,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    NOPE_TILE: tl.constexpr,
    ROPE_TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid (query tiles, heads). The block's rows are `start` … of the context, query i's own `position` + i.

    `mixed` fp32 [queries, heads, VALUE] and `sums` fp32 [2, heads, queries] (greatest score, base 2, and sum
    of weights) carry a tile from a block to the next; the block with its last query's own row writes `out`.
    """
    # The last tile sees the most rows: it begins first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    first = tile * QUERIES
    last = tl.minimum(first + QUERIES, queries) - 1
    # Rows of this block that all queries of the tile see, and that its last one sees.
    for_all = position + first + 1 - start
    for_last = position + last + 1 - start
    if for_last <= 0:  # it was finished by an earlier block
        return

    number = tl.arange(0, QUERIES)
    query = first + number
    is_query = query < queries
    of_tile = q + tl.cast(first, tl.int64) * q_stride + head * (NOPE + ROPE)
    q_nope = _columns(of_tile, number, q_stride, is_query, False, NOPE, NOPE_TILE)
    q_rope = _columns(of_tile + NOPE, number, q_stride, is_query, False, ROPE, ROPE_TILE)

    column = tl.arange(0, VALUE_TILE)[None, :]
    mixed += tl.cast(first, tl.int64) * heads * VALUE + head * VALUE
    slot = number[:, None] * (heads * VALUE) + column
    sum_at = sums + head * queries + query
    total_at = sum_at + heads * queries
    is_value = is_query[:, None]
    if VALUE != VALUE_TILE:
        is_value = is_value & (column < VALUE)
    carried = start > 0
    peak = tl.load(sum_at, mask=is_query & carried, other=float("-inf"))
    total = tl.load(total_at, mask=is_query & carried, other=0.0)
    acc = tl.load(mixed + slot, mask=is_value & carried, other=0.0)

    both_stride = heads * (NOPE + VALUE)
    keys = both + head * (NOPE + VALUE)
    seen = tl.minimum(query + (position + 1 - start), rows)
    whole = tl.maximum(tl.minimum(for_all, rows), 0) // ROWS * ROWS
    peak, total, acc = _over(
        peak,
        total,
        acc,
        q_nope,
        q_rope,
        keys,
        rope,
        both_stride,
        rope_stride,
        seen,
        scale,
        0,
        whole,
        rows,
        False,
        NOPE,
        ROPE,
        VALUE,
        NOPE_TILE,
        ROPE_TILE,
        VALUE_TILE,
        QUERIES,
        ROWS,
    )
    peak, total, acc = _over(
        peak,
        total,
        acc,
        q_nope,
        q_rope,
        keys,
        rope,
        both_stride,
        rope_stride,
        seen,
        scale,
        whole,
        tl.minimum(for_last, rows),
        rows,
        True,
        NOPE,
        ROPE,
        VALUE,
        NOPE_TILE,
        ROPE_TILE,
        VALUE_TILE,
        QUERIES,
        ROWS,
    )

    if for_last <= rows:
        out += tl.cast(first, tl.int64) * out_stride + head * VALUE
        at = number[:, None] * out_stride + column
        tl.store(out + at, to_bf16(acc / total[:, None]), mask=is_value)
    else:
        tl.store(mixed + slot, acc, mask=is_value)
        tl.store(sum_at, peak, mask=is_query)
        tl.store(total_at, total, mask=is_query)
