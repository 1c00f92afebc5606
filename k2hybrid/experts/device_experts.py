"""The routed experts of a device, whichever way a pass takes: handed to the CPU, on the card, streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from k2hybrid.experts.handoff import Handoff
from k2hybrid.experts.hot_keeper import HotKeeper
from k2hybrid.experts.hybrid import HybridExperts
from k2hybrid.experts.prefill_stream import StreamedExperts
from k2hybrid.experts.split import SplitRates, streams
from k2hybrid.types import Ticket, TicketStats


class DeviceExperts:
    """`SteppedExperts`: steps of few rows are split between card and CPU, larger ones go over the bus.

    Args:
        handoff: takes steps of up to `handoff.max_rows` rows.
        hybrid: records on the same stream, with `handoff` as its CPU side.
        streamed: takes the larger ones; None: there are none.
        keeper: of the experts that lie on the card.
    """

    def __init__(
        self,
        handoff: Handoff,
        hybrid: HybridExperts,
        streamed: StreamedExperts | None,
        keeper: HotKeeper,
    ) -> None:
        self.keeper = keeper
        self._handoff = handoff
        self._hybrid = hybrid
        self._streamed = streamed
        self._streaming = self._quiet = False
        self._streamed_stats = TicketStats(0, 0, 0.0, 0.0)

    def begin(self, layers: Sequence[int], rows: int) -> None:
        """See `SteppedExperts.begin`. Experts come to the card and leave it here, between two steps."""
        self.keeper.between_steps()
        self._streaming = self._streamed is not None and rows > self._handoff.max_rows
        self._streamed_stats = TicketStats(0, 0, 0.0, 0.0)
        self._handoff.begin(() if self._streaming else layers, rows)

    def submit(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Ticket:
        """See `RoutedExperts.submit`. The tickets of a streamed step know by themselves what they lost."""
        if self._streaming:
            assert self._streamed is not None
            return _StreamedTicket(self, self._streamed.submit(layer, x, ids, weights))
        if self._quiet:
            ids = torch.full_like(ids, -1)
        return self._hybrid.submit(layer, x, ids, weights)

    def end(self) -> set[int]:
        """See `SteppedExperts.end`."""
        return self._handoff.end()

    def abort(self) -> None:
        """See `SteppedExperts.abort`."""
        self._handoff.abort()

    @property
    def stats(self) -> TicketStats:
        """See `SteppedExperts.stats`."""
        ended, streamed = self._handoff.stats, self._streamed_stats
        return TicketStats(
            ended.bytes_read + streamed.bytes_read,
            ended.misses + streamed.misses,
            ended.wait_ms + streamed.wait_ms,
            ended.busy_ms + streamed.busy_ms,
        )

    @property
    def handed_rows(self) -> int:
        """Steps of more rows are streamed."""
        return self._handoff.max_rows

    @property
    def locked_bytes(self) -> int:
        """Of slots in RAM that experts are streamed from, page-locked."""
        return 0 if self._streamed is None else self._streamed.locked_bytes

    def settle(self) -> None:
        """Until nothing is on its way to the card: what is captured then has the stream to itself."""
        self.keeper.slots.wait()

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Steps go all the same ways, but no row has an expert: none is read, and none is counted as used."""
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False

    def close(self) -> None:
        """End threads; no step may be open."""
        with ExitStack() as parts:
            parts.callback(self._handoff.close)
            if self._streamed is not None:
                parts.callback(self._streamed.close)
            parts.callback(self.keeper.slots.close)

    def _count(self, stats: TicketStats) -> None:
        before = self._streamed_stats
        self._streamed_stats = TicketStats(
            before.bytes_read + stats.bytes_read,
            before.misses + stats.misses,
            before.wait_ms + stats.wait_ms,
            before.busy_ms + stats.busy_ms,
        )


class _StreamedTicket:
    """A ticket whose costs are added to its step's."""

    def __init__(self, experts: DeviceExperts, ticket: Ticket) -> None:
        self._experts = experts
        self._ticket = ticket

    def collect(self) -> torch.Tensor:
        out = self._ticket.collect()
        self._experts._count(self._ticket.stats)
        return out

    @property
    def failed_rows(self) -> tuple[int, ...]:
        return self._ticket.failed_rows

    @property
    def stats(self) -> TicketStats:
        return self._ticket.stats


def handed_rows(rates: SplitRates, chunk: int, least: int, top_k: int, experts: int) -> int:
    """The most rows of a step that are better handed to the CPU than streamed; `least` always are.

    Where more rows never make streaming worse, as where the card computes a row faster than the CPU, there is
    one such border; elsewhere it is one of several.
    """
    low, high = min(least, chunk), chunk
    while low < high:
        middle = (low + high + 1) // 2
        if streams(rates, middle, top_k, experts):
            high = middle - 1
        else:
            low = middle
    return low
