"""The split of a decode step's experts between card and CPU, in one launch: see `experts.hybrid`.

It stands before the hand-off in a captured step, so what it takes the CPU's experts wait for.
"""

from __future__ import annotations

import torch

from k2hybrid.errors import KernelError
from k2hybrid.kernels.card import card_of, expect, power_of_two

MOST_CHOICES = 256  # 32 rows of eight; one block compares each with every other
PART = 32  # of them at a time, so that they fit the registers


def split(
    ids: torch.Tensor,
    slots: torch.Tensor,
    limits: torch.Tensor,
    counts: torch.Tensor,
    use_weight: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots that the card computes, and ids left to the CPU: int32, shaped as `ids`; −1: none.

    Args:
        ids: int32 [T, k], T · k at most `MOST_CHOICES`; −1 is padding.
        slots: int32 [1 + experts]; −1, then each expert's slot, or −1.
        limits: int32 [1 + min(T · k, experts)]: experts that the card takes, by the step's distinct ones.
        counts: fp32 [experts]; `use_weight` is added to those of the step.

    Raises:
        KernelError: a tensor of another type or shape, or no Triton.
    """
    rows, top_k = ids.shape
    choices, experts = rows * top_k, counts.shape[0]
    if choices > MOST_CHOICES:
        raise KernelError(f"a split takes at most {MOST_CHOICES} choices, not {rows} rows of {top_k}")
    expect(ids, "ids", torch.int32, (rows, top_k))
    expect(slots, "slots", torch.int32, (1 + experts,))
    expect(limits, "limits", torch.int32, (1 + min(choices, experts),))
    expect(counts, "counts", torch.float32, (experts,))
    card_of(ids, slots, limits, counts)
    chosen, rest = torch.empty_like(ids), torch.empty_like(ids)
    if choices:
        from k2hybrid.kernels.jit import split as jit

        jit.split[(1,)](
            ids,
            slots,
            limits,
            counts,
            chosen,
            rest,
            choices,
            experts,
            use_weight,
            CHOICES=power_of_two(choices),
            PART=min(PART, power_of_two(choices)),
            num_warps=8,
        )
    return chosen, rest
