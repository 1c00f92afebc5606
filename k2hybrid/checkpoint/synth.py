"""Random checkpoints in the published layout, at any size, written without holding them in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from k2hybrid.checkpoint.index import INDEX_NAME
from k2hybrid.checkpoint.names import ExpectedTensor, TensorKey, expected_tensors
from k2hybrid.checkpoint.noise import content
from k2hybrid.checkpoint.presets import changed_config
from k2hybrid.checkpoint.shard_writer import ShardTensor, write_shard
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.checkpoint.vocab import (
    SPECIAL_COUNT,
    format_ranks,
    generated_ranks,
    read_ranks,
    tokenizer_config,
)
from k2hybrid.config import MINI_MODEL
from k2hybrid.errors import CheckpointError

TEMPLATE_NAME = "chat_template.jinja"

# One MoE layer of K2 with its attention, shared expert and weight_shape tensors has 9,808,554,496 bytes.
SHARD_BYTES = 9_810_000_000
_SPARE_BYTES = 64 << 20  # headers, index and tokenizer files (K2 at full size: 50 MB)

_Group = list[ExpectedTensor]


def synthesize(
    out: Path,
    like: str = "kimi-k2-thinking",
    overrides: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    vocab: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    shape_dtype: str = "I32",
    progress: bool = False,
) -> ModelSpec:
    """Write a random checkpoint into the new or empty folder `out`; the same arguments give the same bytes.

    Args:
        like: name of a preset; `overrides` changes its sizes (short names or keys of config.json).
        vocab: a tiktoken file to use as it is; None: a vocabulary of `vocab_size` is generated.
        shard_bytes: largest data part of a shard (a single larger tensor gets a shard of its own).
        shape_dtype: of the `weight_shape` tensors; both I32 and I64 have been published.
        progress: show a bar on stderr.

    Raises:
        SpecError: the sizes contradict each other.
        TokenizerError: `vocab` is malformed.
        CheckpointError: `out` is not empty, the disk is too small, or `seed` negative.
    """
    if seed < 0:
        raise CheckpointError(f"a seed is a number from 0 on, not {seed}")
    ranks = read_ranks(vocab) if vocab is not None else None
    config = changed_config(like, overrides or {}, None if ranks is None else len(ranks))
    spec = ModelSpec.from_config(config)
    if ranks is None:
        ranks = generated_ranks(spec.vocab_size - SPECIAL_COUNT)
    total_bytes = sum(_sized(tensor, shape_dtype).nbytes for tensor in expected_tensors(spec))
    try:
        _prepare(out, total_bytes)
        _write_small_files(out, config, spec, ranks)
        with tqdm(total=total_bytes, unit="B", unit_scale=True, disable=not progress) as bar:
            _write_shards(out, spec, seed, shard_bytes, shape_dtype, total_bytes, bar.update)
    except OSError as problem:
        raise CheckpointError(f"{out} cannot be written: {problem}") from problem
    return spec


def _prepare(out: Path, total_bytes: int) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not empty; remove it or choose another folder")
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < total_bytes + _SPARE_BYTES:
        raise CheckpointError(
            f"{out} needs {(total_bytes + _SPARE_BYTES) / 1e9:.1f} GB; only {free_bytes / 1e9:.1f} GB are "
            "free there; choose another disk or smaller sizes"
        )
    out.mkdir(parents=True, exist_ok=True)


def _write_small_files(out: Path, config: Mapping[str, Any], spec: ModelSpec, ranks: list[bytes]) -> None:
    _write_json(out / "config.json", config)
    eos = spec.eos_token_ids[0]
    _write_json(out / "generation_config.json", {"eos_token_id": eos, "max_length": spec.max_positions})
    _write_json(out / "tokenizer_config.json", tokenizer_config(len(ranks)))
    (out / "tiktoken.model").write_bytes(format_ranks(ranks))
    shutil.copyfile(MINI_MODEL / TEMPLATE_NAME, out / TEMPLATE_NAME)  # renders what the published one does


def _write_shards(
    out: Path,
    spec: ModelSpec,
    seed: int,
    shard_bytes: int,
    shape_dtype: str,
    total_bytes: int,
    written: Callable[[int], object],
) -> None:
    shards = list(_dealt(spec, shard_bytes, shape_dtype))
    weight_map: dict[str, str] = {}
    for number, group in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        by_name = {tensor.name: tensor for tensor in group}

        def pieces(tensor: ShardTensor, by_name: Mapping[str, ExpectedTensor] = by_name) -> Iterable[Any]:
            expected = by_name[tensor.name]
            if expected.key.role.endswith(".shape"):
                return [
                    np.array(_matrix_shape(spec, expected.key), "<i4" if tensor.dtype == "I32" else "<i8")
                ]
            return content(expected, seed)

        write_shard(out / file, [_sized(tensor, shape_dtype) for tensor in group], pieces, written)
        weight_map.update(dict.fromkeys(by_name, file))
    # Last, so that a folder whose writing was interrupted is not taken for a checkpoint.
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(out / INDEX_NAME, index)


def _dealt(spec: ModelSpec, shard_bytes: int, shape_dtype: str) -> Iterator[_Group]:
    """The tensors dealt to shards in the order of the model; a layer is split only if it fits no shard."""
    shard: _Group = []
    used_bytes = 0
    for layer in _by_layer(expected_tensors(spec)):
        layer_bytes = sum(_sized(tensor, shape_dtype).nbytes for tensor in layer)
        if shard and used_bytes + layer_bytes > shard_bytes:
            yield shard
            shard, used_bytes = [], 0
        for tensor in layer:
            nbytes = _sized(tensor, shape_dtype).nbytes
            if shard and used_bytes + nbytes > shard_bytes:
                yield shard
                shard, used_bytes = [], 0
            shard.append(tensor)
            used_bytes += nbytes
    yield shard


def _by_layer(tensors: Iterable[ExpectedTensor]) -> Iterator[_Group]:
    group: _Group = []
    for tensor in tensors:
        if group and group[-1].key.layer != tensor.key.layer:
            yield group
            group = []
        group.append(tensor)
    yield group


def _sized(tensor: ExpectedTensor, shape_dtype: str) -> ShardTensor:
    dtype = shape_dtype if len(tensor.dtypes) > 1 else tensor.dtypes[0]
    return ShardTensor(tensor.name, dtype, tensor.shape)


def _matrix_shape(spec: ModelSpec, key: TensorKey) -> tuple[int, int]:
    shape = spec.moe_intermediate_size, spec.hidden_size
    return shape[::-1] if key.role.startswith("expert_down") else shape


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
