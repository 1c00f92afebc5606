"""The hand-off of experts' work: to whoever calls (`NativeDispatcher`), or to a stream (`NativeHandoff`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from k2hybrid.native.extension import ERRORS, EXTENSION
from k2hybrid.native.machine import Machine
from k2hybrid.native.store import NativeStore
from k2hybrid.native.tensors import view_of


class NativeSlot(NamedTuple):
    """Torch views of a slot's buffers at their fixed addresses, each in pages of its own."""

    x: torch.Tensor  # bf16 [max_rows, hidden]
    ids: torch.Tensor  # int32 [max_rows, top_k]
    weights: torch.Tensor  # fp32 [max_rows, top_k]
    out: torch.Tensor  # fp32 [max_rows, hidden]


class CollectReport(NamedTuple):
    """What `NativeDispatcher.collect` tells: a status byte per row (0: good), bytes, misses, nanoseconds."""

    status: bytes
    bytes_read: int
    misses: int
    busy_ns: int
    wait_ns: int


class NativeDispatcher:
    """The hand-off of `csrc/experts/dispatch.h`, slots as tensors."""

    def __init__(
        self, store: NativeStore, machine: Machine, *, hidden: int, max_rows: int, top_k: int, slots: int
    ) -> None:
        with ERRORS:
            self.handle = EXTENSION.Dispatcher(store.handle, machine.handle, max_rows, top_k, slots)
        self.slots = [_slot(self.handle, i, hidden, max_rows, top_k) for i in range(slots)]

    def acquire(self) -> int:
        """A free slot to fill."""
        with ERRORS:
            return int(self.handle.acquire())

    def submit(self, slot: int, layer: int, rows: int) -> int:
        """Start the slot's first `rows` rows; returns the epoch that `collect` wants."""
        with ERRORS:
            return int(self.handle.submit(slot, layer, rows))

    def collect(self, slot: int, epoch: int, rows: int) -> CollectReport:
        """Wait for the ticket; the result lies in the slot's `out`."""
        with ERRORS:
            return CollectReport(*self.handle.collect(slot, epoch, rows))

    def abort(self) -> None:
        """Every outstanding and later ticket completes as poisoned."""
        self.handle.abort()


class HandoffReport(NamedTuple):
    """What `NativeHandoff.end` tells of a step."""

    epoch: int
    layers: int
    answered: int
    aborted: str  # "" in a good step, else "asked", "watchdog" or "answer threw"
    error: str  # of an answer that threw
    next_layer: int  # the first that has no answer; −1: none
    lost_rows: list[int]  # an expert of theirs could not be read
    bytes_read: int
    misses: int
    busy_ns: int
    wait_ns: int


class NativeHandoff:
    """The thread that answers a stream; see `csrc/gpu/handoff.h`.

    Args:
        layers: those that may ring; slot i of the words is `layers[i]`'s.
        owner: of the words, which lie at `words`, aligned to 128 bytes.
        timeout_ms: without an answer or a sign of life, for which a step is aborted.
    """

    def __init__(
        self,
        store: NativeStore,
        machine: Machine,
        *,
        hidden: int,
        max_rows: int,
        top_k: int,
        layers: Sequence[int],
        owner: object,
        words: int,
        timeout_ms: float,
    ) -> None:
        with ERRORS:
            self.handle = EXTENSION.Handoff(
                store.handle, machine.handle, max_rows, top_k, list(layers), owner, words, timeout_ms
            )
        self.slot = _slot(self.handle, 0, hidden, max_rows, top_k)

    def begin(self, layers: Sequence[int], rows: int) -> int:
        """Open a step and return its epoch."""
        with ERRORS:
            return int(self.handle.begin(list(layers), rows))

    def end(self) -> HandoffReport:
        """Close the step; the stream must be idle."""
        with ERRORS:
            return HandoffReport(**self.handle.end())

    def abort(self) -> None:
        """Complete every wait as poisoned. From any thread; nothing happens once it is closed."""
        self.handle.abort()

    @property
    def aborted(self) -> bool:
        """Whether `reset` comes before the next step."""
        with ERRORS:
            return bool(self.handle.aborted())

    def reset(self) -> None:
        """Back to a clean state; the stream must be idle. `NativeError` while a worker is stuck."""
        with ERRORS:
            self.handle.reset()

    def close(self) -> None:
        """End the threads, an open step as aborted; the slot's memory stays. Repeatedly."""
        self.handle.close()

    def stall_at(self, layer: int) -> None:
        """For tests: the answering thread stands still at `layer`; −1: it goes on."""
        self.handle.stall_at(layer)


def _slot(handle: Any, slot: int, hidden: int, max_rows: int, top_k: int) -> NativeSlot:
    x, ids, weights, out = handle.buffers(slot)
    return NativeSlot(
        view_of(handle, x, torch.bfloat16, max_rows, hidden),
        view_of(handle, ids, torch.int32, max_rows, top_k),
        view_of(handle, weights, torch.float32, max_rows, top_k),
        view_of(handle, out, torch.float32, max_rows, hidden),
    )
