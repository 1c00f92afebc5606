"""Counts what a model reads: weights as they are handed out, experts as they are collected. Layer 5."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from k2hybrid.engine.metrics import ByteMeter
from k2hybrid.types import LinearWeight, RoutedExperts, SteppedExperts, Ticket, TicketStats, WeightSource


class MeteredWeights:
    """A `WeightSource` that adds what it hands out to `meter.step_bytes`: every step reads it once.

    The embedding is left out: of it a step reads one row per token.
    """

    def __init__(self, source: WeightSource, meter: ByteMeter) -> None:
        self._source = source
        self._meter = meter

    def take(self, layer: int | None, role: str) -> LinearWeight:
        """See `WeightSource.take`."""
        weight = self._source.take(layer, role)
        if role != "embed_tokens":
            self._meter.step_bytes += weight.nbytes
        return weight


class MeteredExperts:
    """`RoutedExperts` whose tickets add the bytes they read to `meter.expert_bytes`."""

    def __init__(self, experts: RoutedExperts, meter: ByteMeter) -> None:
        self._experts = experts
        self._meter = meter

    def submit(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Ticket:
        """See `RoutedExperts.submit`."""
        return _MeteredTicket(self._experts.submit(layer, x, ids, weights), self._meter)


class MeteredSteps:
    """`SteppedExperts` whose steps, also failed ones, add the bytes they read to `meter.expert_bytes`."""

    def __init__(self, experts: SteppedExperts, meter: ByteMeter) -> None:
        self._experts = experts
        self._meter = meter

    def begin(self, layers: Sequence[int], rows: int) -> None:
        """See `SteppedExperts.begin`."""
        self._experts.begin(layers, rows)

    def submit(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Ticket:
        """See `RoutedExperts.submit`."""
        return self._experts.submit(layer, x, ids, weights)

    def end(self) -> set[int]:
        """See `SteppedExperts.end`."""
        try:
            return self._experts.end()
        finally:
            self._meter.expert_bytes += self._experts.stats.bytes_read

    def abort(self) -> None:
        """See `SteppedExperts.abort`."""
        self._experts.abort()

    @property
    def stats(self) -> TicketStats:
        """See `SteppedExperts.stats`."""
        return self._experts.stats


class _MeteredTicket:
    def __init__(self, ticket: Ticket, meter: ByteMeter) -> None:
        self._ticket = ticket
        self._meter = meter

    def collect(self) -> torch.Tensor:
        out = self._ticket.collect()
        self._meter.expert_bytes += self._ticket.stats.bytes_read
        return out

    @property
    def failed_rows(self) -> tuple[int, ...]:
        return self._ticket.failed_rows

    @property
    def stats(self) -> TicketStats:
        return self._ticket.stats
