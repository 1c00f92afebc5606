"""Chunks whose experts go over the bus: against float64, with tiny rings, late copies and lost bytes."""

from __future__ import annotations

import random
import threading
import time
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from k2hybrid.errors import ConfigError, EngineError
from k2hybrid.experts import prefill_stream
from k2hybrid.experts.compute import plain_experts
from k2hybrid.experts.copies import CopyEngine, InlineCopies
from k2hybrid.experts.device_slots import DeviceSlots
from k2hybrid.experts.dispatch import Dispatcher
from k2hybrid.experts.hot import HotRules
from k2hybrid.experts.hot_keeper import HotKeeper
from k2hybrid.experts.hybrid import HybridExperts
from k2hybrid.experts.prefill_stream import StreamedExperts, StreamTicket
from k2hybrid.experts.reference import ReferenceExperts, ReferenceTicket
from k2hybrid.experts.split import SplitRates, plan_stream
from k2hybrid.model import card_memory
from k2hybrid.native.machine import Machine
from tests.expert_source import SlottedSource, Source, coming, settled, slots_of
from tests.late_copies import LateCopies
from tests.random_experts import EXPERTS, LAYER, SIZES, TOP_K, relative_error

BOUND = 3e-3  # against float64 (docs/numerics.md)
CPU_ROWS = 5

ALL = SplitRates(expert_bytes=1, card=100, ram=1e-3, bus=100, bus_traffic=0.0)  # the CPU is hopeless
NONE = SplitRates(expert_bytes=1, card=100, ram=100, bus=1e-3, bus_traffic=0.0)  # the bus is
SOME = SplitRates(expert_bytes=1, card=100, ram=1, bus=1, bus_traffic=0.0)


def streamed(
    source: Source,
    slots: DeviceSlots | None = None,
    rates: SplitRates = ALL,
    copies: CopyEngine | None = None,
    compute: Any = plain_experts,
    cpu: Any = None,
    **rings: int,
) -> StreamedExperts:
    sizes = {"cpu_rows": CPU_ROWS, "buffers": 2, "ring": 2, "fill_threads": 2, **rings}
    return StreamedExperts(
        cpu or Dispatcher(source.store, Machine(1), max_rows=CPU_ROWS, top_k=TOP_K),
        slots or slots_of(source, 0),
        source,
        compute,
        copies or InlineCopies(),
        rates,
        **sizes,
    )


def hot(source: Source, *experts: int) -> DeviceSlots:
    slots = slots_of(source, len(experts))
    slots.bring(coming(*experts))
    settled(slots)
    source.asked.clear()
    return slots


@pytest.mark.parametrize("rates", [ALL, SOME, NONE])
@pytest.mark.parametrize("there", [(), (2,), (0, 3, 6), tuple(range(EXPERTS))])
@pytest.mark.parametrize(("hidden", "inter"), SIZES[:3])
def test_against_float64(hidden: int, inter: int, there: tuple[int, ...], rates: SplitRates) -> None:
    source = Source(hidden, inter)
    experts = streamed(source, hot(source, *there), rates)
    alone = Dispatcher(source.store, Machine(1), max_rows=64, top_k=TOP_K)
    for rows in (1, 3, 40, 64):
        source.asked.clear()
        x, ids, weights = source.made.rows(rows)
        ids[torch.rand(ids.shape, generator=source.made.g) < 0.2] = -1
        ids[0, 0] = 4 if 4 not in ids[0].tolist() else ids[0, 0]
        ticket = experts.submit(LAYER, x, ids, weights)
        got = ticket.collect()
        assert ticket.failed_rows == ()
        assert relative_error(got, source.made.want(x, ids, weights)) < BOUND
        assert relative_error(got, alone.submit(LAYER, x, ids, weights).collect().double()) < 5e-4
        report = ticket.report
        used = {e for e in ids.flatten().tolist() if e >= 0}
        assert set(report.plan.hot) == used & set(there)
        assert set(report.plan.hot + report.plan.streamed + report.plan.cold) == used
        # Only what goes over the bus is read, once each, and the count is the prediction.
        assert sorted(source.asked) == list(report.plan.streamed)
        assert report.bus_bytes == len(report.plan.streamed) * source.store.expert_bytes
        assert ticket.stats.misses == len(report.plan.streamed)
        assert report.lost == ()
        if rates is not SOME:
            assert not (report.plan.cold if rates is ALL else report.plan.streamed)
    experts.close()


