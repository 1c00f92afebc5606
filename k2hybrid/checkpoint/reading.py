"""Reads a file once, from front to back, in bounded memory, and leaves no trace in the page cache."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event

from k2hybrid.errors import CheckpointError

CHUNK_BYTES = 8 << 20  # large enough for a disk's full rate; a multiple of every tensor element


class Stopped(Exception):  # noqa: N818 - not an error: somebody asked for it
    """Raised in a reader whose `stop` was set."""


class Reader:
    """An open regular file. Raises CheckpointError if it is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # A pipe in place of the file must not block the open.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError) as problem:
            raise CheckpointError(f"{path} cannot be read: {problem}") from None
        info = os.fstat(self._descriptor)
        self.nbytes = info.st_size
        if not stat.S_ISREG(info.st_mode):
            os.close(self._descriptor)
            raise CheckpointError(f"{path} is not a regular file")

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def chunks(self, stop: Event, progress: Callable[[int], object]) -> Iterator[tuple[int, memoryview[int]]]:
        """(offset, bytes) of one chunk after the other, each full but the last; valid until the next.

        Args:
            stop: set by whoever wants no more.
            progress: told the bytes of each chunk; called from this thread.

        Raises:
            CheckpointError: the disk failed, or the file shrank meanwhile.
            Stopped: `stop` was set.
        """
        descriptor = self._descriptor
        buffer = memoryview(bytearray(min(CHUNK_BYTES, self.nbytes)))
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        for offset in range(0, self.nbytes, CHUNK_BYTES):
            chunk = buffer[: min(CHUNK_BYTES, self.nbytes - offset)]
            filled = 0
            while filled < len(chunk):
                if stop.is_set():
                    raise Stopped
                try:
                    count = os.preadv(descriptor, [chunk[filled:]], offset + filled)
                except OSError as problem:
                    raise CheckpointError(
                        f"{self.path} cannot be read at byte {offset + filled}: {problem.strerror}"
                    ) from None
                if not count:
                    raise CheckpointError(f"{self.path} became shorter while it was read")
                filled += count
            yield offset, chunk
            os.posix_fadvise(descriptor, offset, filled, os.POSIX_FADV_DONTNEED)
            progress(filled)
