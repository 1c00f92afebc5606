"""`model.safetensors.index.json` and the shards it names: every tensor of a folder, found and mapped."""

from __future__ import annotations

import os
import re
from pathlib import Path

from k2hybrid.checkpoint.mapped import MappedShard, map_shard
from k2hybrid.checkpoint.origin import how_to_resume
from k2hybrid.checkpoint.strict_json import parse_object, read_bounded, show
from k2hybrid.errors import HeaderError, ShardIndexError
from k2hybrid.types import TensorRef

INDEX_NAME = "model.safetensors.index.json"
_LIMIT_BYTES = 256 << 20  # K2's index has about 27 MB
_MAX_SHARDS = 4096

# A plain name: no separator, no "..", so nothing outside the folder is ever opened through the index.
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")


class ShardIndex:
    """All tensors of a checkpoint folder.

    Attributes:
        tensors: name → where its bytes lie.
        shards: file → its map; owns the maps.
        problems: name → why, for tensors on which index and shards disagree, or that lie in two shards.
        weight_map: name → file, as the index has it.
    """

    def __init__(self, model_dir: Path, faults: dict[str, str] | None = None) -> None:
        """Read the index, then map every shard it names.

        Args:
            faults: collects shards that are missing or unusable, file → why; None: the first one raises.

        Raises:
            ShardIndexError: the index is unreadable or names impossible files, or shards are missing.
            HeaderError: a shard is truncated, or its header lies.
        """
        self.weight_map = weight_map = read_weight_map(model_dir / INDEX_NAME)
        missing, names = missing_shards(model_dir, weight_map)
        if missing and faults is None:
            raise ShardIndexError(lacking(model_dir, missing, len(names)))
        self.tensors: dict[str, TensorRef] = {}
        self.shards: dict[Path, MappedShard] = {}
        self.problems: dict[str, str] = {}
        for name in names:
            try:
                self._add(model_dir / name, weight_map)
            except (ShardIndexError, HeaderError) as error:
                if faults is None:
                    raise
                faults[name] = "missing" if name in missing else str(error)
        for name in weight_map.keys() - self.tensors.keys():
            if not faults or weight_map[name] not in faults:
                self.problems[plain(name)] = f"missing; the index places it in {weight_map[name]}"

    def _add(self, path: Path, weight_map: dict[str, str]) -> None:
        shard, entries = map_shard(path)
        self.shards[path] = shard
        address, file, tensors, problems = shard.address, path.name, self.tensors, self.problems
        for name, dtype, shape, offset, nbytes in entries:
            listed = weight_map.get(name)
            if name in tensors:
                problems[plain(name)] = f"duplicated, in {tensors[name].path.name} and {file}"
                continue
            if listed is None:
                problems[plain(name)] = f"extra; in {file}, but not in the index"
            elif listed != file:
                problems[plain(name)] = f"the index places it in {listed}, but it is in {file}"
            tensors[name] = TensorRef(name, path, offset, nbytes, dtype, shape, address + offset)


def plain(name: str) -> str:
    """A tensor name for a message: as it is, or escaped and bounded where it is no plain ASCII."""
    return name if name.isascii() and name.isprintable() and len(name) <= 200 else show(name)


def missing_shards(model_dir: Path, weight_map: dict[str, str]) -> tuple[list[str], list[str]]:
    """(files of the index that are not there, all its files), sorted; a dangling link is not there."""
    names = sorted(set(weight_map.values()))
    return [name for name in names if not os.path.exists(model_dir / name)], names


def lacking(model_dir: Path, missing: list[str], count: int) -> str:
    """The message that `missing` of `count` shards are not there, with the command that fetches them."""
    return (
        f"{model_dir} lacks {len(missing)} of {count} shards: {', '.join(missing[:8])}"
        f"{' …' if len(missing) > 8 else ''}; finish the download{how_to_resume(model_dir)}"
    )


def read_weight_map(path: Path) -> dict[str, str]:
    """The index at `path`: tensor → file beside it.

    Raises:
        ShardIndexError: unreadable, no index, or it names files that cannot be shards.
    """
    index = parse_object(read_bounded(path, _LIMIT_BYTES, ShardIndexError), str(path), ShardIndexError)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ShardIndexError(f"{path} has no weight_map")
    files = set()
    for name, file in weight_map.items():
        if type(file) is not str:
            raise ShardIndexError(f"{path} places {show(name)} in {show(file)}, which is no file name")
        files.add(file)
    for file in files:
        if not _SHARD_NAME.fullmatch(file):
            raise ShardIndexError(
                f"{path} names the file {show(file)}; a shard lies beside the index and is named like "
                "model-00001-of-000062.safetensors"
            )
    if len(files) > _MAX_SHARDS:
        raise ShardIndexError(f"{path} names {len(files)} shards; more than {_MAX_SHARDS} is not plausible")
    return weight_map
