"""How fast a disk delivers what streamed experts need: direct reads of one size, many in flight, at random.

Each request is a `preadv` into a page-aligned buffer of its own thread, outside the interpreter's lock. The
interpreter issues some 10⁵ requests a second at most: below 64 KiB it is the limit, not the disk.
"""

from __future__ import annotations

import bisect
import errno
import itertools
import mmap
import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from k2hybrid.errors import ConfigError
from k2hybrid.hardware.storage import MEMORY_FILE_SYSTEMS, mount_of, read_mounts

BLOCK = 4096  # a multiple of every disk's logical block: where direct reads may start and end
REQUEST_BYTES = 2 << 20
DEPTH = 16
# Less would fit a drive's own cache, or be read again and again.
LEAST_FILE_BYTES = 256 << 20
PROBE_FILE_BYTES = 512 << 20
SHARE_OF_FREE = 8  # the probe's file takes an eighth of the free space at most
_PIECE = 4 << 20
_HUGE = 2 << 20


@dataclass(frozen=True, slots=True)
class ReadRate:
    """What was measured.

    Attributes:
        gb_s: 10⁹ bytes a second over all threads.
        how: "direct" past the page cache, or "buffered" through it, where `note` says why.
        source: "files" that were there, or "probe": a file written for this and removed.
    """

    gb_s: float
    how: Literal["direct", "buffered"]
    source: Literal["files", "probe"]
    request_bytes: int
    depth: int
    bytes_read: int
    seconds: float
    note: str = ""


def direct_read_gb_s(
    where: Path | Sequence[Path],
    request_bytes: int = REQUEST_BYTES,
    depth: int = DEPTH,
    seconds: float = 1.0,
) -> ReadRate:
    """Read for some seconds at random multiples of `request_bytes`.

    Args:
        where: a file, several files, or a folder. Of a folder, its shards (*.safetensors) are read if they
            are large enough; else a file is written there, synced, and removed again.
        request_bytes: a multiple of 4096.
        depth: requests in flight, one thread each.
        seconds: when no more requests are begun.

    Raises:
        ConfigError: sizes that cannot be, or a file that is shorter than one request.
        OSError: nothing can be read or written there, or the free space does not suffice.
    """
    if request_bytes < BLOCK or request_bytes % BLOCK:
        raise ConfigError(f"requests are multiples of {BLOCK} bytes, not {request_bytes}")
    if not 1 <= depth <= 1024 or not 0 < seconds <= 3600:
        raise ConfigError(f"cannot keep {depth} requests in flight for {seconds} s")
    with ExitStack() as stack:
        files = _files(where, request_bytes)
        source: Literal["files", "probe"] = "files"
        if not files:
            assert isinstance(where, Path)
            source = "probe"
            files = [stack.enter_context(_probe_file(where, request_bytes))]
        opened, note = _opened(files, stack)
        taken, elapsed = _Readers(opened, request_bytes, seconds).run(depth)
    how: Literal["direct", "buffered"] = "buffered" if note else "direct"
    return ReadRate(taken / elapsed / 1e9, how, source, request_bytes, depth, taken, elapsed, note)


def _files(where: Path | Sequence[Path], request_bytes: int) -> list[Path]:
    """What to read; empty for a folder that needs a probe."""
    if isinstance(where, Path) and where.is_dir():
        shards = [shard for shard in sorted(where.glob("*.safetensors")) if shard.is_file()]
        shards = [shard for shard in shards if shard.stat().st_size >= request_bytes]
        return shards if sum(shard.stat().st_size for shard in shards) >= LEAST_FILE_BYTES else []
    files = [where] if isinstance(where, Path) else list(where)
    short = [file for file in files if file.stat().st_size < request_bytes]
    if short or not files:
        raise ConfigError(
            f"{short[0] if short else 'no file'} is shorter than a request of {request_bytes} bytes"
        )
    return files


@contextmanager
def _probe_file(folder: Path, request_bytes: int) -> Iterator[Path]:
    free = os.statvfs(folder)
    size = (
        min(PROBE_FILE_BYTES, free.f_bavail * free.f_frsize // SHARE_OF_FREE) // request_bytes * request_bytes
    )
    if size < 4 * request_bytes:
        raise OSError(errno.ENOSPC, "too little free space for a probe of the disk", str(folder))
    piece = os.urandom(min(_PIECE, size))  # nothing that a file system could compress
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".k2hybrid-probe-") as file:
        for start in range(0, size, len(piece)):
            file.write(piece[: size - start])
        file.flush()
        os.fsync(file.fileno())
        yield Path(file.name)


def _opened(files: Sequence[Path], stack: ExitStack) -> tuple[list[tuple[int, int]], str]:
    """(descriptor, bytes) of each file, and why reads are buffered; empty if they are direct."""
    notes = []
    opened = []
    mounts = read_mounts()
    for file in files:
        note = ""
        file_system = mount_of(file.resolve(), mounts).file_system
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            note = f"{file_system} refuses direct reads: the page cache may have answered"
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, descriptor)
        if file_system in MEMORY_FILE_SYSTEMS:
            note = f"{file_system} is memory, not a disk"  # some kernels accept the flag and ignore it
        if note:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            notes.append(note)
        opened.append((descriptor, os.fstat(descriptor).st_size))
    return opened, notes[0] if notes else ""


@contextmanager
def _buffer(nbytes: int) -> Iterator[memoryview]:
    """Huge pages where the system has them, as experts have: a disk is told of few large pieces then."""
    with mmap.mmap(-1, nbytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as room:
        room.madvise(mmap.MADV_HUGEPAGE)
        address = np.frombuffer(room, np.uint8).ctypes.data
        start = -address % _HUGE
        with memoryview(room) as whole, whole[start : start + nbytes] as view:
            yield view


class _Readers:
    """Threads that read whole requests at random places of all files together."""

    def __init__(self, files: Sequence[tuple[int, int]], request_bytes: int, seconds: float) -> None:
        self._descriptors = [descriptor for descriptor, _ in files]
        # ends[i]: requests that fit files 0…i, so that a number below ends[-1] stands for a place in one file
        self._ends = list(itertools.accumulate(size // request_bytes for _, size in files))
        self._request_bytes = request_bytes
        self._seconds = seconds
        self._stop = False
        self._taken: list[tuple[int, float]] = []  # bytes and time of the last completion, by thread
        self._errors: list[OSError] = []

    def run(self, depth: int) -> tuple[int, float]:
        """Bytes read, and seconds from the first request to the last completion."""
        threads = [threading.Thread(target=self._read, args=(seed,), daemon=True) for seed in range(depth)]
        started = time.monotonic()
        self._until = started + self._seconds
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]
        return sum(taken for taken, _ in self._taken), max(end for _, end in self._taken) - started

    def _read(self, seed: int) -> None:
        places = random.Random(seed)
        taken = 0
        with _buffer(self._request_bytes) as view:
            try:
                while True:
                    number = places.randrange(self._ends[-1])
                    file = bisect.bisect_right(self._ends, number)
                    first = self._ends[file - 1] if file else 0
                    got = os.preadv(self._descriptors[file], [view], (number - first) * self._request_bytes)
                    if got == 0:
                        raise OSError(errno.EIO, "the file became shorter while it was read")
                    taken += got
                    if self._stop or time.monotonic() >= self._until:
                        break
            except OSError as error:
                self._errors.append(error)
                self._stop = True
        self._taken.append((taken, time.monotonic()))
