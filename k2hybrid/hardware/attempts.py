"""System calls that containers like to refuse, tried for real: only the call itself tells.

Numbers and structures are the kernel's (`asm/unistd.h`, `linux/mempolicy.h`, `linux/io_uring.h`).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
from dataclasses import dataclass

_PAGE = mmap.PAGESIZE
_MPOL_DEFAULT, _MPOL_BIND = 0, 2
_MASK_WORDS = 16  # room for 1024 nodes
_IO_URING_SETUP = 425  # the same on every architecture
_IO_URING_PARAMS_BYTES = 120
# (mbind, set_mempolicy) by machine
_NUMA_CALLS = {"x86_64": (237, 238), "aarch64": (235, 237)}


@dataclass(frozen=True, slots=True)
class Attempt:
    """A system call that was made. `error` is its errno; 0: it works; None: it could not be tried here."""

    name: str
    error: int | None

    @property
    def refused(self) -> bool:
        """Whether it was tried and does not work."""
        return bool(self.error)

    @property
    def error_name(self) -> str:
        """As `errno` spells it."""
        return errno.errorcode.get(self.error or 0, str(self.error))


@dataclass(frozen=True, slots=True)
class Attempts:
    """All of them."""

    mbind: Attempt
    set_mempolicy: Attempt
    io_uring_setup: Attempt


def attempt_all(node: int = 0) -> Attempts:
    """Try each; nothing of it stays.

    Args:
        node: a node whose memory this process may use.
    """
    return Attempts(
        Attempt("mbind", _try_mbind(node)),
        Attempt("set_mempolicy", _try_set_mempolicy()),
        Attempt("io_uring_setup", _try_io_uring()),
    )


def bind_memory(node: int) -> int | None:
    """All memory that the calling thread touches from now on comes from `node`; errno as in `Attempt`."""
    numbers = _NUMA_CALLS.get(platform.machine())
    if numbers is None:
        return None
    return _error(numbers[1], _MPOL_BIND, _mask(node), _mask_bits())


def _try_mbind(node: int) -> int | None:
    numbers = _NUMA_CALLS.get(platform.machine())
    if numbers is None:
        return None
    with mmap.mmap(-1, _PAGE) as page:
        anchor = ctypes.c_char.from_buffer(page)
        address = ctypes.addressof(anchor)
        error = _error(
            numbers[0], ctypes.c_void_p(address), ctypes.c_ulong(_PAGE), _MPOL_BIND, _mask(node),
            _mask_bits(), ctypes.c_uint(0),
        )  # fmt: skip
        del anchor  # the map cannot be closed while something points into it
    return error


def _try_set_mempolicy() -> int | None:
    numbers = _NUMA_CALLS.get(platform.machine())
    if numbers is None:
        return None
    # The default again: refused or not, the policy stays what it is on a thread that never set one.
    return _error(numbers[1], _MPOL_DEFAULT, None, ctypes.c_ulong(0))


def _try_io_uring() -> int | None:
    parameters = ctypes.create_string_buffer(_IO_URING_PARAMS_BYTES)
    result, error = _call(_IO_URING_SETUP, ctypes.c_uint(4), parameters)
    if result >= 0:
        os.close(result)
    return error


def _mask(node: int) -> ctypes.Array[ctypes.c_ulong]:
    bits = ctypes.sizeof(ctypes.c_ulong) * 8
    mask = (ctypes.c_ulong * _MASK_WORDS)()
    mask[node // bits] = 1 << (node % bits)
    return mask


def _mask_bits() -> ctypes.c_ulong:
    # The kernel takes one bit less than it is told.
    return ctypes.c_ulong(_MASK_WORDS * ctypes.sizeof(ctypes.c_ulong) * 8 + 1)


def _error(number: int, *arguments: object) -> int:
    return _call(number, *arguments)[1]


def _call(number: int, *arguments: object) -> tuple[int, int]:
    """(result, errno or 0)."""
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    ctypes.set_errno(0)
    result = int(library.syscall(ctypes.c_long(number), *arguments))
    return result, ctypes.get_errno() if result < 0 else 0
