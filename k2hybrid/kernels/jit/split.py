"""The kernel of `split`."""

from __future__ import annotations

import importlib
from typing import Any

triton: Any = importlib.import_module("triton")
tl: Any = importlib.import_module("triton.language")


@triton.jit
def split(
    ids,
    slots,
    limits,
    counts,
    chosen,
    rest,
    choices,
    experts,
    use_weight,
    CHOICES: tl.constexpr,
    PART: tl.constexpr,
):
    """One program: each choice is compared with every other, `PART` of them at a time."""
    i = tl.arange(0, CHOICES)
    id_i = tl.load(ids + i, mask=i < choices, other=-1)
    slot_i = tl.load(slots + 1 + id_i)
    uses_i = tl.zeros((CHOICES,), tl.int32)
    before_i = tl.zeros((CHOICES,), tl.int32)
    for start in range(0, CHOICES, PART):
        j = start + tl.arange(0, PART)
        id_j = tl.load(ids + j, mask=j < choices, other=-1)
        same = id_i[:, None] == id_j[None, :]
        uses_i += tl.sum(same.to(tl.int32), 1)
        before_i += tl.sum((same & (j[None, :] < i[:, None])).to(tl.int32), 1)
    # An expert counts where it is first chosen.
    first_i = (before_i == 0) & (id_i >= 0)
    # Those with the most rows first, then the lower id: no two experts that are there have the same rank.
    rank_i = tl.where(slot_i >= 0, uses_i * experts + (experts - id_i), 0)
    above = tl.zeros((CHOICES,), tl.int32)
    for start in range(0, CHOICES, PART):
        j = start + tl.arange(0, PART)
        id_j = tl.load(ids + j, mask=j < choices, other=-1)
        slot_j = tl.load(slots + 1 + id_j)
        same = id_i[:, None] == id_j[None, :]
        uses_j = tl.sum(same.to(tl.int32), 0)
        before_j = tl.sum((same & (i[:, None] < j[None, :])).to(tl.int32), 0)
        rank_j = tl.where((before_j == 0) & (slot_j >= 0), uses_j * experts + (experts - id_j), 0)
        above += tl.sum((rank_j[None, :] > rank_i[:, None]).to(tl.int32), 1)
    limit = tl.load(limits + tl.sum(first_i.to(tl.int32), 0))
    taken = (rank_i > 0) & (above < limit)
    tl.store(chosen + i, tl.where(taken, slot_i, -1), mask=i < choices)
    tl.store(rest + i, tl.where(taken, -1, id_i), mask=i < choices)
    used = tl.load(counts + id_i, mask=first_i, other=0.0)
    tl.store(counts + id_i, used + use_weight, mask=first_i)
