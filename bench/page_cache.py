"""What the page cache holds of a checkpoint, and how to change that before a measurement."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np

from k2hybrid.experts.store import ExpertStore

PAGE = os.sysconf("SC_PAGE_SIZE")


def cached_bytes(store: ExpertStore) -> int:
    """What the page cache holds of the routed experts."""
    libc = ctypes.CDLL(None, use_errno=True)
    found = 0
    for tensor in (tensor for key in store.keys for tensor in store.tensors(*key)):
        first = tensor.address // PAGE * PAGE
        pages = -(-(tensor.address + tensor.nbytes - first) // PAGE)
        held = np.zeros(pages, np.uint8)
        if libc.mincore(
            ctypes.c_void_p(first), ctypes.c_size_t(pages * PAGE), ctypes.c_void_p(held.ctypes.data)
        ):
            raise OSError(ctypes.get_errno(), "mincore")
        found += PAGE * int((held & 1).sum())
    return found


def forget(model: Path) -> None:
    """Let the page cache forget the model's files, as far as nobody maps them."""
    for path in model.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def remember(model: Path) -> None:
    """Bring the model's files into the page cache."""
    buffer = bytearray(8 << 20)
    for path in model.glob("*.safetensors"):
        at, descriptor = 0, os.open(path, os.O_RDONLY)
        while got := os.preadv(descriptor, [buffer], at):
            at += got
        os.close(descriptor)
