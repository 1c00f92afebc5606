"""A mixture-of-experts layer: routed experts through the hand-off, the shared expert while they work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from k2hybrid.model.layers import MLP
from k2hybrid.model.router import Router
from k2hybrid.types import RoutedExperts


@dataclass(frozen=True, slots=True)
class MoEOutput:
    """out fp32 [T, hidden]; rows in `failed_rows` hold nothing of use, since an expert could not be read."""

    out: torch.Tensor
    failed_rows: tuple[int, ...]


class MoE:
    """Σ weight · expert(x) + shared(x), summed in fp32."""

    def __init__(self, layer: int, router: Router, experts: RoutedExperts, shared: MLP) -> None:
        self.layer = layer
        self.router = router
        self.experts = experts
        self.shared = shared

    def __call__(self, x: torch.Tensor, rows: Sequence[slice]) -> MoEOutput:
        """x [T, hidden], the rows of each span."""
        routing = self.router(x, rows)
        ticket = self.experts.submit(self.layer, x, routing.ids, routing.weights)
        try:
            shared = self.shared(x, rows)
        finally:
            routed = ticket.collect()  # even if the shared expert failed: else the ticket would keep its slot
        return MoEOutput(shared.add_(routed), ticket.failed_rows)
