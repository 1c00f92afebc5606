"""Which way a step's experts go: those of few rows are handed off, of more streamed, with the same sums."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from k2hybrid.experts.compute import plain_experts
from k2hybrid.experts.copies import InlineCopies
from k2hybrid.experts.device_experts import DeviceExperts
from k2hybrid.experts.dispatch import Dispatcher
from k2hybrid.experts.handoff import Handoff
from k2hybrid.experts.hot import HotRules
from k2hybrid.experts.hot_keeper import HotKeeper
from k2hybrid.experts.hybrid import HybridExperts
from k2hybrid.experts.prefill_stream import StreamedExperts
from k2hybrid.experts.split import SplitRates
from k2hybrid.hardware.streams import EmulatedStream
from k2hybrid.native.machine import Machine
from tests.expert_source import Source, slots_of
from tests.random_experts import EXPERTS, LAYER, relative_error

BOUND = 3e-3  # of an expert against float64 (docs/numerics.md)
HANDED = 8


@pytest.fixture(params=[0, 3], ids=["none hot", "some hot"])
def made(request: pytest.FixtureRequest) -> Iterator[tuple[DeviceExperts, Source]]:
    source = Source()
    top_k = source.made.rows(1)[1].shape[1]
    machine, copies = Machine(1), InlineCopies()
    # Rows cost the CPU so much that nothing of a chunk is left to it.
    rates = SplitRates(1e6, card=1e12, ram=5e10, bus=5e10, bus_traffic=0.5, cpu_row_s=1.0)
    slots = slots_of(source, request.param)
    handoff = Handoff(source.store, machine, EmulatedStream(), layers=[LAYER], max_rows=HANDED, top_k=top_k)
    cold = Dispatcher(source.store, machine, max_rows=64, top_k=top_k)
    experts = DeviceExperts(
        handoff,
        HybridExperts(handoff, slots, plain_experts, rates),
        StreamedExperts(cold, slots, source, plain_experts, copies, rates, cpu_rows=64),
        HotKeeper(slots, HotRules(interval=1, moves=2)),
    )
    yield experts, source
    experts.close()


Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def step(experts: DeviceExperts, rows: Rows) -> tuple[torch.Tensor, list[int]]:
    """What a step gives, and the rows that its ticket and its end call lost."""
    experts.begin([LAYER], len(rows[0]))
    ticket = experts.submit(LAYER, *rows)
    out = ticket.collect()
    return out, sorted({*experts.end(), *ticket.failed_rows})


@pytest.mark.parametrize("rows", [1, HANDED, HANDED + 1, 40])
def test_both_ways_give_the_same_sums(made: tuple[DeviceExperts, Source], rows: int) -> None:
    experts, source = made
    for _ in range(6):  # while experts come to the card
        given = source.made.rows(rows)
        out, lost = step(experts, given)
        assert relative_error(out, source.made.want(*given)) < BOUND
        assert lost == []
        experts.settle()
    assert len(experts.keeper.slots.there) == min(experts.keeper.slots.count, EXPERTS)
    share = experts.keeper.found_share  # None where nothing could be found: a step does not count then
    assert ((share or 0.0) > 0) == (experts.keeper.slots.count > 0)


def test_a_rehearsal_reads_and_counts_nothing(made: tuple[DeviceExperts, Source]) -> None:
    experts, source = made
    slots = experts.keeper.slots
    given = source.made.rows(3)
    step(experts, given)
    slots.counts.zero_()
    with experts.rehearsing():
        out, lost = step(experts, given)
    assert not out.any()
    assert (lost, experts.stats.bytes_read) == ([], 0)
    assert not slots.counts.any()
    out, _ = step(experts, given)
    assert relative_error(out, source.made.want(*given)) < BOUND


def test_costs_of_a_streamed_step_are_summed_and_forgotten(made: tuple[DeviceExperts, Source]) -> None:
    experts, source = made
    x, ids, weights = source.made.rows(20)
    for _ in range(2):
        experts.begin([LAYER, LAYER], 20)
        tickets = []
        for _ in range(2):
            ticket = experts.submit(LAYER, x, ids, weights)
            ticket.collect()
            tickets.append(ticket.stats)
        experts.end()
        assert experts.stats.bytes_read == sum(one.bytes_read for one in tickets)
        assert experts.stats.misses == sum(one.misses for one in tickets)
        assert experts.stats.busy_ms == pytest.approx(sum(one.busy_ms for one in tickets))
        used = len(torch.unique(ids[ids >= 0]))
        hot = len(experts.keeper.slots.there)
        assert used - hot <= experts.stats.bytes_read / source.store.expert_bytes / 2 <= used
    step(experts, source.made.rows(2))  # handed off: costs of its own
    assert experts.stats.bytes_read <= 2 * ids.shape[1] * source.store.expert_bytes


@pytest.mark.parametrize("broken", [0, 5])
def test_rows_of_experts_that_cannot_be_streamed_are_told(
    made: tuple[DeviceExperts, Source], broken: int
) -> None:
    experts, source = made
    source.broken = {broken}
    given = source.made.rows(40)
    out, lost = step(experts, given)
    needy = (given[1] == broken).any(1)
    assert 0 < len(lost) < 40
    assert lost == needy.nonzero().flatten().tolist()
    assert relative_error(out[~needy], source.made.want(*given)[~needy]) < BOUND
    source.broken = set()
    assert step(experts, given)[1] == []
