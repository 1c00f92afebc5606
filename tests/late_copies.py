"""A copy engine whose copies happen as late as they may, and that sees who would read or write too early."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from k2hybrid.experts.copies import Arrival, Fence, InlineCopies, copy_pieces


class LateCopies(InlineCopies):
    """Copies beside the compute happen when somebody waits for them or orders work behind them.

    Host memory that is written again before that gives wrong bytes. `computed` tells of work that reads
    device memory: a copy to it must come after a fence behind that work.

    Attributes:
        copied: bytes, of copies beside the compute.
        pending: copies that did not happen yet.
        lockable: so many times memory can be locked.
        locked: bytes by address.
    """

    def __init__(self, lockable: int = 1000) -> None:
        self.lockable = lockable
        self.locked: dict[int, int] = {}
        self.copied = 0
        self.pending = 0
        self._work = 0
        self._last_read: dict[int, int] = {}

    def lock(self, address: int, nbytes: int) -> str:
        """See `CopyEngine.lock`."""
        assert address not in self.locked
        if len(self.locked) == self.lockable:
            return "no more"
        self.locked[address] = nbytes
        return ""

    def unlock(self, address: int) -> None:
        """See `CopyEngine.unlock`."""
        assert not self.pending
        del self.locked[address]

    def computed(self, memory: torch.Tensor) -> None:
        """Work that reads `memory` was queued."""
        self._work += 1
        self._last_read[memory.data_ptr()] = self._work

    def fence(self) -> Fence:
        """See `CopyEngine.fence`."""
        return _LateFence(self._work)

    def copy(self, to: torch.Tensor, host: Sequence[torch.Tensor], after: Fence) -> Arrival:
        """See `CopyEngine.copy`."""
        assert isinstance(after, _LateFence)
        assert after.work >= self._last_read.get(to.data_ptr(), 0), "device memory is still being read"
        self.copied += to.nbytes
        return _LateArrival(self, to, host)


class _LateFence:
    def __init__(self, work: int) -> None:
        self.work = work

    def wait(self) -> None:
        return


class _LateArrival:
    def __init__(self, copies: LateCopies, to: torch.Tensor, host: Sequence[torch.Tensor]) -> None:
        self._copies, self._to, self._host = copies, to, host
        self._over = False
        self._lock = threading.Lock()
        copies.pending += 1

    def done(self) -> bool:
        return self._over

    def wait(self) -> None:
        with self._lock:
            if not self._over:
                copy_pieces(self._to, self._host)
                self._over = True
                self._copies.pending -= 1

    def order(self) -> None:
        self.wait()
