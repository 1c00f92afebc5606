"""A shard mapped read-only: its bytes stay where they are, in the page cache."""

from __future__ import annotations

import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from k2hybrid.checkpoint.header import PREFIX_BYTES, HeaderEntry, header_bytes, parse_header
from k2hybrid.errors import HeaderError, ShardIndexError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class MappedShard:
    """One safetensors file. `bytes` is the whole file, uint8, read-only; `address` that of its first byte.

    The array keeps the map alive, and every view of it keeps the array: nothing is unmapped while in use.
    """

    path: Path
    bytes: NDArray[np.uint8]
    address: int


def map_shard(path: Path) -> tuple[MappedShard, list[HeaderEntry]]:
    """Map `path` and parse its header; every tensor of the header then lies inside the map.

    Whoever shrinks the file afterwards takes the pages away (SIGBUS), as with any mapped file.

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
            length = header_bytes(file.read(PREFIX_BYTES), info.st_size, what)
            header = file.read(length)
            if len(header) != length:
                raise HeaderError(f"{what} is truncated: it ends inside its header")
            entries = parse_header(header, info.st_size, what)
            view = mmap.mmap(descriptor, info.st_size, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
            if os.fstat(descriptor).st_size != info.st_size:
                raise HeaderError(f"{what} changed its size while it was opened")
    except (OSError, ValueError) as problem:
        raise ShardIndexError(f"{what} cannot be mapped: {problem}") from problem
    content = np.frombuffer(view, dtype=np.uint8)
    return MappedShard(path, content, content.ctypes.data), entries
