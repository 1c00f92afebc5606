"""submit → ticket → collect recorded on a stream, captured or not; the routed experts answer on the CPU.

The contract stands at the top of `csrc/experts/dispatch.h`, its other side in `csrc/gpu/handoff.h`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch

from k2hybrid.errors import EngineError, NativeError
from k2hybrid.experts.store import ExpertStore
from k2hybrid.hardware.streams import SignalStream
from k2hybrid.native.handoff import HandoffReport, NativeHandoff
from k2hybrid.native.machine import Machine
from k2hybrid.types import TicketStats

# As the dispatcher's own watchdog. An error is promised within a second: the watcher looks every 20 ms, and
# what of a step is left on the stream, its waits poisoned, has to run.
TIMEOUT_MS = 800.0

_NOTHING = TicketStats(0, 0, 0.0, 0.0)


class Handoff:
    """The routed experts of `layers` for a stream (`types.SteppedExperts`).

    A step is what is launched between `begin` and `end`: a replayed graph, or the same calls run eagerly.
    Only `begin` and `end` touch the CPU's side; `submit` and `collect` record a copy, a ring, a wait and a
    copy, so they may be captured, outside of any step, and replayed in every step that lists their layers.

    One thread drives it. `abort` may come from any.

    Args:
        stream: what the device computes on.
        layers: those that have routed experts.
        max_rows: of a step.
        timeout_ms: without any progress of the CPU, after which a step is aborted.

    Raises:
        NativeError: sizes are wrong, or memory cannot be pinned.
    """

    def __init__(
        self,
        store: ExpertStore,
        machine: Machine,
        stream: SignalStream,
        *,
        layers: Sequence[int],
        max_rows: int,
        top_k: int,
        timeout_ms: float = TIMEOUT_MS,
    ) -> None:
        self.hidden, self.max_rows, self.top_k = store.hidden, max_rows, top_k
        self.stats = _NOTHING
        self._stream = stream
        self._places = {layer: place for place, layer in enumerate(layers)}
        if not layers or len(self._places) != len(layers):
            raise NativeError("a hand-off needs layers, each once")
        self._words = stream.words(len(layers))
        self.native = NativeHandoff(
            store.native,
            machine,
            hidden=store.hidden,
            max_rows=max_rows,
            top_k=top_k,
            layers=layers,
            owner=self._words,
            words=self._words.address,
            timeout_ms=timeout_ms,
        )
        pinned: list[int] = []
        # Also when it is forgotten, or the interpreter ends: a step that is open must not outlive its memory.
        self._finalizer = weakref.finalize(self, _close, self.native, stream, pinned)
        for buffer in self.native.slot:
            stream.pin(buffer.data_ptr(), buffer.nbytes)
            pinned.append(buffer.data_ptr())
        self._step: tuple[int, ...] | None = None  # layers of the open step
        self._left: tuple[int, ...] = ()  # those that may still be submitted eagerly
        self._given_up = stream.given_up
        self._in_flight = False  # submitted, not collected

    def begin(self, layers: Sequence[int], rows: int) -> None:
        """Open a step, before anything of it is launched; after one that was aborted, make good first.

        Args:
            layers: that will ring, in this order; none is allowed.
            rows: valid ones, 1 … max_rows. Tensors may have more: those are not looked at, and what comes
                back for them is of no use.

        Raises:
            EngineError: the step before is open, or a worker that was stuck has not come back.
            NativeError: closed, or the arguments do not fit.
        """
        if self.native.aborted:
            self._recover()
        elif self._step is not None:
            raise EngineError("a step of the hand-off is open; end it, or abort it, before the next begins")
        if layers:
            self.native.begin(layers, rows)
        self._step = self._left = tuple(layers)
        self._in_flight = False

    def submit(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> StreamTicket:
        """Record the copies to the CPU and the ring.

        Args:
            x: bf16 [rows, hidden] on the stream's device, rows ≤ max_rows; so are the others.
            ids: int32 [rows, top_k]; −1 is padding and reads nothing.
            weights: fp32 [rows, top_k].

        Raises:
            NativeError: wrong shapes, types or devices, or a ticket is not collected yet.
            EngineError: not captured, and the open step does not expect this layer.
        """
        rows = x.shape[0]
        slot = self.native.slot
        fits = x.shape == (rows, self.hidden) and ids.shape == (rows, self.top_k)
        alike = all(
            given.dtype == buffer.dtype and given.device == self._stream.device
            for given, buffer in zip((x, ids, weights), slot, strict=False)
        )
        if rows > self.max_rows or not fits or weights.shape != ids.shape or not alike:
            raise NativeError(
                f"submit takes up to {self.max_rows} rows of {self.hidden} bfloat16 and "
                f"{self.top_k} int32 and float32 on {self._stream.device}; x {_told(x)}, ids {_told(ids)}, "
                f"weights {_told(weights)}"
            )
        if layer not in self._places:
            raise NativeError(f"layer {layer} has no routed experts here")
        if not self._stream.capturing:
            self._expect(layer)
        # There is one slot: copies into it would overwrite what the CPU may still read.
        if self._in_flight:
            raise NativeError("a hand-off of this stream is in flight; collect its ticket first")
        for buffer, given in zip(slot, (x, ids, weights), strict=False):
            self._stream.copy(buffer[:rows], given.contiguous())
        self._stream.ring(self._words, self._places[layer])
        self._in_flight = True
        return StreamTicket(self, layer, rows)

    def end(self) -> set[int]:
        """Wait for the stream and close the step.

        Returns:
            Rows whose result is not to be used, since one of their experts could not be read.

        Raises:
            EngineError: no step is open, or it did not complete: a worker was stuck, an answer failed, a
                layer was never handed off, or it was aborted. None of its rows is to be used; the next
                `begin` makes good.
        """
        if self._step is None:
            raise EngineError("no step of the hand-off is open")
        layers, self._step, self._left = self._step, None, ()
        self._stream.synchronize()
        self.stats = _NOTHING
        if not layers:
            return set()
        try:
            report = self.native.end()
        except NativeError as missing:
            self.abort()
            raise EngineError(f"a step of the hand-off did not complete: {missing}") from None
        self.stats = TicketStats(report.bytes_read, report.misses, report.wait_ns / 1e6, report.busy_ns / 1e6)
        if report.aborted:
            raise EngineError(_why(report))
        if self._stream.given_up != self._given_up:
            self.abort()
            raise EngineError("the device gave up waiting for the routed experts, which went on")
        return set(report.lost_rows)

    def abort(self) -> None:
        """Complete every wait, recorded or running, as poisoned: `end` will say so. From any thread."""
        self.native.abort()

    def close(self) -> None:
        """Abort what is open, wait for the stream, end the threads. Repeatedly."""
        self._finalizer()

    def _collect(self, layer: int, rows: int) -> torch.Tensor:
        out = torch.empty(rows, self.hidden, dtype=torch.float32, device=self._stream.device)
        self._stream.wait(self._words, self._places[layer])
        self._stream.copy(out, self.native.slot.out[:rows])
        self._in_flight = False
        return out

    def _expect(self, layer: int) -> None:
        """What is rung without a step, or out of turn, would wait until the watchdog comes."""
        if layer not in self._left:
            expected = list(self._left) or "none"
            raise EngineError(f"layer {layer} is not what the open step of the hand-off expects: {expected}")
        self._left = self._left[self._left.index(layer) + 1 :]

    def _recover(self) -> None:
        self._stream.synchronize()
        try:
            self.native.reset()
        except NativeError as stuck:
            raise EngineError(
                f"the routed experts have not come back from an aborted step ({stuck}); requests are served "
                "again once they do: look for a disk that hangs"
            ) from None
        self._step, self._left = None, ()
        self._given_up = self._stream.given_up


class StreamTicket:
    """One recorded hand-off (`types.Ticket`). What it cost and lost is known when its step ends."""

    def __init__(self, handoff: Handoff, layer: int, rows: int) -> None:
        self._handoff = handoff
        self._layer = layer
        self._rows = rows
        self._collected = False

    def collect(self) -> torch.Tensor:
        """Record the wait and the copy; the routed sum, fp32 [rows, hidden] on the device. Once only.

        Raises:
            NativeError: collected before.
        """
        if self._collected:
            raise NativeError("this ticket is not outstanding")
        self._collected = True
        return self._handoff._collect(self._layer, self._rows)

    @property
    def failed_rows(self) -> tuple[int, ...]:
        """None yet: `Handoff.end` tells."""
        return ()

    @property
    def stats(self) -> TicketStats:
        """Nothing yet: `Handoff.stats` tells."""
        return _NOTHING


def _close(native: NativeHandoff, stream: SignalStream, pinned: Sequence[int]) -> None:
    native.abort()
    try:
        stream.synchronize()
        for address in pinned:
            stream.unpin(address)
    finally:
        native.close()


def _why(report: HandoffReport) -> str:
    done = f"after {report.answered} of {report.layers} layers"
    if report.aborted == "watchdog":
        return (
            f"the routed experts made no progress {done}, at layer {report.next_layer}: a worker is stuck, "
            "or another layer was handed off than was announced"
        )
    if report.aborted == "answer threw":
        return f"the routed experts failed {done}: {report.error}"
    return f"the hand-off to the routed experts was aborted {done}"


def _told(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
