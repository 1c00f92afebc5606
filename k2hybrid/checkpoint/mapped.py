"""A shard mapped read-only: its bytes stay where they are, in the page cache."""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from k2hybrid.checkpoint.header import PREFIX_BYTES, HeaderEntry, header_bytes, parse_header
from k2hybrid.errors import HeaderError, NativeError, ShardIndexError
from k2hybrid.native.files import FileMap

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class MappedShard:
    """One safetensors file. `bytes` is the whole file, uint8, read-only; `address` that of its first byte.

    The array keeps the map alive, and every view of it keeps the array: nothing is unmapped while in use.
    """

    path: Path
    bytes: NDArray[np.uint8]
    view: mmap.mmap
    address: int
    guard: FileMap
    header_bytes: int  # with the length before it
    header_digest: str

    def let_go(self, offset: int, nbytes: int) -> None:
        """Pages that lie whole in these bytes need not stay in memory; whoever reads them gets them again."""
        begin = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if begin < end:
            self.view.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def header_digest(head: bytes) -> str:
    """By which a file is known again: of its header with the length before it."""
    return hashlib.blake2b(head, digest_size=32).hexdigest()


def map_shard(path: Path) -> tuple[MappedShard, list[HeaderEntry]]:
    """Map `path` and parse its header; every tensor of the header then lies inside the map.

    Who shrinks the file afterwards takes its pages away: they are read as zeros, and `guard` tells.

    Raises:
        HeaderError: the file is truncated, or its header does not describe it.
        ShardIndexError: the file cannot be opened or mapped.
    """
    what = str(path)
    try:
        # A pipe in place of the file must not block the open.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode):
                raise ShardIndexError(f"{what} is not a regular file")
            prefix = file.read(PREFIX_BYTES)
            length = header_bytes(prefix, info.st_size, what)
            header = file.read(length)
            if len(header) != length:
                raise HeaderError(f"{what} is truncated: it ends inside its header")
            entries = parse_header(header, info.st_size, what)
            view = mmap.mmap(descriptor, info.st_size, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
            if os.fstat(descriptor).st_size != info.st_size:
                raise HeaderError(f"{what} changed its size while it was opened")
            content = np.frombuffer(view, dtype=np.uint8)
            guard = FileMap(content.ctypes.data, info.st_size, descriptor)
    except (OSError, ValueError, NativeError) as problem:
        raise ShardIndexError(f"{what} cannot be mapped: {problem}") from problem
    # Of the array, which goes before the map does; at the process's end threads may still read.
    weakref.finalize(content, guard.close).atexit = False
    shard = MappedShard(
        path, content, view, guard.address, guard, PREFIX_BYTES + length, header_digest(prefix + header)
    )
    return shard, entries
