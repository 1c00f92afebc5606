"""Who read how many bytes in what time: wrappers around what multiplies and around the routed experts."""

from __future__ import annotations

import bisect
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from k2hybrid.model.attention import ContextKernels
from k2hybrid.model.layers import RowKernels
from k2hybrid.types import LinearWeight, RoutedExperts, Ticket, TicketStats, Weight8, WeightSource


@dataclass(slots=True)
class Tally:
    """Bytes of weights read, and the seconds that took."""

    nbytes: int = 0
    seconds: float = 0.0
    calls: int = 0

    def add(self, nbytes: int, seconds: float) -> None:
        """Count one call."""
        self.nbytes += nbytes
        self.seconds += seconds
        self.calls += 1


class WeightRoles:
    """Hands out a checkpoint's weights and remembers which addresses are whose."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._spans: list[tuple[int, int, str]] = []

    def take(self, layer: int | None, role: str) -> LinearWeight:
        """See `types.WeightSource.take`."""
        weight = self._source.take(layer, role)
        values = weight.values if isinstance(weight, Weight8) else weight
        start = values.data_ptr()
        bisect.insort(self._spans, (start, start + values.nbytes, "head" if role == "lm_head" else "dense"))
        return weight

    def role(self, address: int) -> str:
        """ "head", "dense", or "context" for what is no weight: rows of the latent cache."""
        at = bisect.bisect_right(self._spans, (address, 1 << 63, "")) - 1
        if at < 0 or address >= self._spans[at][1]:
            return "context"
        return self._spans[at][2]


class RecordingMachine:
    """`native.machine`'s linears and attention, timed by the role of what they read."""

    def __init__(self, kernels: ContextKernels, roles: WeightRoles) -> None:
        self._kernels = kernels
        self._roles = roles
        self.tallies: dict[str, Tally] = defaultdict(Tally)

    def _record(self, weight: LinearWeight, start: float) -> None:
        role = self._roles.role(weight.data_ptr())
        self.tallies[role].add(weight.nbytes, time.perf_counter() - start)

    @property
    def rows(self) -> RowKernels:
        """See `Machine.rows`."""
        return self._kernels.rows

    def linear(self, x: torch.Tensor, weight: LinearWeight) -> torch.Tensor:
        """See `Machine.linear`."""
        start = time.perf_counter()
        y = self._kernels.linear(x, weight)
        self._record(weight, start)
        return y

    def head_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See `Machine.head_linear`."""
        start = time.perf_counter()
        y = self._kernels.head_linear(x, weight)
        self._record(weight, start)
        return y

    def head_linear_t(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See `Machine.head_linear_t`."""
        start = time.perf_counter()
        y = self._kernels.head_linear_t(x, weight)
        self._record(weight, start)
        return y

    def attend(
        self,
        q: torch.Tensor,
        rows: torch.Tensor,
        spans: Sequence[tuple[torch.Tensor, int, int]],
        *,
        latent: int,
        row_format: str,
        scale: float,
    ) -> torch.Tensor:
        """See `Machine.attend`."""
        start = time.perf_counter()
        mixed = self._kernels.attend(q, rows, spans, latent=latent, row_format=row_format, scale=scale)
        nbytes = rows.shape[1] * sum(before + count for _, before, count in spans)
        self.tallies["context"].add(nbytes, time.perf_counter() - start)
        return mixed


class RecordingExperts:
    """`RoutedExperts` whose tickets are collected at once, so that submit → collect is what is timed."""

    def __init__(self, experts: RoutedExperts) -> None:
        self._experts = experts
        self.tally = Tally()

    def submit(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Ticket:
        """See `types.RoutedExperts.submit`."""
        start = time.perf_counter()
        ticket = self._experts.submit(layer, x, ids, weights)
        out = ticket.collect()
        self.tally.add(ticket.stats.bytes_read, time.perf_counter() - start)
        return _Collected(out, ticket)


class _Collected:
    """A ticket that has been collected already and gives its result out again."""

    def __init__(self, out: torch.Tensor, ticket: Ticket) -> None:
        self._out = out
        self._ticket = ticket

    def collect(self) -> torch.Tensor:
        """The result."""
        return self._out

    @property
    def failed_rows(self) -> tuple[int, ...]:
        """See `types.Ticket`."""
        return self._ticket.failed_rows

    @property
    def stats(self) -> TicketStats:
        """See `types.Ticket`."""
        return self._ticket.stats
