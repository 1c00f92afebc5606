"""Routed experts on card and CPU at once: a step's (row, expert) pairs are split on the device.

Pairs whose expert has a slot go to the card, as many experts as `split` allows for the step; those with the
most rows first, then the lower id. The hand-off gets −1 in their place. The card's experts are computed while
the CPU has the others, and the two sums are added in this order: CPU, then card.

Nothing is allocated by data, nothing asks the device: the calls can be captured, and a replay follows the
tables that `DeviceSlots` and the router change.
"""

from __future__ import annotations

import torch

from k2hybrid.experts.compute import ExpertCompute
from k2hybrid.experts.device_slots import DeviceSlots
from k2hybrid.experts.split import SplitRates, card_limits
from k2hybrid.kernels.split import MOST_CHOICES, split
from k2hybrid.types import RoutedExperts, Ticket, TicketStats


class HybridExperts:
    """`RoutedExperts` over the experts of `slots` and those of `cpu`.

    Args:
        cpu: takes tensors of the device; −1 is padding.
        compute: runs experts out of `slots.bytes`.
        rates: None: the card takes all that it holds.
        use_weight: what a use counts for the policy that fills the slots.
    """

    def __init__(
        self,
        cpu: RoutedExperts,
        slots: DeviceSlots,
        compute: ExpertCompute,
        rates: SplitRates | None = None,
        *,
        use_weight: float = 1.0,
    ) -> None:
        self._cpu = cpu
        self._slots = slots
        self._compute = compute
        self._rates = rates
        self._use_weight = use_weight
        # Of equal rows the lower id comes first.
        experts = slots.experts
        self._tiebreak = torch.arange(experts, -1, -1, dtype=torch.int32, device=slots.padded.device)
        self._limits: dict[tuple[int, int], torch.Tensor] = {}

    def prepare(self, rows: int, top_k: int) -> None:
        """Make what steps of so many rows need: once, before one is captured."""
        if (rows, top_k) not in self._limits:
            experts = self._slots.experts
            most = range(min(experts, rows * top_k) + 1)
            limits = list(most) if self._rates is None else card_limits(self._rates, rows, top_k, experts)
            self._limits[rows, top_k] = torch.tensor(
                limits, dtype=torch.int32, device=self._slots.padded.device
            )

    def submit(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> HybridTicket:
        """See `RoutedExperts.submit`. Waits for nothing once `prepare` was called.

        Rows that a captured step has too many of need ids −1: any other is counted, and computed.
        """
        if self._slots.count == 0:  # nor will there ever be one: uses are not counted either
            return HybridTicket(self._cpu.submit(layer, x, ids, weights), None)
        rows, top_k = ids.shape
        self.prepare(rows, top_k)
        chosen, rest = self.split(layer, ids)
        ticket = self._cpu.submit(layer, x, rest, weights)
        try:
            card = self._compute(
                x, self._slots.bytes, chosen, weights, hidden=self._slots.hidden, inter=self._slots.inter
            )
        except BaseException:
            ticket.collect()  # else it would keep its slot
            raise
        return HybridTicket(ticket, card)

    def split(self, layer: int, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots that the card computes, and ids left to the CPU: int32, shaped as `ids`; −1: none."""
        slots, limits = self._slots, self._limits[*ids.shape]
        slot = slots.padded[layer]
        if ids.is_cuda and ids.numel() <= MOST_CHOICES:
            return split(ids, slot, limits, slots.counts[layer], self._use_weight)
        index = (ids + 1).flatten()  # 0: padding
        uses = torch.zeros_like(slot).index_add_(0, index, torch.ones_like(index))
        uses[0] = 0
        used = uses > 0
        slots.counts[layer].add_(used[1:], alpha=self._use_weight)
        # Above 0 where it is used and there: rows first, then the lower id. No two are equal.
        span = slots.experts + 1
        rank = torch.where((slot >= 0) & used, uses * span + self._tiebreak, 0)
        sorted_rank = torch.sort(rank, descending=True).values
        distinct = torch.count_nonzero(uses).reshape(1)
        limit = limits.index_select(0, distinct)
        bar = sorted_rank.index_select(0, limit)  # the first that is not taken, or 0
        taken = torch.where(rank > bar, slot, -1)
        chosen = taken.index_select(0, index).view(ids.shape)
        return chosen, torch.where(chosen >= 0, -1, ids)


class HybridTicket:
    """A hand-off of which the card has a part (`types.Ticket`)."""

    def __init__(self, cpu: Ticket, card: torch.Tensor | None) -> None:
        self._cpu = cpu
        self._card = card

    def collect(self) -> torch.Tensor:
        """The routed sum, fp32 [rows, hidden]. Once only."""
        out = self._cpu.collect()
        return out if self._card is None else out + self._card

    @property
    def failed_rows(self) -> tuple[int, ...]:
        """Those of the CPU's part: an expert is on the card only with all its bytes."""
        return self._cpu.failed_rows

    @property
    def stats(self) -> TicketStats:
        """Of the CPU's part."""
        return self._cpu.stats
