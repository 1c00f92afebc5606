"""Lessons packed into batches of one fixed size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tools.mini.declared import Guides
from tools.mini.pieces import Example

MAX_TOKENS = 2048
IGNORED = -100
# In bfloat16 the matrix library compiles a kernel per shape: learnt rows come in multiples of this.
WANTED_STEP = 256


@dataclass
class Lesson:
    """Branches that each continue one prefix, which is computed once for all, and do not see each other."""

    prefix: list[int]
    branches: list[Example]
    guides: Guides = field(default_factory=dict)  # of the prefix


@dataclass(frozen=True)
class Segment:
    """A run of tokens; `after` is the segment that it continues, None for a prefix or a plain document."""

    length: int
    after: int | None = None
    guides: Guides = field(default_factory=dict, compare=False)


@dataclass
class Batch:
    """Segments end to end; `labels[i]` is the token after position `wanted[i]`, or IGNORED for padding."""

    ids: Tensor
    positions: Tensor
    segments: list[Segment]
    wanted: Tensor
    labels: Tensor

    @property
    def n_learnt(self) -> int:
        return int((self.labels != IGNORED).sum())


def pack(lessons: list[Lesson], pad_id: int, size: int | None = None) -> Batch:
    """Lay `lessons` end to end and pad up to `size` tokens."""
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    wanted: list[int] = []
    labels: list[int] = []
    for lesson in lessons:
        after = None
        if lesson.prefix:
            after = len(segments)
            segments.append(Segment(len(lesson.prefix), None, lesson.guides))
            ids += lesson.prefix
            positions += range(len(lesson.prefix))
        for branch in lesson.branches:
            start, n = len(ids), len(branch.ids)
            segments.append(Segment(n, after, branch.guides))
            ids += branch.ids
            positions += range(len(lesson.prefix), len(lesson.prefix) + n)
            learnt = [at for at in range(1, n) if branch.learn[at]]
            wanted += [start + at - 1 for at in learnt]
            labels += [branch.ids[at] for at in learnt]
    if size is not None and len(ids) < size:
        missing = size - len(ids)
        segments.append(Segment(missing))
        ids += [pad_id] * missing
        positions += range(missing)
    missing = -len(wanted) % WANTED_STEP
    return Batch(
        torch.tensor(ids),
        torch.tensor(positions),
        segments,
        torch.tensor(wanted + [0] * missing, dtype=torch.long),
        torch.tensor(labels + [IGNORED] * missing, dtype=torch.long),
    )


class Packer:
    """Fills batches first-fit from a small waiting list; the rest of a lesson waits for the next batch."""

    def __init__(self, draw: Callable[[], Lesson], pad_id: int, size: int) -> None:
        self.draw, self.pad_id, self.size = draw, pad_id, size
        self.waiting: list[Lesson] = []

    def next(self) -> Batch:
        chosen: list[Lesson] = []
        room = self.size
        while True:
            while len(self.waiting) < 12:
                # A lesson that no batch can hold would wait for ever.
                if (drawn := _within_limit(self.draw(), min(MAX_TOKENS, self.size))).branches:
                    self.waiting.append(drawn)
            fit = next((i for i, lesson in enumerate(self.waiting) if _fitting(lesson, room)), None)
            if fit is None:
                break
            lesson = self.waiting.pop(fit)
            count = _fitting(lesson, room)
            part = Lesson(lesson.prefix, lesson.branches[:count], lesson.guides)
            if lesson.branches[count:]:
                self.waiting.insert(0, Lesson(lesson.prefix, lesson.branches[count:], lesson.guides))
            chosen.append(part)
            room -= len(part.prefix) + sum(len(b.ids) for b in part.branches)
        return pack(chosen, self.pad_id, self.size)


def _within_limit(lesson: Lesson, limit: int) -> Lesson:
    room = limit - len(lesson.prefix)
    return Lesson(lesson.prefix, [b for b in lesson.branches if len(b.ids) <= room], lesson.guides)


def _fitting(lesson: Lesson, room: int) -> int:
    """How many branches of `lesson` fit into `room` tokens beside its prefix."""
    room -= len(lesson.prefix)
    count = 0
    for branch in lesson.branches:
        room -= len(branch.ids)
        if room < 0:
            break
        count += 1
    return count
