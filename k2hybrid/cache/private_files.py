"""Files that only their owner may read: folders 0700, files 0600; links and pipes are not opened."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

Bytes = bytes | bytearray | memoryview

_VECTOR = 512  # buffers of one system call; Linux takes 1,024
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW


def make_folder(path: Path) -> None:
    """Create `path`, and not its parents, with mode 0700; nothing happens if it is there."""
    path.mkdir(mode=0o700, exist_ok=True)


def create_file(path: Path) -> int:
    """A descriptor of the new file `path`, for writing."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o600)


def open_file(path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of `path`. OSError if it is no regular file."""
    fd = os.open(path, flags | os.O_NONBLOCK | _FLAGS, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
    except BaseException:
        os.close(fd)
        raise
    return fd


def views_of(data: Bytes | Sequence[Bytes]) -> list[memoryview]:
    """One buffer, or several that follow each other in the file, as flat views. They must be contiguous."""
    parts = [data] if isinstance(data, Bytes) else data
    return [memoryview(part).cast("B") for part in parts if memoryview(part).nbytes]


def write_all(fd: int, views: Sequence[memoryview]) -> None:
    """Write all of `views` at the descriptor's position."""
    for start in range(0, len(views), _VECTOR):
        group = list(views[start : start + _VECTOR])
        while group:
            written = os.writev(fd, group)
            if written == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            group = _rest(group, written)


def read_all(fd: int, offset: int, views: Sequence[memoryview]) -> bool:
    """Fill `views` from `offset` on; False if the file ends before."""
    for start in range(0, len(views), _VECTOR):
        group = list(views[start : start + _VECTOR])
        while group:
            got = os.preadv(fd, group, offset)
            if got == 0:
                return False
            offset += got
            group = _rest(group, got)
    return True


def _rest(group: list[memoryview], done: int) -> list[memoryview]:
    """What of `group` comes after its first `done` bytes."""
    for i, view in enumerate(group):
        if done < len(view):
            return [view[done:], *group[i + 1 :]]
        done -= len(view)
    return []
