"""What one forward pass works on: token rows of several sequences, and where each sequence's context lies."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor in RAM, copied to `device`: what is computed there next comes after it; nobody waits.

    For indices and angles: what is page-locked on the way stays so, for the next one.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(slots=True)  # not frozen, which would make it four times as slowly, for every token
class Span:
    """`count` new tokens of one sequence that has `start` tokens in its pages already.

    `page_table` int64 [P] covers start + count tokens.
    """

    start: int
    count: int
    page_table: torch.Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one pass. The spans follow each other in the rows, in order: Σ count = T.

    ids, positions: int64 [T]. logit_rows: int64 [R], the rows of T whose logits are wanted.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    spans: tuple[Span, ...]
    logit_rows: torch.Tensor
    _row_slices: tuple[slice, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        slices = []
        row = 0
        for span in self.spans:
            slices.append(slice(row, row + span.count))
            row += span.count
        object.__setattr__(self, "_row_slices", tuple(slices))

    def row_slices(self) -> tuple[slice, ...]:
        """The rows of each span."""
        return self._row_slices
