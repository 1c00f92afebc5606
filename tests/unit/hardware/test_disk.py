"""Direct reads of real files: what is counted, where it comes from, and what is refused."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from k2hybrid.errors import ConfigError
from k2hybrid.hardware import disk
from k2hybrid.hardware.disk import direct_read_gb_s
from k2hybrid.hardware.storage import storage_of

SHM = Path("/dev/shm")


def file_of(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.write(os.urandom(size))
        file.flush()
        os.fsync(file.fileno())
    return path


def device_bytes() -> int | None:
    """What this process had read by block devices, by the kernel's own count."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


def test_the_rate_is_bytes_over_seconds_and_reaches_the_device(tmp_path: Path) -> None:
    path = file_of(tmp_path / "data", 3 << 20)
    before = device_bytes()
    rate = direct_read_gb_s(path, 64 << 10, depth=3, seconds=0.05)
    after = device_bytes()
    assert rate.gb_s == pytest.approx(rate.bytes_read / rate.seconds / 1e9)
    assert rate.bytes_read % (64 << 10) == 0
    assert rate.bytes_read >= 3 * 64 << 10  # every thread reads at least once
    assert (rate.source, rate.request_bytes, rate.depth) == ("files", 64 << 10, 3)
    if rate.how == "direct" and storage_of(tmp_path).device and before is not None and after is not None:
        assert after - before >= rate.bytes_read  # the page cache, which holds the file, has answered nothing


def test_a_file_in_memory_says_so() -> None:
    if not SHM.is_dir() or storage_of(SHM).kind != "memory":
        pytest.skip("needs /dev/shm in memory")
    path = file_of(SHM / f"k2hybrid-test-{os.getpid()}", 1 << 20)
    try:
        rate = direct_read_gb_s(path, 4096, depth=2, seconds=0.02)
    finally:
        path.unlink()
    assert rate.how == "buffered"
    assert "memory" in rate.note


def test_a_probe_is_written_read_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "PROBE_FILE_BYTES", 5 << 20)
    (tmp_path / "model-1.safetensors").write_bytes(b"x" * 8192)  # too little to tell anything
    seen: list[list[int]] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            seen.append([path.stat().st_size for path in tmp_path.glob(".k2hybrid-probe-*")])
            time.sleep(0.001)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        rate = direct_read_gb_s(tmp_path, 1 << 20, depth=2, seconds=0.1)
    finally:
        stop.set()
        watcher.join()
    assert rate.source == "probe"
    assert max(size for sizes in seen for size in sizes) == 5 << 20
    assert [path.name for path in tmp_path.iterdir()] == ["model-1.safetensors"]


def test_shards_are_read_where_they_are_large_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "LEAST_FILE_BYTES", 1 << 20)
    blob = file_of(tmp_path / "blob", 1 << 20)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model-1.safetensors").symlink_to(blob)  # as in the Hugging Face cache
    (folder / "model-2.safetensors").write_bytes(b"short")
    (folder / "model-3.safetensors").symlink_to(tmp_path / "nowhere")
    assert direct_read_gb_s(folder, 64 << 10, depth=1, seconds=0.02).source == "files"


def test_requests_lie_on_multiples_of_their_size_in_all_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [
        file_of(tmp_path / str(at), size) for at, size in enumerate((5 * 4096 + 17, 4096, 3 * 4096 - 1 + 1))
    ]
    asked: set[tuple[int, int]] = set()
    real = os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        asked.add((os.fstat(descriptor).st_ino, offset))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    direct_read_gb_s(files, 4096, depth=2, seconds=0.3)
    inodes = [file.stat().st_ino for file in files]
    assert asked == {
        (inode, block * 4096)
        for inode, blocks in zip(inodes, (5, 1, 3), strict=True)
        for block in range(blocks)
    }


def test_a_file_that_shrinks_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file_of(tmp_path / "data", 1 << 20)
    real = os.preadv

    def cut(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        os.truncate(path, 0)
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", cut)
    with pytest.raises(OSError, match="shorter"):
        direct_read_gb_s(path, 4096, depth=4, seconds=5)


@pytest.mark.parametrize(
    ("request_bytes", "depth", "seconds"),
    [(0, 1, 1), (4095, 1, 1), (-4096, 1, 1), (4096, 0, 1), (4096, 1, 0)],
)
def test_sizes_that_cannot_be(tmp_path: Path, request_bytes: int, depth: int, seconds: float) -> None:
    with pytest.raises(ConfigError):
        direct_read_gb_s(tmp_path, request_bytes, depth, seconds)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    short = file_of(tmp_path / "short", 100)
    with pytest.raises(ConfigError, match="shorter than a request"):
        direct_read_gb_s(short, 4096, 1, 0.01)
    with pytest.raises(ConfigError, match="no file"):
        direct_read_gb_s([], 4096, 1, 0.01)
    with pytest.raises(FileNotFoundError):
        direct_read_gb_s(tmp_path / "missing", 4096, 1, 0.01)


def test_a_full_disk_gets_no_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "SHARE_OF_FREE", 1 << 60)
    with pytest.raises(OSError, match="too little free space"):
        direct_read_gb_s(tmp_path, 4096, 1, 0.01)
    assert list(tmp_path.iterdir()) == []
