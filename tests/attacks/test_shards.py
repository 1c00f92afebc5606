"""Hostile shards: whatever a file claims, opening it ends in a named error or in the same tensors."""

from __future__ import annotations

import json
import os
import random
import re
from typing import Any

import pytest

from k2hybrid.checkpoint.header import parse_header
from k2hybrid.errors import CheckpointError, HeaderError, ShardIndexError, TensorError

NORM = "model.norm.weight"
PACKED = "model.layers.0.mlp.experts.0.gate_proj.weight_packed"


def test_the_target_is_good(target: Any) -> None:
    assert len(target.open()) == 6


def test_every_flipped_header_bit(target: Any) -> None:
    """All bits of the JSON: refused, or other entries (which the loader compares), or other metadata."""
    header, data = target.split()
    total = 8 + len(header) + len(data)
    good = parse_header(header, total, "good")
    outcomes = {"refused": 0, "different": 0, "same": 0}
    for position in range(len(header)):
        for bit in range(8):
            flipped = bytearray(header)
            flipped[position] ^= 1 << bit
            try:
                entries = parse_header(bytes(flipped), total, "flipped")
            except HeaderError:
                outcomes["refused"] += 1
                continue
            if entries == good:
                assert header[:position].count(b"}") == 0, "only the metadata, which comes first, may vary"
                outcomes["same"] += 1
            else:
                outcomes["different"] += 1
    assert outcomes["refused"] > outcomes["different"] > outcomes["same"] > 0


def test_flipped_bits_of_the_file(target: Any) -> None:
    """One bit of every byte before the data, through the whole loader: a named error or the same tensors."""
    good = target.open()
    content = target.shard.read_bytes()
    header, _ = target.split()
    rng = random.Random(0)
    harmless = 0
    for position in range(8 + len(header)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.randrange(8)
        target.shard.write_bytes(flipped)
        try:
            assert target.open() == good
            harmless += 1
        except (HeaderError, TensorError):
            continue
    assert 0 < harmless < 40  # "__metadata__":{"format":"pt"}


def test_every_truncation(target: Any) -> None:
    content = target.shard.read_bytes()
    header, _ = target.split()
    start = 8 + len(header)
    lengths = {
        *range(0, start, 7),
        *range(start - 4, start + 4),
        *range(start, len(content), 97),
        len(content) - 1,
    }
    for length in sorted(lengths):
        target.shard.write_bytes(content[:length])
        with pytest.raises(HeaderError, match="truncated"):
            target.open()


def test_bytes_after_the_last_tensor(target: Any) -> None:
    with target.shard.open("ab") as file:
        file.write(b"\0" * 8)
    with pytest.raises(HeaderError, match="belong to no tensor"):
        target.open()


@pytest.mark.parametrize(
    "length", [0, 1, 2, 100_000_001, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
)
def test_header_length_lies(target: Any, length: int) -> None:
    content = target.shard.read_bytes()
    target.shard.write_bytes(length.to_bytes(8, "little") + content[8:])
    with pytest.raises(HeaderError):
        target.open()


def test_header_length_up_to_the_end_of_the_file(target: Any) -> None:
    content = target.shard.read_bytes()
    target.shard.write_bytes((len(content) - 8).to_bytes(8, "little") + content[8:])
    with pytest.raises(HeaderError):
        target.open()


def shifted(fields: dict[str, Any], name: str, begin: int, end: int) -> None:
    fields[name]["data_offsets"][0] += begin
    fields[name]["data_offsets"][1] += end


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda f: shifted(f, NORM, -2, -2), "overlaps|hole"),
        (lambda f: shifted(f, NORM, 2, 2), "overlaps|hole"),
        (lambda f: f[NORM].update(data_offsets=f["lm_head.weight"]["data_offsets"]), "bytes, but"),
        (lambda f: f.update(copy=f[NORM]), "overlaps"),
        (lambda f: f.pop(NORM), "hole"),
        (lambda f: shifted(f, NORM, 0, 2), "bytes, but"),
        (lambda f: f[NORM].update(data_offsets=[1 << 62, (1 << 62) + 64]), "hole|overlaps"),
        (lambda f: f[NORM].update(data_offsets=[(1 << 64) - 64, 1 << 64]), "impossible data_offsets"),
        (lambda f: f[NORM].update(data_offsets=[-64, 0]), "impossible data_offsets"),
        (lambda f: f[NORM].update(data_offsets=[64, 0]), "impossible data_offsets"),
        (lambda f: f[NORM].update(data_offsets=[0, 64.0]), "impossible data_offsets"),
        (lambda f: f[NORM].update(data_offsets=[False, 64]), "impossible data_offsets"),
        (lambda f: f[NORM].update(data_offsets=[0]), "impossible data_offsets"),
        (lambda f: f[NORM].update(data_offsets=None), "impossible data_offsets"),
        (lambda f: f[NORM].update(data_offsets={"0": 1}), "impossible data_offsets"),
        (lambda f: f[NORM].update(shape=[-32]), "impossible shape"),
        (lambda f: f[NORM].update(shape=[True]), "impossible shape"),
        (lambda f: f[NORM].update(shape="32"), "impossible shape"),
        (lambda f: f[NORM].update(shape=[1] * 9), "impossible shape"),
        (lambda f: f[NORM].update(shape=[1 << 63]), "impossible shape"),
        (lambda f: f[NORM].update(shape=[(1 << 63) - 1] * 8), "bytes, but"),
        (lambda f: f[NORM].update(shape=[1 << 32, 1 << 32]), "bytes, but"),  # 0 modulo 2^64
        (lambda f: f[NORM].update(dtype="BF17"), "unknown dtype"),
        (lambda f: f[NORM].update(dtype=["BF16"]), "unknown dtype"),
        (lambda f: f[NORM].update(dtype=16), "unknown dtype"),
        (lambda f: f[NORM].pop("dtype"), "exactly dtype, shape and data_offsets"),
        (lambda f: f[NORM].update(more=1), "exactly dtype, shape and data_offsets"),
        (lambda f: f.update({NORM: []}), "exactly dtype, shape and data_offsets"),
        (lambda f: f.update(__metadata__={"format": 1}), "__metadata__"),
        (lambda f: f.update(__metadata__=[]), "__metadata__"),
        (lambda f: f.update({"x" * 5000: f.pop(NORM)}), "5000 characters"),
    ],
)
def test_header_lies(target: Any, change: Any, named: str) -> None:
    target.edit_header(change)
    with pytest.raises(HeaderError, match=named):
        target.open()


