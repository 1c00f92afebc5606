"""`k2hybrid inspect`: what a checkpoint holds, by role, layer and shard; and what it lacks."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from k2hybrid.checkpoint.content import Content, content_of
from k2hybrid.checkpoint.hub import locate
from k2hybrid.checkpoint.origin import how_to_resume
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.checkpoint.survey import Survey, survey

_PROBLEMS_SHOWN = 20


def inspect(args: argparse.Namespace) -> int:
    """Print what the model holds; 1 if something is missing or wrong. CheckpointError if there is nothing."""
    from k2hybrid.cli import print_rows

    found = survey(locate(args.model))
    content = content_of(found)
    if found.spec is not None:
        print_rows(spec_rows(found.spec))
        print()
    _print_lines(role_table(content))
    _print_lines(layer_table(content))
    _print_lines(shard_table(found))
    _print_lines(alignment_lines(content))
    if args.experts:
        _print_lines(expert_table(content))
    _print_lines([f"{link.name} -> {link.target or 'nowhere'}" for link in found.links])
    if args.json is not None:
        args.json.write_text(json.dumps(as_json(found, content), indent=1) + "\n", "utf-8")
    if not found.problems:
        return 0
    _print_problems(found)
    return 1


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


def role_table(content: Content) -> list[str]:
    """Tensor count, bytes and share by role."""
    if not content.roles:
        return []
    total = content.total
    lines = [f"{'role':<28}{'tensors':>9}{'bytes':>18}{'share':>8}"]
    for role, size in [*content.roles.items(), ("all", total)]:
        lines.append(f"{role:<28}{size.tensors:>9,}{size.nbytes:>18,}{size.nbytes / total.nbytes:>8.2%}")
    return lines


def layer_table(content: Content) -> list[str]:
    """Bytes by layer; neighbours of the same size share a line."""
    if not content.layers:
        return []
    lines = [f"{'layers':<14}{'dense bytes':>18}{'expert bytes':>18}   each"]
    for first, last, size in content.layer_runs():
        name = str(first) if first == last else f"{first}–{last}"
        lines.append(f"{name:<14}{size.dense_bytes:>18,}{size.expert_bytes:>18,}")
    experts = sum(size.expert_bytes for size in content.layers.values())
    return [*lines, f"{'routed experts in all':<32}{experts:>18,}"]


def shard_table(found: Survey) -> list[str]:
    """Every shard with its tensors and bytes, or why it cannot be used."""
    if not found.shards:
        return []
    width = max(len(shard.name) for shard in found.shards)
    lines = [f"{'shard':<{width}}{'tensors':>9}{'bytes':>18}"]
    for shard in found.shards:
        what = f"{shard.tensors:>9,}{shard.nbytes:>18,}" if shard.fault is None else f"  {shard.fault}"
        lines.append(f"{shard.name:<{width}}{what}")
    return lines


def alignment_lines(content: Content) -> list[str]:
    """How many expert matrices have rows that all start at multiples of so many bytes of the file."""
    return [
        f"rows of {part} start at multiples of "
        + ", ".join(f"{align} B: {count:,} matrices" for align, count in sorted(counts.items()))
        for part, counts in content.alignments.items()
    ]


def expert_table(content: Content) -> list[str]:
    """Every routed expert: where it lies."""
    if not content.experts:
        return []
    lines = [f"{'layer':>5}{'expert':>8}{'tensors':>9}{'bytes':>14}  from byte … of file"]
    for (layer, expert), place in content.experts.items():
        where = ", ".join(f"{begin:,} {file}" for file, begin in place.begins.items())
        lines.append(f"{layer:>5}{expert:>8}{place.tensors:>9}{place.nbytes:>14,}  {where}")
    return lines


def as_json(found: Survey, content: Content) -> dict[str, Any]:
    """All that is printed, and every problem."""
    return {
        "model": str(found.folder),
        "spec": None if found.spec is None else dataclasses.asdict(found.spec),
        "roles": {name: size._asdict() for name, size in content.roles.items()},
        "layers": {str(layer): size._asdict() for layer, size in content.layers.items()},
        "shards": [shard._asdict() for shard in found.shards],
        "expert_row_alignments": content.alignments,
        "experts": [
            {"layer": layer, "expert": expert, **place._asdict()}
            for (layer, expert), place in content.experts.items()
        ],
        "links": {link.name: None if link.target is None else str(link.target) for link in found.links},
        "problems": found.problems,
    }


def _print_lines(lines: Iterable[str]) -> None:
    """A block, with an empty line behind it."""
    printed = False
    for line in lines:
        print(line)
        printed = True
    if printed:
        print()


def _print_problems(found: Survey) -> None:
    problems: Sequence[str] = found.problems
    for line in problems[:_PROBLEMS_SHOWN]:
        print(line)
    if len(problems) > _PROBLEMS_SHOWN:
        print(f"… and {len(problems) - _PROBLEMS_SHOWN} more")
    missing = found.missing_shards
    lacks = f", {len(missing)} of {len(found.shards)} shards missing" if missing else ""
    resume = f"; finish the download{how_to_resume(found.folder)}" if missing else ""
    print(
        f"k2hybrid inspect: {found.folder} is not whole: {len(problems)} problems{lacks}{resume}",
        file=sys.stderr,
    )
