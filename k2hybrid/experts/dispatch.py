"""submit → Ticket → collect on the CPU; the contract stands at the top of `csrc/experts/dispatch.h`."""

from __future__ import annotations

import torch

from k2hybrid.errors import NativeError
from k2hybrid.experts.store import ExpertStore
from k2hybrid.native.handoff import CollectReport, NativeDispatcher
from k2hybrid.native.machine import Machine
from k2hybrid.types import TicketStats

SLOTS = 2  # one that computes, one that is being filled


class Dispatcher:
    """The routed experts of all layers, for at most `max_rows` rows a call (`types.RoutedExperts`)."""

    def __init__(self, store: ExpertStore, machine: Machine, *, max_rows: int, top_k: int) -> None:
        self.max_rows = max_rows
        self.top_k = top_k
        self.hidden = store.hidden
        self.native = NativeDispatcher(
            store.native, machine, hidden=store.hidden, max_rows=max_rows, top_k=top_k, slots=SLOTS
        )

    def submit(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> CpuTicket:
        """Start the routed experts of `layer`.

        Args:
            x: bf16 [rows, hidden], rows ≤ max_rows.
            ids: int32 [rows, top_k]; −1 is padding and reads nothing.
            weights: fp32 [rows, top_k].

        Raises:
            NativeError: wrong shapes, an id out of range, or all slots in flight.
        """
        rows = x.shape[0]
        fits = x.shape == (rows, self.hidden) and ids.shape == (rows, self.top_k)
        if rows > self.max_rows or not fits or weights.shape != ids.shape:
            raise NativeError(
                f"submit takes up to {self.max_rows} rows of {self.hidden} values and {self.top_k} experts; "
                f"x {list(x.shape)}, ids {list(ids.shape)}, weights {list(weights.shape)}"
            )
        index = self.native.acquire()
        slot = self.native.slots[index]
        slot.x[:rows].copy_(x)
        slot.ids[:rows].copy_(ids)
        slot.weights[:rows].copy_(weights)
        return CpuTicket(self.native, index, self.native.submit(index, layer, rows), rows)

    def abort(self) -> None:
        """Complete every outstanding and later ticket as poisoned."""
        self.native.abort()


class CpuTicket:
    """One hand-off in flight (`types.Ticket`)."""

    def __init__(self, native: NativeDispatcher, slot: int, epoch: int, rows: int) -> None:
        self._native = native
        self._slot = slot
        self._epoch = epoch
        self._rows = rows
        self._report: CollectReport | None = None

    def collect(self) -> torch.Tensor:
        """The routed sum, fp32 [rows, hidden]. Once only.

        Raises:
            NativeError: collected before.
        """
        self._report = self._native.collect(self._slot, self._epoch, self._rows)
        return self._native.slots[self._slot].out[: self._rows].clone()

    @property
    def report(self) -> CollectReport:
        """What the hand-off told; after `collect`."""
        if self._report is None:
            raise NativeError("collect the ticket before asking what it cost")
        return self._report

    @property
    def failed_rows(self) -> tuple[int, ...]:
        """Rows whose result is not to be used: an expert could not be read, or the hand-off was aborted."""
        return tuple(row for row, status in enumerate(self.report.status) if status != 0)

    @property
    def stats(self) -> TicketStats:
        """Bytes, misses and times of this hand-off."""
        r = self.report
        return TicketStats(r.bytes_read, r.misses, r.wait_ns / 1e6, r.busy_ns / 1e6)
