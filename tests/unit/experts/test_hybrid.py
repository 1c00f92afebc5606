"""Experts on card and CPU at once: against float64, the CPU alone, and a split by hand; and nothing waits."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from k2hybrid.experts.compute import plain_experts
from k2hybrid.experts.device_slots import DeviceSlots
from k2hybrid.experts.dispatch import Dispatcher
from k2hybrid.experts.hot import Move
from k2hybrid.experts.hybrid import HybridExperts
from k2hybrid.experts.reference import ReferenceExperts, ReferenceTicket
from k2hybrid.experts.split import SplitRates, card_limits
from k2hybrid.native.machine import Machine
from tests.expert_source import Source, coming, settled, slots_of
from tests.no_waiting import NoWaiting, WaitsError
from tests.random_experts import EXPERTS, LAYER, SIZES, TOP_K, relative_error

BOUND = 3e-3  # against float64 (docs/numerics.md)
SPLIT_BOUND = 5e-4  # against another split of the same experts (docs/numerics.md)
# 1 s on the card, 2 on the CPU.
RATES = SplitRates(expert_bytes=4, card=4, ram=2, bus=1)


def dispatcher(source: Source, rows: int = 64) -> Dispatcher:
    return Dispatcher(source.store, Machine(1), max_rows=rows, top_k=TOP_K)


def hot(source: Source, *experts: int, count: int | None = None) -> DeviceSlots:
    slots = slots_of(source, len(experts) if count is None else count)
    slots.bring(coming(*experts))
    assert settled(slots) == []
    return slots


@pytest.mark.parametrize("rates", [None, RATES])
@pytest.mark.parametrize("count", range(EXPERTS + 1))
@pytest.mark.parametrize(("hidden", "inter"), SIZES[:3])
def test_every_size_of_the_hot_set(hidden: int, inter: int, count: int, rates: SplitRates | None) -> None:
    source = Source(hidden, inter)
    cpu = dispatcher(source)
    slots = hot(source, *random.Random(count).sample(range(EXPERTS), count))
    hybrid = HybridExperts(cpu, slots, plain_experts, rates)
    for rows in (1, 2, 7, 64):
        x, ids, weights = source.made.rows(rows)
        ids[torch.rand(ids.shape, generator=source.made.g) < 0.2] = -1
        if not (ids >= 0).any():
            ids[0, 0] = 0
        ticket = hybrid.submit(LAYER, x, ids, weights)
        got = ticket.collect()
        assert ticket.failed_rows == ()
        assert relative_error(got, source.made.want(x, ids, weights)) < BOUND
        alone = cpu.submit(LAYER, x, ids, weights).collect()
        assert relative_error(got, alone.double()) < SPLIT_BOUND
        if count == 0:
            assert torch.equal(got, alone)


def by_hand(
    slot_of: list[int], ids: list[list[int]], limits: list[int]
) -> tuple[list[list[int]], list[list[int]]]:
    used = [e for row in ids for e in row if e >= 0]
    there = sorted({e for e in used if slot_of[e] >= 0}, key=lambda e: (-used.count(e), e))
    taken = set(there[: limits[len(set(used))]])
    chosen = [[slot_of[e] if e in taken else -1 for e in row] for row in ids]
    return chosen, [[-1 if e in taken else e for e in row] for row in ids]


@pytest.mark.parametrize("rates", [None, RATES, SplitRates(expert_bytes=4, card=1, ram=4, bus=1)])
@pytest.mark.parametrize("seed", range(6))
def test_the_split_by_hand(seed: int, rates: SplitRates | None) -> None:
    source = Source(32, 64)
    draw = random.Random(seed)
    slots = hot(source, *draw.sample(range(EXPERTS), seed), count=6)
    hybrid = HybridExperts(ReferenceExperts(), slots, plain_experts, rates, use_weight=0.5)
    slot_of = slots.slot_of[LAYER].tolist()
    counted = [0.0] * EXPERTS
    for _ in range(30):
        rows = draw.choice([1, 2, 5, 40])
        ids = [draw.sample(range(EXPERTS), TOP_K) for _ in range(rows)]
        ids = [[-1 if draw.random() < 0.2 else e for e in row] for row in ids]
        limits = list(range(EXPERTS + 1)) if rates is None else card_limits(rates, rows, TOP_K, EXPERTS)
        hybrid.prepare(rows, TOP_K)
        chosen, rest = hybrid.split(LAYER, torch.tensor(ids, dtype=torch.int32))
        assert chosen.dtype == rest.dtype == torch.int32
        assert (chosen.tolist(), rest.tolist()) == by_hand(slot_of, ids, limits)
        for expert in {e for row in ids for e in row if e >= 0}:
            counted[expert] += 0.5
    assert slots.counts[LAYER].tolist() == counted
    assert not slots.counts[0].any()


def test_the_cpu_gets_none_of_what_the_card_has() -> None:
    source = Source()
    asked: list[torch.Tensor] = []

    class Noted(ReferenceExperts):
        def submit(
            self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
        ) -> ReferenceTicket:
            asked.append(ids)
            return super().submit(layer, x, ids, weights)

    cpu = Noted()
    source.made.give(cpu)
    hybrid = HybridExperts(cpu, hot(source, *range(EXPERTS)), plain_experts)
    x, ids, weights = source.made.rows(9)
    got = hybrid.submit(LAYER, x, ids, weights).collect()
    assert (asked[0] == -1).all()
    assert relative_error(got, source.made.want(x, ids, weights)) < BOUND


def test_nothing_but_padding() -> None:
    source = Source()
    hybrid = HybridExperts(dispatcher(source), hot(source, 1, 2), plain_experts, RATES)
    x, ids, weights = source.made.rows(3)
    assert not hybrid.submit(LAYER, x, torch.full_like(ids, -1), weights).collect().any()


def test_sets_that_change_between_steps() -> None:
    source = Source()
    draw = random.Random(3)
    slots = slots_of(source, 3)
    cpu = dispatcher(source)
    hybrid = HybridExperts(cpu, slots, plain_experts, RATES)
    for step in range(40):
        source.broken = {draw.randrange(EXPERTS)}
        if step % 3 == 0 and not slots.coming:
            there = [expert for _, expert in slots.there]
            new = draw.choice([e for e in range(EXPERTS) if e not in there])
            leaves = (LAYER, draw.choice(there)) if len(there) == 3 else None
            slots.bring([Move((LAYER, new), leaves)])
        elif step % 3 == 2:
            slots.wait()
            slots.settle()
        x, ids, weights = source.made.rows(5)
        got = hybrid.submit(LAYER, x, ids, weights).collect()
        assert relative_error(got, source.made.want(x, ids, weights)) < BOUND


class Unreadable(ReferenceExperts):
    """A CPU's side that cannot read `broken`."""

    broken = 0

    def submit(
        self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> ReferenceTicket:
        out = super().submit(layer, x, ids, weights).collect()
        failed = (ids == self.broken).any(1).nonzero().flatten().tolist()
        out[failed] = float("nan")
        return ReferenceTicket(out, tuple(failed))


def test_an_unreadable_expert_fails_its_rows_alone() -> None:
    source = Source()
    cpu = Unreadable()
    source.made.give(cpu)
    cpu.broken = 4
    source.broken = {4}
    slots = slots_of(source, 3)
    slots.bring(coming(4, 1, 2))
    assert settled(slots) == [(LAYER, 4)]
    hybrid = HybridExperts(cpu, slots, plain_experts)
    x, ids, weights = source.made.rows(30)
    ticket = hybrid.submit(LAYER, x, ids, weights)
    got = ticket.collect()
    failed = tuple(t for t in range(30) if 4 in ids[t].tolist())
    assert 0 < len(failed) < 30
    assert ticket.failed_rows == failed
    good = [t for t in range(30) if t not in failed]
    assert relative_error(got[good], source.made.want(x, ids, weights)[good]) < BOUND


def test_an_expert_that_is_there_needs_no_file() -> None:
    source = Source()
    slots = hot(source, 4)
    cpu = Unreadable()
    source.made.give(cpu)
    cpu.broken = 4
    x, ids, weights = source.made.rows(10)
    ticket = HybridExperts(cpu, slots, plain_experts).submit(LAYER, x, ids, weights)
    assert relative_error(ticket.collect(), source.made.want(x, ids, weights)) < BOUND
    assert ticket.failed_rows == ()


def test_a_card_that_fails_keeps_no_hand_off() -> None:
    source = Source()

    def fails(*args: object, **kwargs: object) -> torch.Tensor:
        raise RuntimeError("the card is gone")

    cpu = dispatcher(source)
    hybrid = HybridExperts(cpu, hot(source, 4), fails)
    x, ids, weights = source.made.rows(2)
    for _ in range(5):
        with pytest.raises(RuntimeError, match="is gone"):
            hybrid.submit(LAYER, x, ids, weights)
    cpu.submit(LAYER, x, ids, weights).collect()


def test_nothing_waits() -> None:
    source = Source()
    slots = hot(source, 1, 4, 5)
    x, ids, weights = source.made.rows(6)
    ids[2] = -1
    with NoWaiting() as guard:
        cpu = ReferenceExperts()
        source.made.give(cpu)
        cpu.submit = guard.allowed(cpu.submit)  # type: ignore[method-assign]
        hybrid = HybridExperts(cpu, slots, guard.allowed(plain_experts), RATES)
        hybrid.prepare(6, TOP_K)
        got = hybrid.submit(LAYER, x, ids, weights).collect()
    assert relative_error(got, source.made.want(x, ids, weights)) < BOUND


@pytest.mark.parametrize(
    "waits",
    [
        lambda t: t[0].item(),
        lambda t: t.tolist(),
        lambda t: t.cpu(),
        lambda t: t.numpy(),
        lambda t: int(t[0]),
        lambda t: bool(t[0]),
        lambda t: t[t > 1],
        lambda t: t.nonzero(),
        lambda t: torch.unique(t),
        lambda t: torch.bincount(t),
        lambda t: torch.arange(9)[t[0]],
        lambda t: 1 in t,
        lambda t: t.masked_select(t > 1),
        lambda t: torch.equal(t, t),
    ],
)
def test_the_guard_catches_what_waits(waits: Callable[[torch.Tensor], object]) -> None:
    numbers = torch.tensor([2, 1, 0])
    with NoWaiting() as guard:
        with pytest.raises(WaitsError):
            waits(numbers)
        guard.allowed(waits)(numbers)
