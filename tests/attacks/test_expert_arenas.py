"""Files of experts that are torn, garbage or no files at all: the answer stays, or the start says why."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import k2hybrid
from k2hybrid.errors import ConfigError, NativeError
from k2hybrid.types import SamplingParams, TokenEvent

NAME = "k2hybrid-experts-node0of1"
SHM = Path("/dev/shm")  # where such files belong


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=SHM) as made:
        yield Path(made)


def answer(**options: Any) -> list[int]:
    with k2hybrid.load(threads=2, latent_bytes=64 << 20, **options) as model:
        events = model.generate(
            list(range(7, 90, 5)), SamplingParams(temperature=0), max_tokens=6, stop_ids=()
        )
        return [event.token for event in events if isinstance(event, TokenEvent)]


@pytest.fixture(scope="module")
def mapped() -> list[int]:
    return answer(expert_place="mapped")


def garbage(file: Path, size: int) -> None:
    file.write_bytes(os.urandom(size))


def zeros(file: Path, size: int) -> None:
    file.write_bytes(bytes(size))


def torn(file: Path, size: int) -> None:
    os.truncate(file, size // 3)


def longer(file: Path, size: int) -> None:
    os.truncate(file, 2 * size)


def marks(file: Path, _: int) -> None:
    content = bytearray(file.read_bytes())
    begin = content.rindex(b"k2slots1") + 8 + 64
    content[begin : begin + 32] = bytes([7]) * 32
    file.write_bytes(content)


@pytest.mark.parametrize("spoil", [garbage, zeros, torn, longer, marks])
def test_what_cannot_be_trusted_is_filled_anew(
    folder: Path, mapped: list[int], spoil: Callable[[Path, int], None]
) -> None:
    assert answer(expert_place="resident", expert_arena=folder) == mapped
    spoil(folder / NAME, (folder / NAME).stat().st_size)
    assert answer(expert_place="resident", expert_arena=folder) == mapped


def linked(file: Path) -> None:
    file.symlink_to(file.with_name("target"))


@pytest.mark.parametrize("make", [linked, os.mkfifo, Path.mkdir])
def test_what_is_no_plain_file_is_refused(folder: Path, make: Callable[[Path], None]) -> None:
    make(folder / NAME)
    with pytest.raises(NativeError, match=NAME):
        answer(expert_place="resident", expert_arena=folder)
    assert not (folder / "target").exists()


def test_a_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NativeError, match="would lie on a disk"):
        answer(expert_place="resident", expert_arena=tmp_path)


@pytest.mark.parametrize("spoil", ["shared", "hard link"])
def test_what_others_could_change_is_refused(folder: Path, spoil: str) -> None:
    (folder / NAME).touch(mode=0o600)
    if spoil == "shared":
        (folder / NAME).chmod(0o666)
    else:
        os.link(folder / NAME, folder / "other")
    with pytest.raises(NativeError, match="this user's alone"):
        answer(expert_place="resident", expert_arena=folder)
    assert (folder / NAME).stat().st_size == 0


def test_too_little_room_is_told_before_anything_is_filled(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    real = os.statvfs(folder)
    small = os.statvfs_result((real.f_bsize, real.f_frsize, 8, *tuple(real)[3:]))
    monkeypatch.setattr(os, "statvfs", lambda path: small if Path(path) == folder else real)
    with pytest.raises(ConfigError, match="remount,size="):
        answer(expert_place="resident", expert_arena=folder)
    assert list(folder.iterdir()) == []
