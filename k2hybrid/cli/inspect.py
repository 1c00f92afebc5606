"""`k2hybrid inspect`: validate a checkpoint, then show its sizes, and its tensors by role."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from k2hybrid.checkpoint.loader import open_checkpoint
from k2hybrid.checkpoint.names import expected_tensors
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.types import ExpertRef

_ITEM_BYTES = {"BF16": 2, "F32": 4, "I32": 4}


class _Counted:
    """An ExpertSink that keeps nothing."""

    def add_expert(self, layer: int, expert: int, ref: ExpertRef) -> None:
        """The loader has checked it; that was the purpose."""


def inspect(model_dir: Path) -> int:
    """Print what `model_dir` holds. CheckpointError names what is wrong with it."""
    from k2hybrid.cli import print_rows

    with open_checkpoint(model_dir, _Counted()) as checkpoint:
        spec = checkpoint.spec
        print_rows(spec_rows(spec))
        print()
        for line in role_table(spec, checkpoint.total_bytes):
            print(line)
        ignored = checkpoint.ignored_shapes
    if ignored:
        print(f"\n{ignored} weight_shape tensors disagree with their matrices; they are not relied on")
    return 0


def spec_rows(spec: ModelSpec) -> list[tuple[str, str]]:
    """(field, value) of the model's sizes; fields of YaRN on rows of their own."""
    rows = []
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if dataclasses.is_dataclass(value):
            rows += [
                (f"{field.name}.{f.name}", str(getattr(value, f.name))) for f in dataclasses.fields(value)
            ]
        else:
            rows.append((field.name, str(value)))
    return rows


def role_table(spec: ModelSpec, total_bytes: int) -> Sequence[str]:
    """Tensor count, bytes and share by role. weight_shape has what the other roles leave over."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for tensor in expected_tensors(spec):
        role = tensor.key.role
        if role.endswith(".shape"):  # 32- or 64-bit, as the files have it
            role = "expert weight_shape"
        else:
            sizes[role] += math.prod(tensor.shape) * _ITEM_BYTES[tensor.dtypes[0]]
        counts[role] += 1
    if counts["expert weight_shape"]:
        sizes["expert weight_shape"] = total_bytes - sizes.total()
    lines = [f"{'role':<28}{'tensors':>9}{'bytes':>18}{'share':>8}"]
    for role, count in counts.items():
        lines.append(f"{role:<28}{count:>9,}{sizes[role]:>18,}{sizes[role] / total_bytes:>8.2%}")
    lines.append(f"{'all':<28}{counts.total():>9,}{total_bytes:>18,}{1:>8.2%}")
    return lines