@pytest.mark.parametrize(
    ("header", "named"),
    [
        (b"", "claims 0"),
        (b"[]      ", "begin with"),
        (b" {}     ", "begin with"),
        (b"{}      ", "belong to no tensor"),
        (b'{"a":1,"a":2}', "twice"),
        (b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', "twice"),
        (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', "NaN"),
        (b'{"a":{"dtype":"U8","shape":[1e999],"data_offsets":[0,1]}}', "impossible shape"),
        (b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}', "not valid JSON"),
        (b'{"a":' + b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b'{"\xff":1}', "not UTF-8"),
        (b'{"\xed\xa0\x80":1}', "not UTF-8"),  # a surrogate
        (b'{"a":1} {"b":2}', "not valid JSON"),
        (b'{"a":1}\0\0\0', "not valid JSON"),
        (b'{"a"', "not valid JSON"),
    ],
)
def test_header_is_no_header(target: Any, header: bytes, named: str) -> None:
    _, data = target.split()
    target.join(header, data)
    with pytest.raises(HeaderError, match=named):
        target.open()


def test_a_misaligned_header_is_refused_before_anything_reads_it(target: Any) -> None:
    header, data = target.split()
    header = header.rstrip() + b" " * (1 + -len(header.rstrip()) % 8)
    target.shard.write_bytes(len(header).to_bytes(8, "little") + header + data)
    with pytest.raises(HeaderError, match="not a multiple of"):
        target.open()


def test_swapped_tensors_of_one_size_are_told_apart_by_name_alone(target: Any) -> None:
    """Names decide: exchanging two names is another model, not an error, and harms nothing."""
    first, second = (f"model.layers.0.mlp.experts.0.{which}_proj.weight_packed" for which in ("gate", "up"))
    before = {place[0]: place[2] for place in target.open()}

    def swap(fields: dict[str, Any]) -> None:
        fields[first], fields[second] = fields[second], fields[first]

    target.edit_header(swap)
    after = {place[0]: place[2] for place in target.open()}
    assert after[first] - after[second] == before[second] - before[first] != 0


def test_wrong_dtype_of_the_right_size(target: Any) -> None:
    target.edit_header(lambda fields: fields[NORM].update(dtype="F16"))
    with pytest.raises(TensorError) as caught:
        target.open()
    assert caught.value.problems == (f"{NORM}: F16 [32], expected BF16 [32]",)


def test_packed_of_another_shape_with_the_same_bytes(target: Any) -> None:
    target.edit_header(lambda fields: fields[PACKED].update(shape=[4, 32]))
    with pytest.raises(TensorError, match=re.escape("I32 [4, 32], expected I32 [32, 4]")):
        target.open()


@pytest.mark.parametrize("name", ["\n\x1b[2J", "\ud800", "a" * 900, "‮gpj", ""])
def test_names_reach_messages_escaped(target: Any, name: str) -> None:
    target.edit_header(lambda fields: fields.update({name: fields.pop(NORM)}))
    with pytest.raises(TensorError) as caught:
        target.open()
    assert len(caught.value.problems) == 2
    for line in caught.value.problems:
        assert line.isprintable()
        assert line.isascii()
        assert len(line) < 300


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling", "loop", "empty", "unreadable"])
def test_a_shard_that_is_no_file(target: Any, kind: str) -> None:
    shard = target.shard
    shard.unlink()
    if kind == "folder":
        shard.mkdir()
    elif kind == "pipe":
        os.mkfifo(shard)
    elif kind == "dangling":
        shard.symlink_to("nowhere.safetensors")
    elif kind == "loop":
        shard.symlink_to(shard.name)
    elif kind == "empty":
        shard.touch()
    else:
        shard.write_bytes(json.dumps({}).encode())
    with pytest.raises((ShardIndexError, HeaderError)):
        target.open()


def test_random_bytes(target: Any) -> None:
    rng = random.Random(5)
    for size in (1, 8, 9, 64, 4096):
        for _ in range(20):
            target.shard.write_bytes(rng.randbytes(size))
            with pytest.raises(CheckpointError):
                target.open()
