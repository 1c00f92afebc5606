"""Experts on a real card: copies beside the compute, a captured split that follows its set, and streams."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from k2hybrid.experts.compute import expert_matrices, plain_experts
from k2hybrid.experts.copies import CopyEngine, CudaCopies
from k2hybrid.experts.dispatch import Dispatcher
from k2hybrid.experts.hot import HotRules, Move
from k2hybrid.experts.hot_keeper import HotKeeper
from k2hybrid.experts.hybrid import HybridExperts
from k2hybrid.experts.prefill_stream import StreamedExperts
from k2hybrid.experts.reference import ReferenceTicket
from k2hybrid.experts.split import SplitRates
from k2hybrid.native.machine import Machine
from tests.expert_source import SlottedSource, Source, coming, settled, slots_of
from tests.random_experts import EXPERTS, LAYER, TOP_K, relative_error

pytestmark = pytest.mark.gpu
BOUND = 3e-3  # against float64 (docs/numerics.md)
ROWS = 6
DEVICE = torch.device("cuda")


@pytest.fixture
def copies() -> CopyEngine:
    return CudaCopies(DEVICE)


def captured(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """`step`, captured; its result stays where it is."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay


def dense_experts(
    x: torch.Tensor,
    slots: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    *,
    hidden: int,
    inter: int,
) -> torch.Tensor:
    """`ExpertCompute` that can be captured: every slot for every row."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for slot in range(len(slots)):
        gate, up, down = expert_matrices(slots[slot], hidden, inter)
        between = (F.silu(x.float() @ gate.T) * (x.float() @ up.T)).bfloat16().float()
        out += (weights * (chosen == slot)).sum(1, keepdim=True) * (between @ down.T)
    return out


class NoCpu:
    """A CPU's side that keeps the ids it is asked for, and gives zeros."""

    def __init__(self) -> None:
        self.ids = torch.zeros(ROWS, TOP_K, dtype=torch.int32, device=DEVICE)

    def submit(
        self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> ReferenceTicket:
        self.ids.copy_(ids)
        return ReferenceTicket(torch.zeros(x.shape, dtype=torch.float32, device=DEVICE))


def test_a_captured_step_follows_the_set(copies: CopyEngine) -> None:
    source = Source()
    slots = slots_of(source, 3, copies, DEVICE)
    cpu = NoCpu()
    hybrid = HybridExperts(cpu, slots, dense_experts, use_weight=0.5)
    x, ids, weights = (tensor.to(DEVICE) for tensor in source.made.rows(ROWS))
    hybrid.prepare(ROWS, TOP_K)
    step = captured(lambda: hybrid.submit(LAYER, x, ids, weights).collect())
    slots.counts.zero_()
    counted = torch.zeros(EXPERTS)
    moves = [coming(1, 4, 5), [Move((LAYER, 0), (LAYER, 4))], [Move((LAYER, 6), (LAYER, 1))]]
    for there in moves:
        slots.bring(there)
        assert settled(slots) == []
        for _ in range(3):
            for static, fresh in zip((x, ids, weights), source.made.rows(ROWS), strict=True):
                static.copy_(fresh)
            ids[2] = -1
            got = step().cpu()
            asked = ids.cpu()
            hot = torch.isin(asked, torch.tensor([expert for _, expert in slots.there]))
            want = source.made.want(x.cpu(), torch.where(hot, asked, -1), weights.cpu())
            assert relative_error(got, want) < BOUND
            assert torch.equal(cpu.ids.cpu(), torch.where(hot, -1, asked).int())
            counted[list({e for e in asked.flatten().tolist() if e >= 0})] += 0.5
    assert torch.equal(slots.counts[LAYER].cpu(), counted)
    slots.close()


def test_the_keeper_on_a_card(copies: CopyEngine) -> None:
    source = Source()
    slots = slots_of(source, 2, copies, DEVICE)
    keeper = HotKeeper(slots, HotRules(interval=2, moves=2))
    for _ in range(20):
        slots.counts[LAYER, [2, 5]] += 1.0
        torch.cuda.synchronize()
        keeper.between_steps()
        slots.wait()
    assert set(slots.there) == {(LAYER, 2), (LAYER, 5)}
    for (_, expert), slot in slots.there.items():
        assert torch.equal(slots.bytes[slot].cpu(), source.bytes_of(expert))
    assert slots.slot_of.cpu()[LAYER, 2] == slots.there[LAYER, 2]
    slots.close()


@pytest.mark.parametrize("lent", [set(), {0, 4, 6}, set(range(EXPERTS)) - {2}])
@pytest.mark.parametrize(("buffers", "ring"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_a_stream_on_a_card(copies: CopyEngine, buffers: int, ring: int, lent: set[int]) -> None:
    source = SlottedSource(lent)
    slots = slots_of(source, 1, copies, DEVICE)
    slots.bring(coming(3))
    settled(slots)
    rates = SplitRates(expert_bytes=1, card=100, ram=1, bus=1, bus_traffic=0.0)
    experts = StreamedExperts(
        Dispatcher(source.store, Machine(1), max_rows=16, top_k=TOP_K),
        slots, source, plain_experts, copies, rates, cpu_rows=16, buffers=buffers, ring=ring, fill_threads=2,
    )  # fmt: skip
    for _ in range(10):
        x, ids, weights = source.made.rows(100)
        source.broken = {2}
        ticket = experts.submit(LAYER, x.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE))
        got = ticket.collect().cpu()
        lost = set(ticket.report.lost)
        assert lost <= {2}
        failed = [row for row in range(100) if lost & set(ids[row].tolist())]
        assert list(ticket.failed_rows) == failed
        good = [row for row in range(100) if row not in failed]
        assert relative_error(got[good], source.made.want(x, ids, weights)[good]) < BOUND
        assert ticket.report.direct == len(lent & set(ticket.report.plan.streamed))
        assert not source.loans.total()
    assert experts.locked_bytes <= len(lent) * source.slot_bytes
    assert bool(experts.locked_bytes) == bool(lent)
    experts.close()
    assert experts.locked_bytes == 0
    slots.close()
