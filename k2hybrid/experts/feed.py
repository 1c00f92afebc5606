"""Experts' bytes as host memory that a copy to the card can start from, read ahead of it.

in a page-locked slot   borrowed, and given back when the copy is over (`locked_slots`)
anywhere else           read by threads into a ring of page-locked buffers
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from k2hybrid.experts.copies import Arrival, CopyEngine
from k2hybrid.experts.device_slots import ExpertSource
from k2hybrid.experts.locked_slots import LockedSlots


@dataclass(frozen=True, slots=True)
class _Filled:
    """What a thread brought; no pieces: it could not be read."""

    pieces: Sequence[torch.Tensor]
    borrowed: bool = False


class ExpertFeed:
    """The ring, its threads, and the slots that are locked. One `Feeding` at a time.

    Args:
        buffers: experts that fit into the ring; so many are read ahead.
        threads: that read.
    """

    def __init__(
        self, source: ExpertSource, copies: CopyEngine, expert_bytes: int, *, buffers: int, threads: int
    ) -> None:
        self._source = source
        self._locked = LockedSlots(source, copies)
        self._buffers = [copies.buffer(expert_bytes) for _ in range(buffers)]
        self._sent: list[Arrival | None] = [None] * buffers
        self._fillers = ThreadPoolExecutor(threads, thread_name_prefix="expert-stream")

    @property
    def ahead(self) -> int:
        """Experts that are read before their turn."""
        return len(self._buffers)

    @property
    def nbytes(self) -> int:
        """Of the ring, page-locked."""
        return sum(buffer.nbytes for buffer in self._buffers)

    @property
    def locked_bytes(self) -> int:
        """Of slots, page-locked."""
        return self._locked.nbytes

    def begin(self, layer: int, expert: int, buffer: int) -> Future[_Filled]:
        """Begin to read."""
        return self._fillers.submit(self._fill, layer, expert, buffer)

    def sent(self, buffer: int, arrival: Arrival) -> None:
        """A copy from the buffer is under way, and nobody writes into it before that is over."""
        self._sent[buffer] = arrival

    def give_back(self, layer: int, expert: int) -> None:
        """A borrowed expert was copied, or will not be."""
        self._locked.give_back(layer, expert)

    def close(self) -> None:
        """End the threads and unlock; nothing may be under way."""
        try:
            self._fillers.shutdown()
        finally:
            self._locked.close()

    def _fill(self, layer: int, expert: int, buffer: int) -> _Filled:
        borrowed = self._locked.borrow(layer, expert)
        if borrowed is not None:
            return _Filled(borrowed, borrowed=True)
        sent = self._sent[buffer]
        if sent is not None:
            sent.wait()
        to = self._buffers[buffer]
        return _Filled([to] if self._source.copy_expert(layer, expert, to) else [])


class Feeding:
    """Some experts of a layer, in turn. `close` it whatever happens.

    Attributes:
        direct: experts that were copied from their slots.
    """

    def __init__(self, feed: ExpertFeed, layer: int, experts: Sequence[int]) -> None:
        self._feed = feed
        self._layer = layer
        self._experts = experts
        self._fills: list[Future[_Filled]] = []
        self._taken = 0
        self._loans: deque[tuple[int, Arrival]] = deque()
        self.direct = 0
        for _ in range(min(feed.ahead, len(experts))):
            self._begin_next()

    def take(self) -> Sequence[torch.Tensor]:
        """The next expert's bytes, piece after piece; none: it could not be read. Then say `sent`."""
        return self._fills[self._taken].result().pieces

    def sent(self, arrival: Arrival | None) -> None:
        """The copy of what was taken is under way; None: there is nothing to copy."""
        filled = self._fills[self._taken].result()
        if arrival is not None and filled.borrowed:
            self._loans.append((self._experts[self._taken], arrival))
            self.direct += 1
        elif arrival is not None:
            self._feed.sent(self._taken % self._feed.ahead, arrival)
        self._taken += 1
        if len(self._fills) < len(self._experts):
            self._begin_next()
        while self._loans and self._loans[0][1].done():
            self._feed.give_back(self._layer, self._loans.popleft()[0])

    def close(self) -> None:
        """Wait until nobody reads into the buffers, and no slot is copied from."""
        wait(self._fills)
        for expert, fill in list(zip(self._experts, self._fills, strict=False))[self._taken :]:
            if fill.exception() is None and fill.result().borrowed:
                self._feed.give_back(self._layer, expert)
        self._taken = len(self._fills)
        with ExitStack() as loans:  # all are given back, whichever copy fails
            while self._loans:
                expert, arrival = self._loans.popleft()
                loans.callback(self._feed.give_back, self._layer, expert)
                loans.callback(arrival.wait)

    def _begin_next(self) -> None:
        at = len(self._fills)
        self._fills.append(self._feed.begin(self._layer, self._experts[at], at % self._feed.ahead))
