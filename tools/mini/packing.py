"""Examples packed into batches of one fixed shape, since the matrix library compiles a kernel per shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tools.mini.render import Example

STEP = 32
WANTED_STEP = 256
MAX_EXAMPLE = 1024
IGNORED = -100


@dataclass
class Batch:
    """Documents end to end; `labels[i]` is the token after position `wanted[i]`, or IGNORED for padding."""

    ids: Tensor
    lengths: list[int]
    wanted: Tensor
    labels: Tensor

    @property
    def n_learnt(self) -> int:
        return int((self.labels != IGNORED).sum())


def pack(examples: list[Example], pad_id: int, size: int | None = None) -> Batch:
    """Lay `examples` end to end, each padded to a multiple of 32, and pad up to `size` tokens."""
    ids: list[int] = []
    lengths: list[int] = []
    wanted: list[int] = []
    labels: list[int] = []
    for example in examples:
        start = len(ids)
        length = -(-len(example.ids) // STEP) * STEP
        ids += example.ids + [pad_id] * (length - len(example.ids))
        lengths.append(length)
        for at in range(1, len(example.ids)):
            if example.learn[at]:
                wanted.append(start + at - 1)
                labels.append(example.ids[at])
    while size is not None and len(ids) < size:
        lengths.append(min(STEP * 4, size - len(ids)))
        ids += [pad_id] * lengths[-1]
    missing = -len(wanted) % WANTED_STEP
    return Batch(
        torch.tensor(ids),
        lengths,
        torch.tensor(wanted + [0] * missing),
        torch.tensor(labels + [IGNORED] * missing),
    )


class Packer:
    """Fills batches first-fit from a small waiting list."""

    def __init__(self, draw: Callable[[], Example], pad_id: int, size: int) -> None:
        self.draw, self.pad_id, self.size = draw, pad_id, size
        self.waiting: list[Example] = []

    def next(self) -> Batch:
        chosen: list[Example] = []
        room = self.size
        while room >= STEP:
            while len(self.waiting) < 24:
                example = self.draw()
                if len(example.ids) <= MAX_EXAMPLE:
                    self.waiting.append(example)
            fit = next((i for i, e in enumerate(self.waiting) if -(-len(e.ids) // STEP) * STEP <= room), None)
            if fit is None:
                break
            chosen.append(self.waiting.pop(fit))
            room -= -(-len(chosen[-1].ids) // STEP) * STEP
        return pack(chosen, self.pad_id, self.size)
