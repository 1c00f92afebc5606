"""Everything that is wrong with a checkpoint folder, and everything that is there, however little it is.

The loader stops at the first thing it cannot use; a survey goes on. Only headers are read.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from k2hybrid.checkpoint.index import INDEX_NAME, ShardIndex
from k2hybrid.checkpoint.loader import MISSING, compare
from k2hybrid.checkpoint.mapped import MappedShard, map_shard
from k2hybrid.checkpoint.names import expected_tensors
from k2hybrid.checkpoint.spec import ModelSpec, read_config
from k2hybrid.errors import CheckpointError, HeaderError, ShardIndexError, SpecError
from k2hybrid.types import TensorRef


class ShardFacts(NamedTuple):
    """One file of the index. `nbytes` and `tensors` are 0 where it cannot be used; `fault` says why then."""

    name: str
    nbytes: int
    tensors: int
    fault: str | None


class Link(NamedTuple):
    """A file that is a symbolic link. `target` None: it leads nowhere, or in a circle."""

    name: str
    target: Path | None


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found in `folder`; the maps behind `tensors` live as long as this does.

    Attributes:
        spec: None if config.json cannot be used.
        tensors: name → where its bytes lie, of all shards that can be read.
        maps: file → its map.
        problems: one line for everything that is wrong.
        links: every file of the folder that is a link.
    """

    folder: Path
    spec: ModelSpec | None
    shards: tuple[ShardFacts, ...]
    tensors: dict[str, TensorRef]
    maps: dict[Path, MappedShard]
    problems: tuple[str, ...]
    links: tuple[Link, ...]

    @property
    def missing_shards(self) -> list[str]:
        """Files that the index names and that are not there."""
        return [shard.name for shard in self.shards if shard.fault == "missing"]


@dataclass(slots=True)
class _Shards:
    """What the index names, or without an index the shards that lie there."""

    facts: tuple[ShardFacts, ...]
    tensors: dict[str, TensorRef]
    maps: dict[Path, MappedShard]
    weight_map: dict[str, str]
    problems: dict[str, str]  # tensor → on what index and shards disagree


def survey(folder: Path) -> Survey:
    """Look at everything in `folder`.

    Raises:
        CheckpointError: it is no folder, or holds nothing of a checkpoint.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder")
    problems: list[str] = []
    spec = _spec(folder, problems)
    shards = _shards(folder, problems)
    if spec is None and not shards.facts and not os.path.lexists(folder / "config.json"):
        raise CheckpointError(f"{folder} holds no checkpoint: no config.json, no {INDEX_NAME}, no shards")
    for name, _, _, fault in shards.facts:
        if fault is not None:
            problems.append(fault if name in fault else f"{name}: {fault}")
    if spec is not None:
        problems += _tensor_problems(spec, shards)
    links = tuple(_links(folder))
    return Survey(folder, spec, shards.facts, shards.tensors, shards.maps, tuple(problems), links)


def _spec(folder: Path, problems: list[str]) -> ModelSpec | None:
    config = _config(folder / "config.json", problems)
    generation = folder / "generation_config.json"
    stop_ids = _config(generation, problems) if os.path.lexists(generation) else None
    try:
        return None if config is None else ModelSpec.from_config(config, stop_ids)
    except SpecError as error:
        head, *lines = str(error).splitlines()
        problems += [f"config.json: {line.removeprefix('  - ')}" for line in lines] or [head]
    return None


def _config(path: Path, problems: list[str]) -> dict[str, Any] | None:
    try:
        return read_config(path)
    except SpecError as error:
        problems.append(str(error))
    return None


def _shards(folder: Path, problems: list[str]) -> _Shards:
    faults: dict[str, str] = {}
    try:
        index = ShardIndex(folder, faults)
    except ShardIndexError as error:
        problems.append(str(error))
        return _without_index(folder)
    names = sorted(set(index.weight_map.values()))
    return _Shards(
        _facts(folder, names, faults, index.tensors, index.shards),
        index.tensors,
        index.shards,
        index.weight_map,
        index.problems,
    )


def _without_index(folder: Path) -> _Shards:
    faults: dict[str, str] = {}
    maps: dict[Path, MappedShard] = {}
    tensors: dict[str, TensorRef] = {}
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    for name in names:
        path = folder / name
        try:
            maps[path], entries = map_shard(path)
        except (ShardIndexError, HeaderError) as error:
            faults[name] = str(error)
            continue
        for entry in entries:
            address = maps[path].address + entry.offset
            tensors[entry.name] = TensorRef(
                entry.name, path, entry.offset, entry.nbytes, entry.dtype, entry.shape, address
            )
    return _Shards(_facts(folder, names, faults, tensors, maps), tensors, maps, {}, {})


def _facts(
    folder: Path,
    names: list[str],
    faults: dict[str, str],
    tensors: dict[str, TensorRef],
    maps: dict[Path, MappedShard],
) -> tuple[ShardFacts, ...]:
    counts = Counter(ref.path.name for ref in tensors.values())
    return tuple(
        ShardFacts(
            name, 0 if name in faults else maps[folder / name].bytes.size, counts[name], faults.get(name)
        )
        for name in names
    )


def _tensor_problems(spec: ModelSpec, shards: _Shards) -> list[str]:
    """As the loader compares them, but for tensors whose shard is at fault itself, or unknown."""
    faulty = {fact.name for fact in shards.facts if fact.fault is not None}
    found = {
        name: text
        for name, text in compare(expected_tensors(spec), shards.tensors).items()
        if text != MISSING or (shards.weight_map and shards.weight_map.get(name) not in faulty)
    }
    return sorted(f"{name}: {text}" for name, text in {**found, **shards.problems}.items())


def _links(folder: Path) -> list[Link]:
    """The links of `folder` itself, by name."""
    found = []
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if path.is_symlink():
            found.append(Link(name, path.resolve() if os.path.exists(path) else None))
    return found
