"""How many launches a layer of a recorded decode step takes on a card, and how many come before the ring.

A step of few sequences is bound by them, and the CPU's experts begin with the ring: what is counted here is
what they wait for. Tensors have no contents; what is no view is a launch, and a kernel of our own is as many
as it says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from k2hybrid.cache.pages import LatentPages
from k2hybrid.cache.rows import Fp8Rows, row_format
from k2hybrid.experts.copies import InlineCopies
from k2hybrid.experts.device_slots import DeviceSlots, ExpertSource
from k2hybrid.experts.hybrid import HybridExperts
from k2hybrid.model import kimi
from k2hybrid.model.decode_step import DecodeStep
from k2hybrid.model.kimi import ForwardState, Kimi
from k2hybrid.model.linears import DeviceLinears, DeviceRows
from k2hybrid.types import Ticket, TicketStats
from tests.golden_model.tiny import tiny_checkpoint
from tests.unit.model.test_device import CARD, OnCard, card_decode

MAKE_ROOM = {"empty", "empty_strided", "empty_like", "new_empty", "_unsafe_view"}


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that are no views; `marks` are counts that somebody noted."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self.names: list[str] = []
        self.marks: list[tuple[str, int]] = []
        self._on = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        aliases = [result.alias_info for result in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if self._on and not is_view and name not in MAKE_ROOM:
            self.add(name, 1)
        return func(*args, **(kwargs or {}))

    def add(self, name: str, count: int) -> None:
        if self._on:
            self.count += count
            self.names.append(name)

    def mark(self, name: str) -> None:
        self.marks.append((name, self.count))

    @contextmanager
    def paused(self) -> Iterator[None]:
        before, self._on = self._on, False
        try:
            yield
        finally:
            self._on = before

    def kernel(self, function: Callable[..., Any], count: int) -> Callable[..., Any]:
        """`function`, which plays a kernel of so many launches."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.add(function.__name__, count)
            with self.paused():
                return function(*args, **kwargs)

        return call


class RingTicket:
    """A wait, and a copy of the sum."""

    def __init__(self, launches: Launches, out: torch.Tensor) -> None:
        self._launches = launches
        self._out = out

    def collect(self) -> torch.Tensor:
        self._launches.add("wait", 1)
        self._launches.add("copy", 1)
        return self._out

    failed_rows: tuple[int, ...] = ()
    stats = TicketStats(0, 0, 0.0, 0.0)


class Ring:
    """A hand-off: three copies and a ring."""

    def __init__(self, launches: Launches) -> None:
        self._launches = launches

    def submit(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Ticket:
        for name in ("x", "ids", "weights", "ring"):
            self._launches.add(name, 1)
        self._launches.mark("ring")
        return RingTicket(self._launches, torch.empty(x.shape, device=CARD))


def counted_step(name: str, rows: str, hot: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Launches of a step of `batch` sequences, marked at each layer's begin and ring."""
    launches = Launches()
    for kernels, method in (
        (DeviceRows, "rms_norm"),
        (DeviceRows, "swiglu"),
        (DeviceRows, "choose"),
        (DeviceRows, "prepare_attention"),
        (HybridExperts, "split"),
        (Fp8Rows, "put"),
    ):
        monkeypatch.setattr(kernels, method, launches.kernel(getattr(kernels, method), 1))
    run = kimi.Layer.run

    def marked(layer: kimi.Layer, state: ForwardState, part: int) -> None:
        if part == 0:
            launches.mark("layer")
        run(layer, state, part)

    monkeypatch.setattr(kimi.Layer, "run", marked)

    def experts_on_card(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.empty(x.shape, device=CARD)

    checkpoint = tiny_checkpoint(name)
    spec = checkpoint.spec
    stored = row_format(rows, spec.kv_lora_rank, spec.qk_rope_head_dim)
    slots = DeviceSlots(
        cast(ExpertSource, None),
        InlineCopies(),
        torch.device(CARD),
        layers=spec.num_layers,
        experts=spec.num_experts,
        hidden=spec.hidden_size,
        inter=spec.moe_intermediate_size,
        count=hot,
    )

    def decode(*args: torch.Tensor, scale: float, row_format: str) -> torch.Tensor:
        return card_decode(*args, scale=scale, row_format="bf16")

    network = Kimi(
        spec,
        OnCard(checkpoint),
        HybridExperts(Ring(launches), slots, launches.kernel(experts_on_card, 4)),
        DeviceLinears(),
        LatentPages(spec.num_layers, 8, stored, CARD),
        decode=launches.kernel(decode, 2),
    )
    step = DecodeStep(network, batch, 4, pinned=False)
    step.work()  # what is made once is made
    launches.marks.clear()
    with launches:
        step.work()
    slots.close()
    return launches


def of_layers(launches: Launches) -> tuple[int, int, int]:
    """Of a dense layer, of one with experts before its ring, and of all of that one."""
    (_, dense), (_, layer), (_, ring), (_, following), _ = launches.marks
    return layer - dense, ring - layer, following - layer


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("hot", [0, 4])
@pytest.mark.parametrize("rows", ["bf16", "fp8"])
def test_a_layer_takes_few_launches(rows: str, hot: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = counted_step("k2", rows, hot, batch, monkeypatch)
    dense, before, layer = of_layers(launches)
    several = 2 * (batch > 1)  # products by head put rows first
    split, on_card = (1, 5) if hot else (0, 0)
    assert dense <= 23 + several, launches.names
    assert before <= 24 + several + split, launches.names
    assert layer <= 32 + several + split + on_card, launches.names


def test_what_torch_plays_takes_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count sees it: without kernels for rows a layer takes more than twice as many."""
    monkeypatch.setattr(DeviceLinears, "rows", None)
    dense, before, layer = of_layers(counted_step("k2", "bf16", 0, 1, monkeypatch))
    assert min(dense / 23, before / 24, layer / 32) > 2
