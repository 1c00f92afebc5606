"""Shards that shrink, vanish and come back, and what is known of it."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from k2hybrid.checkpoint import watch as module
from k2hybrid.checkpoint.index import ShardIndex
from k2hybrid.checkpoint.watch import FileWatch
from k2hybrid.native.files import failed_ranges
from k2hybrid.types import TensorRef

PAGE = os.sysconf("SC_PAGESIZE")


class Watched:
    """A copy of a checkpoint, mapped and watched."""

    def __init__(self, folder: Path) -> None:
        self.index = ShardIndex(folder)
        self.watch = FileWatch(self.index.shards.values(), self.index.tensors)
        self.content = {path: path.read_bytes() for path in self.index.shards}

    def ref(self, name: str) -> TensorRef:
        return self.index.tensors[name]

    def cut(self, ref: TensorRef, at: int) -> Path:
        """Cut the shard of `ref` at its byte `at`."""
        os.truncate(ref.path, ref.offset + at)
        return ref.path

    def touch(self, path: Path) -> None:
        """Read one byte of each page."""
        self.index.shards[path].bytes[::PAGE].sum()

    def lost_tensors(self) -> set[str]:
        return {
            name for name, ref in self.index.tensors.items() if self.watch.failed(ref.address, ref.nbytes)
        }

    def same(self, path: Path) -> bool:
        return self.index.shards[path].bytes.tobytes() == self.content[path]


@pytest.fixture
def watched(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    monkeypatch.setattr(module, "RESTORE_SECONDS", 0.0)
    return Watched(shutil.copytree(small, tmp_path / "model"))


def settle(path: Path) -> None:
    """As if written long ago."""
    os.utime(path, (1e9, 1e9))


def in_place(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def replaced(path: Path, content: bytes) -> None:
    fresh = path.with_suffix(".incomplete")
    fresh.write_bytes(content)
    fresh.replace(path)


def linked(path: Path, content: bytes) -> None:
    blob = path.parent / "blob"
    blob.write_bytes(content)
    settle(blob)
    path.unlink()
    path.symlink_to(blob)


def a_small_shard(watched: Watched) -> Path:
    return max(watched.content, key=lambda path: len(watched.content[path]))


def test_whole_files_are_whole(watched: Watched) -> None:
    for path in watched.content:
        watched.touch(path)
    assert watched.watch.look() == frozenset()
    assert watched.watch.whole
    assert watched.watch.lost_files == []
    assert not watched.watch.dense_failed()
    assert watched.lost_tensors() == set()


@pytest.mark.parametrize("at", [0, 1, 700])
def test_what_lies_behind_the_cut_is_lost_and_nothing_else(watched: Watched, at: int) -> None:
    for name in ("model.layers.1.self_attn.o_proj.weight", "lm_head.weight"):
        ref = watched.ref(name)
        path = watched.cut(ref, at)
        watched.watch.look()
        behind = {
            other.name
            for other in watched.index.tensors.values()
            if other.path == path and other.offset + other.nbytes > ref.offset + at
        }
        assert {name} <= behind == {n for n in watched.lost_tensors() if watched.ref(n).path == path}
        assert path.name in watched.watch.problem
        assert path.name in watched.watch.lost_files
        assert watched.watch.dense_failed()


def test_bytes_of_lost_pages_are_zeros_the_others_are_the_files(watched: Watched) -> None:
    path = a_small_shard(watched)
    os.truncate(path, PAGE + 5)
    got, content = watched.index.shards[path].bytes, watched.content[path]
    assert got[-1] == 0
    assert got[: PAGE + 5].tobytes() == content[: PAGE + 5]
    assert not got[PAGE + 5 :].any()


def test_what_became_zeros_without_a_signal_is_told_once(watched: Watched) -> None:
    path = a_small_shard(watched)
    start, size = watched.index.shards[path].address, len(watched.content[path])
    assert size % PAGE > 100
    os.truncate(path, size - 100)
    assert watched.watch.whole  # nobody knows yet
    assert watched.watch.look() == {(start + size - 100, start + size)}
    assert watched.watch.look() == frozenset()
    os.truncate(path, PAGE)  # at a page's end nothing is silent
    assert watched.watch.look() == frozenset()
    os.truncate(path, PAGE - 10)
    watched.touch(path)  # found by a reader's fault, which says as much
    assert watched.watch.look() == {(start + PAGE - 10, start + PAGE)}


def test_experts_in_a_range(watched: Watched) -> None:
    ref = watched.ref("model.layers.2.mlp.experts.3.up_proj.weight_packed")
    begin, end = ref.address, ref.address + ref.nbytes
    assert watched.watch.experts_at([(begin, begin + 1)]) == {(2, 3)}
    assert watched.watch.experts_at([(end - 1, end)]) == {(2, 3)}
    assert (2, 3) in watched.watch.experts_at([(begin - 1, begin + 1)])
    assert watched.watch.experts_at([(begin, begin)]) == set()
    dense = watched.ref("model.embed_tokens.weight")
    assert watched.watch.experts_at([(dense.address, dense.address + 10)]) == set()


def test_the_embedding_and_experts_are_not_what_every_token_needs(watched: Watched) -> None:
    for path in watched.content:
        names = [ref for ref in watched.index.tensors.values() if ref.path == path]
        last = max(names, key=lambda ref: ref.offset)
        watched.cut(last, last.nbytes - 1)
        watched.watch.look()
        if ".experts." in last.name or "embed" in last.name:
            assert not watched.watch.dense_failed()
            in_place(path, watched.content[path])
            settle(path)
            watched.watch.restore()
        else:
            assert watched.watch.dense_failed()
            return
    raise AssertionError("no shard ends with a dense tensor")


@pytest.mark.parametrize("back", [in_place, replaced, linked])
@pytest.mark.parametrize("left", [0, PAGE, PAGE + 77])
def test_a_file_that_is_whole_again_is_read_again(
    watched: Watched, back: Callable[[Path, bytes], None], left: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = a_small_shard(watched)
    for _ in range(2):
        os.truncate(path, left)
        watched.touch(path)
        assert not watched.watch.whole
        assert not watched.same(path)
        watched.watch.restore()
        assert not watched.watch.whole  # still short
        back(path, watched.content[path])
        settle(path)
        with caplog.at_level(logging.WARNING):
            watched.watch.restore()
        assert watched.watch.whole
        assert watched.same(path)
        assert watched.lost_tensors() == set()
    assert [r.getMessage() for r in caplog.records].count(f"{path} is whole again") == 2


def test_what_is_not_the_file_does_not_come_back(watched: Watched, tmp_path: Path) -> None:
    path = a_small_shard(watched)
    content = watched.content[path]
    os.truncate(path, 0)
    watched.touch(path)

    def still_lost() -> bool:
        watched.watch.restore()
        return not watched.watch.whole and not watched.same(path)

    assert still_lost()
    path.unlink()
    assert still_lost()
    path.mkdir()
    assert still_lost()
    path.rmdir()
    os.mkfifo(path)  # opening it must not wait for a writer
    assert still_lost()
    path.unlink()
    for other in (content + b"x", content[:-1], content[:50] + b"?" + content[51:], bytes(len(content))):
        path.write_bytes(other)
        settle(path)
        assert still_lost()
    path.write_bytes(content)  # just now: perhaps it is still being written
    os.utime(path, (time.time(), time.time()))
    assert still_lost()
    os.utime(path, (time.time() + 1000, time.time() + 1000))  # another machine's clock
    watched.watch.restore()
    assert watched.watch.whole
    assert watched.same(path)


def test_tries_are_a_second_apart(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESTORE_SECONDS", 1000.0)
    path = a_small_shard(watched)
    os.truncate(path, 0)
    watched.watch.look()
    watched.watch.restore()
    in_place(path, watched.content[path])
    settle(path)
    watched.watch.restore()
    assert not watched.watch.whole


def test_slow_looks_are_rare(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLOW_LOOK_SECONDS", -1.0)  # any look takes longer
    path = a_small_shard(watched)
    for _ in range(module.SLOW_LOOKS):
        watched.watch.look()
    os.truncate(path, len(watched.content[path]) - 1)
    assert watched.watch.look() == frozenset()
    deadline = time.monotonic() + 30
    while watched.watch.whole and time.monotonic() < deadline:
        watched.watch.look()
        time.sleep(0.05)
    assert not watched.watch.whole


def test_a_loss_stands_in_the_log_once(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    path = a_small_shard(watched)
    with caplog.at_level(logging.ERROR):
        for left in (2 * PAGE, PAGE):
            os.truncate(path, left)
            watched.watch.look()
    assert sum(str(path) in record.getMessage() for record in caplog.records) == 1


def test_another_checkpoints_loss_is_none_of_ours(watched: Watched, small: Path, tmp_path: Path) -> None:
    other = Watched(shutil.copytree(small, tmp_path / "other"))
    path = a_small_shard(other)
    os.truncate(path, 0)
    other.touch(path)
    assert not other.watch.whole
    assert watched.watch.whole
    assert watched.lost_tensors() == set()


def test_a_map_that_goes_is_watched_no_longer(small: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / "model")
    for _ in range(100):  # addresses come again: a map that stayed registered would be in the way
        index = ShardIndex(folder)
        assert len(index.shards) > 2
    watched = Watched(folder)
    path = a_small_shard(watched)
    view = watched.index.shards[path].bytes[10:20]
    os.truncate(path, 0)
    watched.touch(path)
    del watched.index
    gc.collect()
    assert not watched.watch.whole  # a view holds the map
    del view
    gc.collect()
    assert watched.watch.whole
    assert failed_ranges() == []
    watched.watch.look()
    watched.watch.restore()


def test_numpy_reads_zeros_and_the_process_lives(watched: Watched) -> None:
    path = a_small_shard(watched)
    content = watched.index.shards[path].bytes
    os.truncate(path, 0)
    assert int(np.count_nonzero(content)) == 0
    assert watched.lost_tensors() == {n for n, ref in watched.index.tensors.items() if ref.path == path}


def test_a_file_that_is_written_to_is_told_once_as_a_whole(watched: Watched) -> None:
    path = a_small_shard(watched)
    start, size = watched.index.shards[path].address, len(watched.content[path])
    for stamp in (1e9, 2e9):
        os.truncate(path, 1)
        in_place(path, watched.content[path])  # whole again before anybody looked
        os.utime(path, (stamp, stamp))
        assert watched.watch.look() == {(start, start + size)}
        assert watched.watch.look() == frozenset()
        assert watched.watch.whole
    dense = watched.ref("model.layers.1.self_attn.o_proj.weight")
    assert watched.watch.dense_failed([(dense.address, dense.address + 1)])
    assert not watched.watch.dense_failed()
