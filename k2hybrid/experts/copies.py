"""Copies between host and device memory, beside what the device computes: the protocol, and who does it.

fence = copies.fence()                      all that was queued on the device so far
arrival = copies.copy(to, [host], fence)    starts after the fence, runs beside what is queued later
arrival.order()                             what is queued from now on comes after the copy
arrival.wait()                              the host waits: its buffer may be written again
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from k2hybrid.errors import NativeError
from k2hybrid.hardware.cuda_driver import CudaDriver


class Fence(Protocol):
    """A place in the device's order of work."""

    def wait(self) -> None:
        """Wait, on the host, until the device has come so far."""


class Arrival(Fence, Protocol):
    """A copy that was begun."""

    def done(self) -> bool:
        """Whether it is over; does not wait."""

    def order(self) -> None:
        """Put all that this thread queues on the device from now on after it; does not wait."""


class CopyEngine(Protocol):
    """Begins copies. Buffers and targets must live until they are over."""

    def buffer(self, nbytes: int) -> torch.Tensor:
        """Host memory to copy from or to, uint8 [nbytes], page-locked where a copy needs it."""

    def lock(self, address: int, nbytes: int) -> str:
        """Page-lock memory of the process that is no `buffer`, to copy from; any thread.

        Returns:
            Why it is refused, or "".
        """

    def unlock(self, address: int) -> None:
        """Undo `lock`; no copy from it may be under way."""

    def fence(self) -> Fence:
        """What this thread has queued on the device so far."""

    def copy(self, to: torch.Tensor, host: Sequence[torch.Tensor], after: Fence) -> Arrival:
        """Begin to copy host memory to the device, after `after` and beside what is queued later.

        Args:
            to: as many bytes as the pieces of `host` have together; they come one behind the other.
        """

    def in_order(self, to: torch.Tensor, source: torch.Tensor) -> Arrival:
        """Queue a copy, in either direction, among what the device computes."""


def copy_pieces(to: torch.Tensor, host: Sequence[torch.Tensor]) -> None:
    """Copy one behind the other."""
    at = 0
    for piece in host:
        to[at : at + len(piece)].copy_(piece, non_blocking=True)
        at += len(piece)


class _Over:
    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return

    def order(self) -> None:
        return


class InlineCopies:
    """`CopyEngine` of the emulated device, which computes inline too: a copy is over when it returns."""

    def buffer(self, nbytes: int) -> torch.Tensor:
        """See `CopyEngine.buffer`."""
        return torch.zeros(nbytes, dtype=torch.uint8)

    def lock(self, address: int, nbytes: int) -> str:
        """See `CopyEngine.lock`: any memory will do."""
        return ""

    def unlock(self, address: int) -> None:
        """See `CopyEngine.unlock`."""

    def fence(self) -> Fence:
        """See `CopyEngine.fence`."""
        return _Over()

    def copy(self, to: torch.Tensor, host: Sequence[torch.Tensor], after: Fence) -> Arrival:
        """See `CopyEngine.copy`."""
        after.wait()
        copy_pieces(to, host)
        return _Over()

    def in_order(self, to: torch.Tensor, source: torch.Tensor) -> Arrival:
        """See `CopyEngine.in_order`."""
        to.copy_(source)
        return _Over()


class _Event:
    """A place in a CUDA stream."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream) -> None:
        self._device = device
        self.event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # no spinning
        self.event.record(stream)

    def done(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self.event.synchronize()

    def order(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self.event)


class CudaCopies:
    """`CopyEngine` of a CUDA device: copies have a stream of their own. Not to be used during a capture."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._driver = CudaDriver()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Threads that lock may have done nothing on a card before, and torch enters the first one lazily.
        ordinal = torch.cuda.current_device() if device.index is None else device.index
        self._context = self._driver.primary_context(ordinal)

    def buffer(self, nbytes: int) -> torch.Tensor:
        """See `CopyEngine.buffer`."""
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)

    def lock(self, address: int, nbytes: int) -> str:
        """See `CopyEngine.lock`."""
        try:
            self._driver.enter(self._context)
            self._driver.register_host(address, nbytes)
        except NativeError as error:
            return str(error)
        return ""

    def unlock(self, address: int) -> None:
        """See `CopyEngine.unlock`."""
        self._driver.enter(self._context)
        self._driver.unregister_host(address)

    def fence(self) -> Fence:
        """See `CopyEngine.fence`."""
        return _Event(self._device, torch.cuda.current_stream(self._device))

    def copy(self, to: torch.Tensor, host: Sequence[torch.Tensor], after: Fence) -> Arrival:
        """See `CopyEngine.copy`; `after` is a fence of this engine, or an arrival."""
        assert isinstance(after, _Event)
        self._stream.wait_event(after.event)
        with torch.cuda.stream(self._stream):
            copy_pieces(to, host)
        return _Event(self._device, self._stream)

    def in_order(self, to: torch.Tensor, source: torch.Tensor) -> Arrival:
        """See `CopyEngine.in_order`."""
        to.copy_(source, non_blocking=True)
        return _Event(self._device, torch.cuda.current_stream(self._device))
