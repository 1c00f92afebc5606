"""A survey lists everything that is wrong; reading all bytes finds what headers cannot show."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from k2hybrid.checkpoint import finite
from k2hybrid.checkpoint.checksums import known_checksums
from k2hybrid.checkpoint.content import content_of
from k2hybrid.checkpoint.finite import FiniteScan
from k2hybrid.checkpoint.index import INDEX_NAME
from k2hybrid.checkpoint.names import expected_tensors
from k2hybrid.checkpoint.reading import CHUNK_BYTES, Reader, Stopped
from k2hybrid.checkpoint.spec import read_spec
from k2hybrid.checkpoint.survey import Survey, survey
from k2hybrid.checkpoint.verify import DeepCheck
from k2hybrid.errors import CheckpointError
from k2hybrid.types import TensorRef
from tests.hub_server import git_hash, sha256

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight_"


@pytest.fixture
def model(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "model"))


def shard_of(folder: Path, tensor: str) -> Path:
    found: str = json.loads((folder / INDEX_NAME).read_text())["weight_map"][tensor]
    return folder / found


def change(folder: Path, tensor: str, edit: Any) -> None:
    """Edit one tensor in place, through the safetensors library."""
    path = shard_of(folder, tensor)
    tensors = load_file(path)
    edit(tensors[tensor])
    save_file(tensors, path, metadata={"format": "pt"})


def test_nothing_is_wrong(model: Path) -> None:
    found = survey(model)
    assert (found.problems, found.links) == ((), ())
    assert {shard.name: shard.nbytes for shard in found.shards} == {
        path.name: path.stat().st_size for path in model.glob("*.safetensors")
    }
    seen: list[int] = []
    contents = DeepCheck(found).run(seen.append)
    assert contents.problems == contents.checked == ()
    assert contents.unknown == tuple(sorted(path.name for path in model.glob("*.safetensors")))
    assert contents.shapes_ignored == 0
    assert contents.nbytes == sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert sum(seen) == contents.nbytes


def test_everything_wrong_is_listed_at_once(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    shards = sorted(model.glob("*.safetensors"))
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-2])
    shards[2].unlink()
    shards[2].mkdir()
    index = json.loads((model / INDEX_NAME).read_text())
    index["weight_map"]["ghost"] = shards[3].name
    (model / INDEX_NAME).write_text(json.dumps(index))
    good = survey(model)
    (model / "config.json").write_text(
        json.dumps(config | {"hidden_act": "gelu", "tie_word_embeddings": True})
    )
    (model / "generation_config.json").write_text("{")
    bad = survey(model)
    assert bad.missing_shards == [shards[0].name]
    wanted = ["hidden_act", "tie_word_embeddings", "is truncated", "Is a directory", ": missing"]
    wanted += ["generation_config.json"]
    for text in wanted:
        assert any(text in line for line in bad.problems), (text, bad.problems)
    # With a configuration tensors are compared, but those of shards that are at fault are not listed singly.
    assert [line for line in good.problems if "ghost" in line] == [
        f"ghost: missing; the index places it in {shards[3].name}"
    ]
    assert len(good.problems) == 4


def test_tensors_are_compared_as_the_loader_does(model: Path) -> None:
    path = shard_of(model, EXPERT + "scale")
    tensors = load_file(path)
    del tensors[EXPERT + "scale"]
    tensors["extra"] = torch.zeros(3)
    save_file(tensors, path)
    assert survey(model).problems == (
        f"extra: extra; in {path.name}, but not in the index",
        f"{EXPERT}scale: missing; the index places it in {path.name}",
    )


@pytest.mark.parametrize("missing", ["config.json", INDEX_NAME])
def test_what_is_there_is_shown_without_the_rest(model: Path, missing: str) -> None:
    whole = content_of(survey(model))
    (model / missing).unlink()
    sorted(model.glob("*.safetensors"))[0].unlink()
    found = survey(model)
    assert any(missing in line for line in found.problems)
    assert found.tensors
    content = content_of(found)
    assert (content.total.nbytes == 0) is (missing == "config.json")
    assert content.total.nbytes < whole.total.nbytes


def test_content_adds_up(model: Path) -> None:
    """Against what the safetensors library reads."""
    content, spec = content_of(survey(model)), read_spec(model)
    sizes = {
        name: tensor.nbytes
        for path in model.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    assert content.total == (len(sizes), sum(sizes.values()))
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    assert sum(size.expert_bytes for size in content.layers.values()) == routed
    assert sum(place.nbytes for place in content.experts.values()) == routed
    assert len(content.experts) == 2 * 8
    in_layers = sum(size for name, size in sizes.items() if ".layers." in name)
    assert sum(map(sum, content.layers.values())) == in_layers
    assert [run[:2] for run in content.layer_runs()] == [(0, 0), (1, 2)]
    assert spec.num_layers == len(content.layers)


def test_alignments_by_brute_force(model: Path) -> None:
    found = survey(model)
    expected: dict[str, Counter[int]] = {"packed": Counter(), "scale": Counter()}
    for tensor in expected_tensors(read_spec(model)):
        part = tensor.key.role.rpartition(".")[2]
        if part not in expected:
            continue
        ref = found.tensors[tensor.name]
        starts = [ref.offset + row * ref.nbytes // ref.shape[0] for row in range(ref.shape[0])]
        expected[part][max(2**k for k in range(13) if all(start % 2**k == 0 for start in starts))] += 1
    assert content_of(found).alignments == {part: dict(counts) for part, counts in expected.items()}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name", [EXPERT + "scale", "lm_head.weight", "model.layers.1.mlp.gate.e_score_correction_bias"]
)
def test_values_that_are_not_finite(model: Path, name: str, value: float) -> None:
    def edit(tensor: torch.Tensor) -> None:
        tensor.view(-1)[[0, -1]] = value

    change(model, name, edit)
    assert DeepCheck(survey(model)).run().problems == (f"{name}: 2 values are not finite",)


@pytest.mark.parametrize("chunk_bytes", [8, 64, 4096])
def test_the_scan_by_brute_force(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    """Random bits, in which one value of 256 is not finite, and tensors of odd sizes side by side."""
    rng = np.random.default_rng(3)
    kinds = {"BF16": 2, "F32": 4, "I32": 4, "U8": 1}
    refs, offset = [], 16
    for number in range(60):
        dtype = str(rng.choice(list(kinds)))
        offset += -offset % kinds[dtype]
        count = int(rng.integers(0, 300))
        refs.append(TensorRef(f"t{number}", Path(), offset, count * kinds[dtype], dtype, (count,), 0))
        offset += refs[-1].nbytes
    data = rng.integers(0, 256, offset, dtype=np.uint8).tobytes()
    scan = FiniteScan(refs, chunk_bytes)
    for start in range(0, len(data), chunk_bytes):
        scan.feed(start, memoryview(bytearray(data[start : start + chunk_bytes])))
    expected = Counter[str]()
    for ref in refs:
        raw = bytearray(data[ref.offset : ref.offset + ref.nbytes])
        if ref.dtype in finite._EXPONENT and raw:
            values = torch.frombuffer(raw, dtype={"BF16": torch.bfloat16, "F32": torch.float32}[ref.dtype])
            expected[ref.name] = int((~torch.isfinite(values)).sum())
    assert scan.counts == +expected
    assert len(+expected) > 5


def test_shapes_that_contradict_are_counted_not_refused(model: Path) -> None:
    change(model, EXPERT + "shape", lambda tensor: tensor.fill_(-1))
    contents = DeepCheck(survey(model)).run()
    assert contents.problems == ()
    assert contents.shapes_ignored == 1


def as_list(folder: Path, names: dict[str, str]) -> None:
    (folder / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in names.items()))


def as_metadata(folder: Path, names: dict[str, str]) -> None:
    download = folder / ".cache/huggingface/download"
    download.mkdir(parents=True)
    for name, digest in names.items():
        (download / f"{name}.metadata").write_text(f"{'0' * 40}\n{digest}\n1712656091.123\n")


def as_cache(folder: Path, names: dict[str, str]) -> None:
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for name, digest in names.items():
        (folder / name).rename(blobs / digest)
        (folder / name).symlink_to(f"../blobs/{digest}")


@pytest.mark.parametrize("source", [as_list, as_metadata, as_cache])
def test_checksums(model: Path, source: Any) -> None:
    shards = sorted(path.name for path in model.glob("*.safetensors"))
    digests = {name: sha256((model / name).read_bytes()) for name in [*shards[:2], "tiktoken.model"]}
    if source is not as_list:
        digests["config.json"] = git_hash((model / "config.json").read_bytes())
    source(model, digests)
    contents = DeepCheck(survey(model)).run()
    assert contents.problems == ()
    assert set(contents.checked) == set(digests)
    assert set(contents.unknown) == set(shards[2:])
    for name in digests:
        path = model / name
        content = path.read_bytes()
        last = bytes([content[-1] ^ 1])
        path.resolve().write_bytes(content[:-1] + last)
        problems = DeepCheck(survey(model)).run().problems
        now = (git_hash if name == "config.json" else sha256)(content[:-1] + last)
        assert any(
            line.startswith(f"{name}: its ") and now in line and digests[name] in line for line in problems
        )
        path.resolve().write_bytes(content)


def test_sources_that_contradict_each_other_are_both_compared(model: Path) -> None:
    name = "tiktoken.model"
    as_list(model, {name: "0" * 64})
    as_metadata(model, {name: sha256((model / name).read_bytes())})
    assert [one.source for one in known_checksums(model)[name]] == ["its download's metadata", "SHA256SUMS"]
    problems = DeepCheck(survey(model)).run().problems
    assert len(problems) == 1
    assert problems[0].endswith(f"but SHA256SUMS says {'0' * 64}")


def test_lists_and_metadata_that_are_garbled(model: Path) -> None:
    (model / "SHA256SUMS").write_bytes(
        b"\xff\xfe\n../../etc/passwd\n" + b"0" * 64 + b"  ../outside\n" + b"0" * 63 + b"  config.json\n"
    )
    as_metadata(model, {"config.json": "zz", "tiktoken.model": "../" + "0" * 61})
    (model / ".cache/huggingface/download/tokenizer_config.json.metadata").write_bytes(b"\xff")
    assert known_checksums(model) == {}


def test_a_file_larger_than_a_chunk(tmp_path: Path) -> None:
    path = tmp_path / "large"
    data = np.random.default_rng(0).bytes(2 * CHUNK_BYTES + 12345)
    path.write_bytes(data)
    running = hashlib.sha256()
    sizes: list[int] = []
    with Reader(path) as reader:
        for offset, chunk in reader.chunks(Event(), sizes.append):
            assert offset == sum(sizes)
            running.update(chunk)
    assert running.hexdigest() == sha256(data)
    assert sizes == [CHUNK_BYTES, CHUNK_BYTES, 12345]


def test_readers_end_when_asked_and_when_the_file_shrinks(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(CHUNK_BYTES + 5))
    stop = Event()
    with Reader(path) as reader:
        chunks = reader.chunks(stop, lambda _: None)
        next(chunks)
        stop.set()
        with pytest.raises(Stopped):
            next(chunks)
    with Reader(path) as reader:
        chunks = reader.chunks(Event(), lambda _: None)
        next(chunks)
        path.write_bytes(b"")
        with pytest.raises(CheckpointError, match="became shorter"):
            next(chunks)


def test_a_shard_that_changes_between_survey_and_reading(model: Path) -> None:
    found: Survey = survey(model)
    deep = DeepCheck(found)
    path = sorted(model.glob("*.safetensors"))[0]
    path.write_bytes(b"short")
    problems = deep.run().problems
    assert problems == (f"{path} changed its size while it was checked",)
