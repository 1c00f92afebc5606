"""What the tensors of a checkpoint add up to: by role, layer and expert; and where experts' rows start."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from k2hybrid.checkpoint.names import expected_tensors
from k2hybrid.checkpoint.survey import Survey
from k2hybrid.types import TensorRef

PAGE_BYTES = 4096  # the most that is of use: direct reads and pages
_SHAPE_ROLE = "expert weight_shape"


class Size(NamedTuple):
    """Of some tensors together."""

    tensors: int
    nbytes: int


class LayerSize(NamedTuple):
    """Of one layer: routed experts, and everything else."""

    dense_bytes: int
    expert_bytes: int


class ExpertPlace(NamedTuple):
    """One routed expert. `begins`: file → byte of the first of its tensors there."""

    tensors: int
    nbytes: int
    begins: dict[str, int]


@dataclass(frozen=True, slots=True)
class Content:
    """Sums over the tensors that are there and that the model has; all empty without a config.json.

    Attributes:
        alignments: "packed" and "scale" → the largest power of two, up to 4096, that divides where every row
            of a matrix starts in its file → number of such matrices.
        experts: (layer, expert) → where it lies.
    """

    roles: dict[str, Size]
    layers: dict[int, LayerSize]
    alignments: dict[str, dict[int, int]]
    experts: dict[tuple[int, int], ExpertPlace]

    @property
    def total(self) -> Size:
        """Of all roles."""
        sizes = self.roles.values()
        return Size(sum(size.tensors for size in sizes), sum(size.nbytes for size in sizes))

    def layer_runs(self) -> Iterator[tuple[int, int, LayerSize]]:
        """(first, last, size of each) of neighbouring layers of one size."""
        for size, run in itertools.groupby(self.layers.items(), key=lambda item: item[1]):
            layers = [layer for layer, _ in run]
            yield layers[0], layers[-1], size


def content_of(found: Survey) -> Content:
    """Add up what `found` has."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    dense: Counter[int] = Counter()
    routed: Counter[int] = Counter()
    alignments: dict[str, Counter[int]] = {"packed": Counter(), "scale": Counter()}
    experts: dict[tuple[int, int], ExpertPlace] = {}
    for name, (layer, full_role, expert), _, _ in () if found.spec is None else expected_tensors(found.spec):
        ref = found.tensors.get(name)
        if ref is None:
            continue
        part = full_role.rpartition(".")[2]
        role = _SHAPE_ROLE if part == "shape" else full_role
        counts[role] += 1
        sizes[role] += ref.nbytes
        if layer is None:
            continue
        (dense if expert is None else routed)[layer] += ref.nbytes
        if expert is not None:
            experts[layer, expert] = _with(experts.get((layer, expert)), ref)
            if part in alignments and len(ref.shape) == 2:
                alignments[part][_row_alignment(ref)] += 1
    return Content(
        {role: Size(counts[role], sizes[role]) for role in counts},
        {layer: LayerSize(dense[layer], routed[layer]) for layer in sorted({*dense, *routed})},
        {part: dict(found_at) for part, found_at in alignments.items() if found_at},
        experts,
    )


def _with(place: ExpertPlace | None, ref: TensorRef) -> ExpertPlace:
    begins = {} if place is None else place.begins
    begins[ref.path.name] = min(ref.offset, begins.get(ref.path.name, ref.offset))
    tensors, nbytes = (0, 0) if place is None else place[:2]
    return ExpertPlace(tensors + 1, nbytes + ref.nbytes, begins)


def _row_alignment(ref: TensorRef) -> int:
    """The largest power of two that divides the offset of every row."""
    row_bytes = ref.nbytes // ref.shape[0] if len(ref.shape) == 2 and ref.shape[0] > 1 else 0
    steps = ref.offset | row_bytes | PAGE_BYTES
    return steps & -steps
