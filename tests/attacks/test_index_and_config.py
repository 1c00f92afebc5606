"""Hostile index and configuration files."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from k2hybrid.errors import CheckpointError, ShardIndexError, SpecError, TensorError

NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "file",
    [
        "../model.safetensors",
        "/etc/passwd",
        "/etc/passwd.safetensors",
        "sub/model.safetensors",
        "..",
        ".",
        "",
        ".safetensors",
        "..safetensors",
        "model.bin",
        "a\\b.safetensors",
        "a\0.safetensors",
        "a\n.safetensors",
        "model.safetensors\n",
        "ä.safetensors",
        "\ud800.safetensors",
        "a" * 300 + ".safetensors",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_index_names_no_file_outside_the_folder(target: Any, file: Any) -> None:
    outside = target.folder.parent / "model.safetensors"
    shutil.copyfile(target.shard, outside)
    target.edit_index(lambda fields: fields["weight_map"].update({NORM: file}))
    with pytest.raises(ShardIndexError, match=r"names the file|no file name"):
        target.open()


def test_a_link_to_a_file_elsewhere_is_followed(target: Any) -> None:
    """As download caches lay out a folder: links to blobs. The link is the owner's, not the index's."""
    shard, blob = target.shard, target.folder.parent / "blob"
    good = target.open()
    shard.rename(blob)
    shard.symlink_to(blob)
    assert target.open() == good


def test_missing_shards_are_listed(target: Any) -> None:
    target.edit_index(
        lambda fields: fields["weight_map"].update({NORM: "b.safetensors", "lm_head.weight": "a.safetensors"})
    )
    with pytest.raises(ShardIndexError, match=r"lacks 2 of 3 shards: a\.safetensors, b\.safetensors"):
        target.open()


def test_a_tensor_in_two_shards(target: Any) -> None:
    other = target.folder / "model-00002-of-000002.safetensors"
    shutil.copyfile(target.shard, other)
    target.edit_index(lambda fields: fields["weight_map"].update({NORM: other.name}))
    with pytest.raises(TensorError) as caught:
        target.open()
    count = len(json.loads(target.index.read_text())["weight_map"])
    assert len(caught.value.problems) == count
    assert (
        f"{NORM}: duplicated, in model-00001-of-000001.safetensors and {other.name}" in caught.value.problems
    )


def test_index_and_shard_disagree(target: Any) -> None:
    def change(fields: dict[str, Any]) -> None:
        del fields["weight_map"]["lm_head.weight"]
        fields["weight_map"]["ghost"] = target.shard.name

    target.edit_index(change)
    with pytest.raises(TensorError) as caught:
        target.open()
    assert caught.value.problems == (
        "ghost: missing; the index places it in model-00001-of-000001.safetensors",
        "lm_head.weight: extra; in model-00001-of-000001.safetensors, but not in the index",
    )


def test_other_files_in_the_folder_do_no_harm(target: Any) -> None:
    good = target.open()
    (target.folder / "consolidated.safetensors").write_bytes(b"no shard of this checkpoint")
    (target.folder / "modeling_kimi.py").write_text("raise SystemExit('code of a checkpoint ran')")
    assert target.open() == good


BROKEN_JSON = [
    b"",
    b"null",
    b"[]",
    b'"text"',
    b"{",
    b"{}",
    b"\xff\xfe{}",
    b"\xef\xbb\xbf{}",
    b'{"a": NaN}',
    b'{"a": 1, "a": 1}',
    b'{"a": ' + b"9" * 5000 + b"}",
    b'{"a": ' + b"[" * 200_000,
    b'{"a": ' * 200_000,
    b"{" + b" " * 20_000_000 + b"}",
]


@pytest.mark.parametrize("content", BROKEN_JSON, ids=range(len(BROKEN_JSON)))
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_broken_json(target: Any, file: str, content: bytes) -> None:
    (target.folder / file).write_bytes(content)
    if file == "generation_config.json" and content == b"{}":
        assert target.open()
        return
    with pytest.raises(ShardIndexError if "index" in file else SpecError):
        target.open()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_missing_or_no_file(target: Any, file: str) -> None:
    path: Path = target.folder / file
    path.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        target.open()
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"cannot be read|not a regular file"):
        target.open()
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        target.open()
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="not a regular file"):
        target.open()


def test_no_folder(target: Any) -> None:
    target.folder = target.folder / "nowhere"
    with pytest.raises(SpecError, match="is missing"):
        target.open()


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", [["a", "b"]], 3])
def test_weight_map_is_no_map(target: Any, weight_map: Any) -> None:
    target.edit_index(lambda fields: fields.update(weight_map=weight_map))
    with pytest.raises(ShardIndexError, match="no weight_map"):
        target.open()


def test_thousands_of_shards(target: Any) -> None:
    files = {f"t{i}": f"{i}.safetensors" for i in range(5000)}
    target.edit_index(lambda fields: fields.update(weight_map=files))
    with pytest.raises(ShardIndexError, match="not plausible"):
        target.open()


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_flipped_bits(target: Any, file: str) -> None:
    """One bit of every byte: a named error, or a model whose experts lie where they lay."""
    good = target.open()
    path = target.folder / file
    content = path.read_bytes()
    rng = random.Random(1)
    refused = 0
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            assert target.open() == good
        except CheckpointError:
            refused += 1
    assert refused > len(content) // 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 64),
        ("hidden_size", 1 << 17),
        ("vocab_size", 513),
        ("n_routed_experts", 2),
        ("n_routed_experts", 65536),
        ("num_hidden_layers", 2),
        ("num_hidden_layers", 4096),
        ("first_k_dense_replace", 1),
        ("num_attention_heads", 2),
        ("kv_lora_rank", 6),
        ("q_lora_rank", 8),
        ("moe_intermediate_size", 64),
        ("n_shared_experts", 2),
    ],
)
def test_a_configuration_of_another_model(target: Any, key: str, value: int) -> None:
    path = target.folder / "config.json"
    config = json.loads(path.read_text()) | {key: value}
    if key == "num_attention_heads":
        config["num_key_value_heads"] = value
    path.write_text(json.dumps(config))
    with pytest.raises(TensorError) as caught:
        target.open()
    assert caught.value.problems
    assert len(str(caught.value)) < 10_000  # the message stays readable however much is wrong


@pytest.mark.parametrize("value", [0, -1, 1 << 31, 1 << 63, 1 << 64, 1e308, 2.0, "64", None, True, [], {}])
@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "n_routed_experts",
        "kv_lora_rank",
        "qk_rope_head_dim",
    ],
)
def test_impossible_sizes(target: Any, key: str, value: Any) -> None:
    path = target.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(SpecError, match=key):
        target.open()
