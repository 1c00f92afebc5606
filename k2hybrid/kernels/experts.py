"""Routed experts whose INT4 bytes lie on the device: the chosen experts of each row, weighted and summed.

Rows are dealt to their slots on the device, without a wait of the CPU: choices are sorted by slot, cut into
tiles of rows of one slot, and as many tiles are launched as there could be; what is left over exits at once.
A choice's output is written for itself and a row's are summed in one fixed order, so no result depends on
which tile was done first. A slot holds an expert's matrices one after the other, as published: gate, up and
down packed (int32, eight weights a word), then their scales (bf16, one for 32 weights).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from k2hybrid.errors import KernelError
from k2hybrid.kernels.card import card_of, expect, power_of_two

GROUP = 32
COMBINE_COLUMNS = 512
DEAL_CHOICES = 64  # eight rows of eight; more do not fit the registers that compare each with every other


@dataclass(frozen=True, slots=True)
class Tile:
    """How both halves are compiled: rows of a slot, outputs, groups at a time; warps, pipeline stages."""

    rows: int
    columns: int
    groups: int
    warps: int
    stages: int


FEW = Tile(16, 32, 4, 4, 3)  # the memory decides: a warp a group
MANY = Tile(64, 64, 1, 4, 3)  # the tensor cores decide


def choose_tile(rows: int, top_k: int, slots: int) -> Tile:
    """By the rows that a slot has on average, were all choices among these slots."""
    return FEW if min(rows, rows * top_k // slots) <= FEW.rows else MANY


def expert_bytes(hidden: int, inter: int) -> int:
    """Bytes of a slot: half a byte a weight, and two for the scale of 32."""
    return 3 * hidden * inter // 2 + 3 * hidden * inter // GROUP * 2


def scratch_bytes(choices: int, hidden: int, inter: int) -> int:
    """What one call takes at most for all choices: fp32 of `hidden`, bf16 of `inter`, indices."""
    return choices * (4 * hidden + 2 * inter + 64)


@dataclass(frozen=True, slots=True)
class Deal:
    """Choices sorted by slot, equal ones in their order, and the tiles they make; all int32 on the device.

    `order` [T · k]: a choice's number, by place. `places` [T · k]: its inverse. `tile_slots` [tiles]: −1
    where there is no tile; `tile_first`, `tile_counts` [tiles]: a tile's first place and its rows elsewhere.
    """

    order: torch.Tensor
    places: torch.Tensor
    tile_slots: torch.Tensor
    tile_first: torch.Tensor
    tile_counts: torch.Tensor


def deal(chosen: torch.Tensor, slots: int, rows: int, choices: int) -> Deal:
    """Sort `chosen` [T, k] by slot, for tiles of `rows`; `choices` bounds how many of them are a slot.

    Few choices, those of a decode step, are one launch; many are a dozen of torch's. Shapes depend on shapes
    alone: it can be captured.
    """
    tiles = choices // rows + min(slots, choices)
    if chosen.numel() <= DEAL_CHOICES:
        return _deal_few(chosen, slots, rows, tiles)
    return _deal_many(chosen, slots, rows, tiles)


def _deal_few(chosen: torch.Tensor, slots: int, rows: int, tiles: int) -> Deal:
    from k2hybrid.kernels.jit import experts as jit

    count = chosen.numel()
    whole = torch.empty(2 * count + 3 * tiles, dtype=torch.int32, device=chosen.device)
    dealt = Deal(*torch.split(whole, [count, count, tiles, tiles, tiles]))
    jit.deal[(1,)](
        chosen,
        dealt.order,
        dealt.places,
        dealt.tile_slots,
        dealt.tile_first,
        dealt.tile_counts,
        count,
        tiles,
        slots,
        ROWS=rows,
        CHOICES=power_of_two(count),
        TILES=power_of_two(tiles),
        num_warps=8,
    )
    return dealt


def _deal_many(chosen: torch.Tensor, slots: int, rows: int, tiles: int) -> Deal:
    device = chosen.device
    flat = chosen.reshape(-1).long()
    key = torch.where(flat < 0, slots, flat)
    order = torch.argsort(key, stable=True)
    numbers = torch.arange(len(flat), device=device)
    places = torch.empty_like(numbers).scatter_(0, order, numbers)
    counts = torch.zeros(slots + 1, dtype=torch.int64, device=device)
    counts = counts.scatter_add_(0, key, torch.ones_like(key))[:slots]
    of_slot = (counts + rows - 1) // rows
    ends = of_slot.cumsum(0)
    tile = torch.arange(tiles, device=device)
    slot = torch.searchsorted(ends, tile, right=True)
    known = slot.clamp(max=slots - 1)
    row = (tile - (ends - of_slot)[known]) * rows
    return Deal(
        order=order.int(),
        places=places.int(),
        tile_slots=torch.where(slot < slots, slot, -1).int(),
        tile_first=((counts.cumsum(0) - counts)[known] + row).int(),
        tile_counts=(counts[known] - row).clamp(max=rows).int(),
    )


def int4_experts(
    x: torch.Tensor,
    slots: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    *,
    hidden: int,
    inter: int,
    choices: int | None = None,
) -> torch.Tensor:
    """out[t] = Σ over chosen[t, j] ≥ 0, in order of j, of weights[t, j] · down(silu(gate(x)) · up(x)).

    Args:
        x: bf16 [T, hidden].
        slots: uint8 [S, `expert_bytes`].
        chosen: int32 [T, k], slot numbers below S, or −1 for an expert that is not here.
        weights: fp32 [T, k].
        hidden, inter: multiples of 32.
        choices: no more than so many of `chosen` are a slot; T · k unless the caller knows better. It bounds
            `scratch_bytes`; where it is too small, rows of choices beyond it come out as NaN.

    Returns:
        fp32 [T, hidden].

    INT4 times bf16 is exact, sums are fp32, silu(gate) · up is rounded to bf16, as on the CPU: see
    docs/numerics.md. Nothing waits for the device; memory is torch's, under capture the graph's own, and
    given back at the end.

    Raises:
        KernelError: a tensor of another type or shape, or no Triton.
    """
    rows, top_k = chosen.shape
    count = slots.shape[0]
    if hidden % GROUP or inter % GROUP or count == 0:
        raise KernelError(
            f"INT4 experts take sizes that are multiples of {GROUP} and a slot at least; "
            f"not {hidden} by {inter}, {count} slots"
        )
    expect(x, "x", torch.bfloat16, (rows, hidden))
    expect(slots, "slots", torch.uint8, (count, expert_bytes(hidden, inter)))
    expect(chosen, "chosen", torch.int32, (rows, top_k))
    expect(weights, "weights", torch.float32, (rows, top_k))
    card_of(x, slots, chosen, weights)
    out = torch.empty((rows, hidden), dtype=torch.float32, device=x.device)
    if rows == 0:
        return out
    from k2hybrid.kernels.jit import experts as jit

    choices = rows * top_k if choices is None else min(choices, rows * top_k)
    tile = choose_tile(rows, top_k, count)
    dealt = deal(chosen, count, tile.rows, choices)
    words, scales = slots.view(torch.int32), slots.view(torch.bfloat16)
    tiles = (dealt.tile_slots, dealt.tile_first, dealt.tile_counts)
    how = {
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "GROUPS": tile.groups,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    h = torch.empty((choices, inter), dtype=torch.bfloat16, device=x.device)
    y = torch.empty((choices, hidden), dtype=torch.float32, device=x.device)
    if len(dealt.tile_slots):
        grid = (-(-inter // tile.columns), len(dealt.tile_slots))
        jit.gate_up[grid](
            x, words, scales, *tiles, dealt.order, h, slots.shape[1], top_k, hidden, inter, choices, **how
        )
        grid = (-(-hidden // tile.columns), len(dealt.tile_slots))
        jit.down[grid](h, words, scales, *tiles, y, slots.shape[1], hidden, inter, choices, **how)
    jit.combine[-(-hidden // COMBINE_COLUMNS), rows](
        y, chosen, dealt.places, weights, out, top_k, hidden, choices, COLUMNS=COMBINE_COLUMNS
    )
    return out
