"""The hand-off around the shared expert."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from k2hybrid.errors import NativeError
from k2hybrid.model.layers import MLP
from k2hybrid.model.moe import MoE
from k2hybrid.model.router import Router
from k2hybrid.types import TicketStats


class CountingExperts:
    """Routed experts that give zeros and count the tickets nobody has collected."""

    outstanding = 0
    failed_rows: tuple[int, ...] = ()
    stats = TicketStats(0, 0, 0.0, 0.0)

    def submit(
        self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> CountingExperts:
        self.outstanding += 1
        return self

    def collect(self) -> torch.Tensor:
        self.outstanding -= 1
        return torch.zeros(1, 4)


def test_a_failing_shared_expert_leaves_no_ticket_behind() -> None:
    def route(*_: Any) -> SimpleNamespace:
        return SimpleNamespace(ids=torch.zeros(1, 1, dtype=torch.int32), weights=torch.ones(1, 1))

    def shared(*_: Any) -> torch.Tensor:
        raise NativeError("weights could not be read")

    experts = CountingExperts()
    layer = MoE(0, cast(Router, route), experts, cast(MLP, shared))
    with pytest.raises(NativeError, match="could not be read"):
        layer(torch.zeros(1, 4), [slice(0, 1)])
    assert experts.outstanding == 0
