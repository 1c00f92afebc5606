"""The kernels of `experts`: the two halves of an expert over its rows, and the sum over a row's experts."""

from __future__ import annotations

import importlib
from typing import Any

from k2hybrid.kernels.jit.bits import dot, int4, to_bf16, to_fp32

triton: Any = importlib.import_module("triton")
tl: Any = importlib.import_module("triton.language")

GROUP = tl.constexpr(32)  # weights under one scale


@triton.jit
def _multiply(
    a,
    is_row,
    words,
    scales,
    column,
    outputs,
    groups,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """fp32 [ROWS, COLUMNS]: rows of bf16 [groups * 32] times an INT4 matrix [outputs, groups * 32].

    `a` is a block of pointers [ROWS] to the rows' beginnings. A group's products are summed before its scale
    multiplies the sum, so no weight is rounded.
    """
    is_column = column < outputs
    inner = tl.arange(0, GROUP)
    if GROUPS == 1:
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        word = tl.arange(0, 4)
        for group in range(0, groups):
            x = tl.load(a[:, None] + group * GROUP + inner[None, :], mask=is_row[:, None], other=0.0)
            at = column[:, None] * (groups * 4) + group * 4 + word[None, :]
            w = int4(tl.load(words + at, mask=is_column[:, None], other=0))
            scale = to_fp32(tl.load(scales + column * groups + group, mask=is_column, other=0.0))
            acc += dot(x, tl.trans(w), tl.zeros((ROWS, COLUMNS), tl.float32)) * scale[None, :]
        return acc
    else:
        # Several groups at a time, each with sums of its own: long reads, and a warp for every group.
        accs = tl.zeros((GROUPS, ROWS, COLUMNS), tl.float32)
        word = tl.arange(0, GROUPS * 4)
        for first in range(0, groups, GROUPS):
            group = first + tl.arange(0, GROUPS)
            at = a[None, :, None] + group[:, None, None] * GROUP + inner[None, None, :]
            x = tl.load(at, mask=is_row[None, :, None] & (group < groups)[:, None, None], other=0.0)
            at = column[:, None] * (groups * 4) + first * 4 + word[None, :]
            mask = is_column[:, None] & (first * 4 + word < groups * 4)[None, :]
            w = tl.reshape(int4(tl.load(words + at, mask=mask, other=0)), (COLUMNS, GROUPS, GROUP))
            at = column[None, :] * groups + group[:, None]
            scale = tl.load(scales + at, mask=is_column[None, :] & (group < groups)[:, None], other=0.0)
            products = dot(x, tl.permute(w, (1, 2, 0)), tl.zeros((GROUPS, ROWS, COLUMNS), tl.float32))
            accs += products * to_fp32(scale)[:, None, :]
        return tl.sum(accs, 0)


@triton.jit
def deal(
    chosen,
    order,
    places,
    tile_slots,
    tile_first,
    tile_counts,
    choices,
    tiles,
    slots,
    ROWS: tl.constexpr,
    CHOICES: tl.constexpr,
    TILES: tl.constexpr,
):
    """One program: what `experts.deal` makes of few choices, each compared with every other."""
    i = tl.arange(0, CHOICES)[:, None]
    j = tl.arange(0, CHOICES)[None, :]
    key_i = tl.load(chosen + i, mask=i < choices, other=-1)
    key_j = tl.load(chosen + j, mask=j < choices, other=-1)
    key_i = tl.where(key_i < 0, slots, key_i)
    key_j = tl.where(key_j < 0, slots, key_j)
    same = key_i == key_j
    # A choice's place, its rank in its slot and its slot's rows, down and across.
    place_i = tl.sum(((key_j < key_i) | (same & (j < i))).to(tl.int32), 1)
    place_j = tl.sum(((key_i < key_j) | (same & (i < j))).to(tl.int32), 0)
    rank_i = tl.sum((same & (j < i)).to(tl.int32), 1)
    rank_j = tl.sum((same & (i < j)).to(tl.int32), 0)
    rows = tl.sum(same.to(tl.int32), 1)
    begins_j = (key_j < slots) & (rank_j[None, :] % ROWS == 0)
    tile = tl.sum((begins_j & (place_j[None, :] < place_i[:, None])).to(tl.int32), 1)

    number = tl.arange(0, CHOICES)
    tl.store(places + number, place_i, mask=number < choices)
    tl.store(order + place_i, number, mask=number < choices)
    slot = tl.sum(tl.where(i == j, key_j, 0), 1)
    begins = (slot < slots) & (rank_i % ROWS == 0)
    stored = begins & (tile < tiles)
    tl.store(tile_slots + tile, slot, mask=stored)
    tl.store(tile_first + tile, place_i, mask=stored)
    tl.store(tile_counts + tile, tl.minimum(rows - rank_i, ROWS), mask=stored)
    left = tl.arange(0, TILES)
    tl.store(tile_slots + left, -1, mask=(left >= tl.sum(begins.to(tl.int32), 0)) & (left < tiles))


@triton.jit
def gate_up(
    x,
    words,
    scales,
    tile_slots,
    tile_first,
    tile_counts,
    order,
    out,
    slot_bytes,
    top_k,
    hidden,
    inter,
    choices,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Grid (column tiles, tiles): `out` bf16 [choices, inter] = silu(gate x) * (up x), by place.

    `words` int32 and `scales` bf16 both point at the first slot.
    """
    slot = tl.load(tile_slots + tl.program_id(1)).to(tl.int64)
    if slot < 0:
        return
    row = tl.arange(0, ROWS)
    place = (tl.load(tile_first + tl.program_id(1)) + row).to(tl.int64)
    is_row = (row < tl.load(tile_counts + tl.program_id(1))) & (place < choices)
    token = (tl.load(order + place, mask=is_row, other=0) // top_k).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    a = x + token * hidden
    size = inter * hidden  # weights of a matrix: half as many bytes, and a scale for 32
    words += slot * (slot_bytes // 4)
    scales += slot * (slot_bytes // 2) + size // 4 * 3
    groups = hidden // GROUP
    gate = _multiply(a, is_row, words, scales, column, inter, groups, ROWS, COLUMNS, GROUPS)
    words += size // 8
    scales += size // 32
    up = _multiply(a, is_row, words, scales, column, inter, groups, ROWS, COLUMNS, GROUPS)
    h = gate / (1.0 + tl.exp(-gate)) * up
    at = place[:, None] * inter + column[None, :]
    tl.store(out + at, to_bf16(h), mask=is_row[:, None] & (column < inter)[None, :])


@triton.jit
def down(
    h,
    words,
    scales,
    tile_slots,
    tile_first,
    tile_counts,
    out,
    slot_bytes,
    hidden,
    inter,
    choices,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Grid (column tiles, tiles): `out` fp32 [choices, hidden] = down h."""
    slot = tl.load(tile_slots + tl.program_id(1)).to(tl.int64)
    if slot < 0:
        return
    row = tl.arange(0, ROWS)
    place = (tl.load(tile_first + tl.program_id(1)) + row).to(tl.int64)
    is_row = (row < tl.load(tile_counts + tl.program_id(1))) & (place < choices)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    size = inter * hidden
    words += slot * (slot_bytes // 4) + size // 8 * 2
    scales += slot * (slot_bytes // 2) + size // 4 * 3 + size // 32 * 2
    y = _multiply(
        h + place * inter, is_row, words, scales, column, hidden, inter // GROUP, ROWS, COLUMNS, GROUPS
    )
    at = place[:, None] * hidden + column[None, :]
    tl.store(out + at, y, mask=is_row[:, None] & (column < hidden)[None, :])


@triton.jit
def combine(y, chosen, places, weights, out, top_k, hidden, choices, COLUMNS: tl.constexpr):
    """Grid (column tiles, rows): out[t] = sum of weight * y over the chosen of row t, in their order."""
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for k in range(0, top_k):
        at = token * top_k + k
        is_chosen = tl.load(chosen + at) >= 0
        place = tl.load(places + at).to(tl.int64)
        # A choice that found no place has no output: the row says so.
        mask = is_chosen & (place < choices) & (column < hidden)
        values = tl.load(y + place * hidden + column, mask=mask, other=float("nan"))
        total = tl.where(is_chosen, tl.fma(values, tl.load(weights + at), total), total)
    tl.store(out + token * hidden + column, total, mask=column < hidden)