@pytest.mark.parametrize("lent", [set(), {0, 3}, set(range(EXPERTS)) - {5}])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("ring", [1, 2, 3])
@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_tiny_rings_with_late_copies(
    buffers: int, ring: int, threads: int, lent: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who fills a buffer, writes into a slot, or gives an expert back too early is seen."""
    monkeypatch.setattr(prefill_stream, "TILE_ROWS", 6)
    source = SlottedSource(lent)
    copies = LateCopies()
    most = 0

    def compute(
        x: torch.Tensor, memory: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, **sizes: int
    ) -> torch.Tensor:
        nonlocal most
        most = max(most, len(x))
        copies.computed(memory[int(chosen[0, 0])])
        return plain_experts(x, memory, chosen, weights, **sizes)

    experts = streamed(
        source, hot(source, 5), ALL, copies, compute, buffers=buffers, ring=ring, fill_threads=threads
    )
    before = copies.copied
    predicted = 0.0
    for _ in range(6):
        x, ids, weights = source.made.rows(23)
        ticket = experts.submit(LAYER, x, ids, weights)
        assert relative_error(ticket.collect(), source.made.want(x, ids, weights)) < BOUND
        predicted += ticket.report.plan.bus_bytes
        assert ticket.report.direct == len(lent)
        assert not source.loans.total()
    assert source.most <= len(lent)
    assert copies.copied - before == 36 * source.store.expert_bytes
    assert predicted == 36  # of `ALL`, where an expert has one byte
    assert most == 6
    assert experts.locked_bytes == sum(copies.locked.values()) == len(lent) * source.slot_bytes
    experts.close()
    assert not copies.locked


def test_memory_that_cannot_be_locked(caplog: pytest.LogCaptureFixture) -> None:
    """What was locked before stays so; the rest goes through buffers, and the driver is not asked again."""
    source = SlottedSource(set(range(EXPERTS)))
    copies = LateCopies(lockable=3)  # two make an expert's
    experts = streamed(source, copies=copies, fill_threads=1)
    for _ in range(3):
        x, ids, weights = source.made.rows(23)
        ticket = experts.submit(LAYER, x, ids, weights)
        assert relative_error(ticket.collect(), source.made.want(x, ids, weights)) < BOUND
        assert not source.loans.total()
        copies.lockable = 100
    assert ticket.report.direct == 1
    assert experts.locked_bytes == sum(copies.locked.values())
    assert [record.message for record in caplog.records if "buffers" in record.message] == [
        "experts go to the card through buffers, which costs long prompts time: their memory cannot be "
        "locked (no more)"
    ]
    experts.close()
    assert not copies.locked


class Failing(LateCopies):
    """Copies of which the first `lock`, or the first `wait`, fails."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.fails = what

    def lock(self, address: int, nbytes: int) -> str:
        self._fail("lock")
        return super().lock(address, nbytes)

    def copy(self, to: torch.Tensor, host: Any, after: Any) -> Any:
        arrival = super().copy(to, host, after)
        wait = arrival.wait

        def failing() -> None:
            self._fail("wait")
            wait()

        arrival.wait = failing  # type: ignore[method-assign]
        return arrival

    def _fail(self, what: str) -> None:
        if self.fails == what:
            self.fails = ""
            raise RuntimeError("the driver is gone")


@pytest.mark.parametrize("what", ["lock", "wait"])
def test_a_driver_that_fails_leaves_nothing_lent(what: str) -> None:
    source = SlottedSource({1, 2, 5, 6})
    copies = Failing(what)
    experts = streamed(source, copies=copies)
    x, ids, weights = source.made.rows(23)
    with pytest.raises(RuntimeError, match="driver is gone"):
        experts.submit(LAYER, x, ids, weights).collect()
    assert not source.loans.total()
    got = experts.submit(LAYER, x, ids, weights).collect()
    assert relative_error(got, source.made.want(x, ids, weights)) < BOUND
    experts.close()


def test_a_card_that_fails_leaves_the_slots_free() -> None:
    source = SlottedSource({1, 2, 5, 6})

    def compute(*args: Any, **sizes: int) -> torch.Tensor:
        raise RuntimeError("the card is gone")

    experts = streamed(source, compute=compute, copies=LateCopies())
    x, ids, weights = source.made.rows(23)
    with pytest.raises(RuntimeError, match="is gone"):
        experts.submit(LAYER, x, ids, weights).collect()
    assert source.most > 0
    assert not source.loans.total()


def test_what_needs_no_buffer_passes_the_ram_once() -> None:
    rates = SplitRates(expert_bytes=1, card=100, ram=2, bus=1, cpu_row_s=1 / 17)
    assert rates.bus_traffic == 3
    assert rates.with_direct(0.5).bus_traffic == 2
    assert rates.with_direct(1.0).bus_traffic == 1
    assert ALL.with_direct(1.0) == ALL
    # An expert costs the CPU about a second, as it does the bus, and the RAM half of one for each passage:
    # with buffers the stream waits for the RAM, and without them it does not.
    source = SlottedSource(set(range(EXPERTS)))
    experts = streamed(source, rates=rates)
    cold = []
    for share in (0.0, 1.0, 1.0):
        x, ids, weights = source.made.rows(40)
        ticket = experts.submit(LAYER, x, ids, weights)
        assert relative_error(ticket.collect(), source.made.want(x, ids, weights)) < BOUND
        uses = {expert: int((ids == expert).sum()) for expert in range(EXPERTS)}
        assert ticket.report.plan == plan_stream(rates.with_direct(share), 40, uses, ())
        cold.append(len(ticket.report.plan.cold))
    assert cold[0] > max(cold[1:])


@pytest.mark.parametrize("seed", range(5))
def test_experts_that_cannot_be_read(seed: int) -> None:
    source = Source()
    draw = random.Random(seed)
    slots = hot(source, 6)
    experts = streamed(source, slots, buffers=draw.choice([1, 2]), ring=draw.choice([1, 2]))
    for _ in range(6):
        source.broken = set(draw.sample(range(EXPERTS), draw.choice([1, 2, 6])))
        x, ids, weights = source.made.rows(17)
        ticket = experts.submit(LAYER, x, ids, weights)
        got = ticket.collect()
        lost = source.broken - {6}  # which is there
        failed = tuple(t for t in range(17) if lost & set(ids[t].tolist()))
        assert ticket.failed_rows == failed
        used = set(ids.flatten().tolist())
        assert ticket.report.lost == tuple(sorted(lost & used))
        assert ticket.report.bus_bytes == len(used - lost - {6}) * source.store.expert_bytes
        good = [t for t in range(17) if t not in failed]
        if good:
            assert relative_error(got[good], source.made.want(x, ids, weights)[good]) < BOUND
    experts.close()


class Unreadable(ReferenceExperts):
    """A CPU's side that cannot read expert 3."""

    def submit(
        self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> ReferenceTicket:
        assert len(x) <= CPU_ROWS
        out = super().submit(layer, x, ids, weights).collect()
        return ReferenceTicket(out, tuple((ids == 3).any(1).nonzero().flatten().tolist()))


def test_rows_that_the_cpu_fails() -> None:
    source = Source()
    cpu = Unreadable()
    source.made.give(cpu)
    experts = streamed(source, rates=NONE, cpu=cpu)
    x, ids, weights = source.made.rows(23)
    ids[ids == 0] = -1
    ticket = experts.submit(LAYER, x, ids, weights)
    assert relative_error(ticket.collect(), source.made.want(x, ids, weights)) < BOUND
    assert ticket.failed_rows == tuple(t for t in range(23) if 3 in ids[t].tolist())
    assert ticket.report.lost == ()


def test_reads_run_ahead_of_the_compute() -> None:
    """While an expert is computed, those of the following buffers are read."""
    source = Source()
    late: list[int] = []
    done = 0

    def compute(*args: Any, **sizes: int) -> torch.Tensor:
        nonlocal done
        wanted = min(EXPERTS, done + 1 + 3)
        deadline = time.monotonic() + 20
        while len(source.asked) < wanted and time.monotonic() < deadline:
            time.sleep(0.001)
        late.extend([done] if len(source.asked) < wanted else [])
        done += 1
        return plain_experts(*args, **sizes)

    experts = streamed(source, compute=compute, buffers=3, ring=1)
    x, ids, weights = source.made.rows(40)
    experts.submit(LAYER, x, ids, weights).collect()
    assert done == EXPERTS
    assert late == []
    experts.close()


def test_the_cpu_works_meanwhile() -> None:
    source = Source()
    began = threading.Event()

    class Slow(ReferenceExperts):
        def submit(
            self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
        ) -> ReferenceTicket:
            began.set()
            assert finished.wait(20)
            return super().submit(layer, x, ids, weights)

    finished = threading.Event()
    computed = 0

    def compute(*args: Any, **sizes: int) -> torch.Tensor:
        nonlocal computed
        assert began.wait(20)
        computed += 1
        if computed == 3:
            finished.set()  # the CPU ends after the card alone, so both were under way
        return plain_experts(*args, **sizes)

    cpu = Slow()
    source.made.give(cpu)
    experts = streamed(source, rates=SOME, compute=compute, cpu=cpu)
    x, ids, weights = source.made.rows(40)
    ticket = experts.submit(LAYER, x, ids, weights)
    assert relative_error(ticket.collect(), source.made.want(x, ids, weights)) < BOUND
    # A second an expert either way; of 4 and 3 and 3 and 4 the one with less on the bus.
    assert (len(ticket.report.plan.streamed), len(ticket.report.plan.cold)) == (3, 4)
    assert computed == 3
    experts.close()


def test_padding_alone() -> None:
    source = Source()
    experts = streamed(source)
    x, ids, weights = source.made.rows(4)
    ticket = experts.submit(LAYER, x, torch.full_like(ids, -1), weights)
    assert not ticket.collect().any()
    assert ticket.report.plan.streamed == ()
    assert ticket.failed_rows == ()
    assert source.asked == []


def test_uses_are_counted_by_what_they_save() -> None:
    source = Source()
    slots = slots_of(source, 0)
    rates = SplitRates(expert_bytes=24, card=24, ram=6, bus=4)  # 6 s saved, 3 in a decode step
    experts = streamed(source, slots, rates)
    x, ids, weights = source.made.rows(4)
    ids[:, :] = torch.tensor([5, -1, 2], dtype=torch.int32)
    experts.submit(LAYER, x, ids, weights).collect()
    assert slots.counts[LAYER].tolist() == [0, 0, 2, 0, 0, 2, 0]
    assert not slots.counts[0].any()


def test_one_ticket_at_a_time() -> None:
    source = Source()
    experts = streamed(source)
    x, ids, weights = source.made.rows(4)
    ticket = experts.submit(LAYER, x, ids, weights)
    with pytest.raises(EngineError, match="collect the chunk"):
        experts.submit(LAYER, x, ids, weights)
    with pytest.raises(EngineError, match="before asking"):
        _ = ticket.report
    with pytest.raises(EngineError, match="before asking"):
        _ = ticket.stats
    ticket.collect()
    with pytest.raises(EngineError, match="once"):
        ticket.collect()
    experts.submit(LAYER, x, ids, weights).collect()


def test_a_card_that_fails_leaves_the_rings_free() -> None:
    source = Source()
    fails = True

    def compute(*args: Any, **sizes: int) -> torch.Tensor:
        if fails:
            raise RuntimeError("the card is gone")
        return plain_experts(*args, **sizes)

    experts = streamed(source, compute=compute)
    x, ids, weights = source.made.rows(8)
    with pytest.raises(RuntimeError, match="is gone"):
        experts.submit(LAYER, x, ids, weights).collect()
    fails = False
    got = experts.submit(LAYER, x, ids, weights).collect()
    assert relative_error(got, source.made.want(x, ids, weights)) < BOUND


def test_a_submit_that_fails_leaves_the_rings_free() -> None:
    source = Source()
    experts = streamed(source, rates=SOME)
    x, ids, weights = source.made.rows(12)
    with pytest.raises(IndexError):
        experts.submit(LAYER, x[:1], ids, weights)
    ticket = experts.submit(LAYER, x, ids, weights)
    assert relative_error(ticket.collect(), source.made.want(x, ids, weights)) < BOUND
    assert ticket.report.plan.streamed


@pytest.mark.parametrize("wrong", [{"buffers": 0}, {"ring": 0}, {"fill_threads": 0}, {"cpu_rows": 0}])
def test_rings_are_checked(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        streamed(Source(), **wrong)


def test_rings_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source()
    monkeypatch.setattr(prefill_stream, "MAX_RING_BYTES", 5 * source.store.expert_bytes)
    assert streamed(source, buffers=3, ring=2).ring_bytes == (
        3 * source.store.expert_bytes,
        2 * source.store.expert_bytes,
    )
    with pytest.raises(ConfigError, match="at most"):
        streamed(source, buffers=3, ring=3)


class Live(TorchDispatchMode):
    """Bytes of the tensors that operators made and somebody still holds: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(a.untyped_storage()._cdata) for a in args if isinstance(a, torch.Tensor)}
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()._cdata) not in given:
                self._add(tensor)
        return out

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address, nbytes = storage.data_ptr(), storage.nbytes()
        if address in self._seen or not nbytes:
            return
        self._seen.add(address)
        self.now += nbytes
        self.most = max(self.most, self.now)

        def gone() -> None:
            self._seen.discard(address)
            self.now -= nbytes

        weakref.finalize(storage, gone)


def test_the_memory_table_counts_the_same_tile() -> None:
    assert card_memory.EXPERT_TILE_ROWS == prefill_stream.TILE_ROWS


def test_rows_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_stream, "TILE_ROWS", 16)
    source = Source(32, 64)

    def compute(x: torch.Tensor, *args: Any, hidden: int, inter: int) -> torch.Tensor:
        return torch.zeros(x.shape, dtype=torch.float32)

    experts = streamed(source, compute=compute)
    budget = 300_000
    rows = experts.rows_limit(budget, TOP_K)
    assert rows > 800
    assert experts.rows_limit(0, TOP_K) == 0
    x, ids, weights = source.made.rows(rows)
    with Live() as live:
        experts.submit(LAYER, x, ids, weights).collect()
    assert budget / 4 < live.most <= budget


def test_what_a_ticket_is() -> None:
    source = Source()
    experts = streamed(source)
    x, ids, weights = source.made.rows(2)
    ticket = experts.submit(LAYER, x, ids, weights)
    assert isinstance(ticket, StreamTicket)
    ticket.collect()
    stats = ticket.stats
    assert stats.bytes_read == ticket.report.bus_bytes > 0
    assert 0 <= stats.wait_ms <= stats.busy_ms


def test_chunks_and_steps_share_what_is_on_the_card() -> None:
    """The keeper moves experts between chunks and steps, and each finds the set as it is then."""
    source = Source()
    draw = random.Random(5)
    slots = slots_of(source, 3)
    keeper = HotKeeper(slots, HotRules(half_life=8.0, margin=0.2, interval=2, moves=2))
    cpu = Dispatcher(source.store, Machine(1), max_rows=CPU_ROWS, top_k=TOP_K)
    chunks = streamed(source, slots, SOME, cpu=cpu)
    steps = HybridExperts(cpu, slots, plain_experts, SOME)
    sets = set()
    for at in range(60):
        favourites = (0, 1, 2) if at < 30 else (4, 5, 6)
        x, ids, weights = source.made.rows(30 if at % 5 == 0 else 3)
        ids[1:3] = torch.tensor(favourites, dtype=torch.int32)
        ids[0, 0] = -1
        experts: StreamedExperts | HybridExperts = chunks if len(x) > CPU_ROWS else steps
        source.broken = {draw.choice([3, 4])} if experts is steps else set()
        ticket = experts.submit(LAYER, x, ids, weights)
        assert relative_error(ticket.collect(), source.made.want(x, ids, weights)) < BOUND
        if isinstance(ticket, StreamTicket):
            assert set(ticket.report.plan.hot) <= {expert for _, expert in slots.there}
            assert set(ticket.report.plan.streamed).isdisjoint(expert for _, expert in slots.there)
        keeper.between_steps()
        if draw.random() < 0.7:
            slots.wait()
        sets.add(frozenset(expert for _, expert in slots.there))
    assert frozenset({0, 1, 2}) in sets
    assert {5, 6} <= {expert for _, expert in slots.there}
    slots.close()
    chunks.close()
