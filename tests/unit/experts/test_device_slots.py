"""Experts on the card: bytes, tables, what leaves and comes, and what cannot be read."""

from __future__ import annotations

import random

import pytest
import torch

from k2hybrid.errors import EngineError
from k2hybrid.experts.compute import expert_matrices, plain_experts
from k2hybrid.experts.hot import HotRules, Move
from k2hybrid.experts.hot_keeper import HotKeeper
from tests.expert_source import LAYERS, Source, coming, settled, slots_of
from tests.late_copies import LateCopies
from tests.random_experts import EXPERTS, LAYER, SIZES, relative_error

BOUND = 3e-3  # of an expert against float64 (docs/numerics.md)


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.mark.parametrize(("hidden", "inter"), SIZES)
def test_a_slot_has_the_files_bytes(hidden: int, inter: int) -> None:
    source = Source(hidden, inter)
    slots = slots_of(source, 3)
    slots.bring(coming(4, 0))
    assert (slots.slot_of == -1).all()  # nobody finds them before
    assert settled(slots) == []
    assert not slots.coming
    assert sorted(slots.there) == [(LAYER, 0), (LAYER, 4)]
    for (layer, expert), slot in slots.there.items():
        assert int(slots.slot_of[layer, expert]) == slot
        assert torch.equal(slots.bytes[slot], source.bytes_of(expert))
        for part, matrix in enumerate(expert_matrices(slots.bytes[slot], hidden, inter)):
            assert torch.equal(matrix.double(), source.made.weights[expert, part])
    assert int((slots.slot_of >= 0).sum()) == 2
    assert (slots.padded[:, 0] == -1).all()


@pytest.mark.parametrize(("hidden", "inter"), SIZES)
def test_plain_experts_against_float64(hidden: int, inter: int) -> None:
    source = Source(hidden, inter)
    slots = slots_of(source, EXPERTS)
    slots.bring(coming(*range(EXPERTS)))
    settled(slots)
    x, ids, weights = source.made.rows(20)
    ids[3] = -1
    ids[5, 1] = -1
    chosen = slots.padded[LAYER][(ids + 1).long()]
    got = plain_experts(x, slots.bytes, chosen, weights, hidden=hidden, inter=inter)
    assert relative_error(got, source.made.want(x, ids, weights)) < BOUND
    assert not got[3].any()


def test_what_cannot_be_read_is_not_there(source: Source) -> None:
    slots = slots_of(source, 2)
    source.broken = {3}
    slots.bring(coming(3, 5))
    assert settled(slots) == [(LAYER, 3)]
    assert list(slots.there) == [(LAYER, 5)]
    assert int(slots.slot_of[LAYER, 3]) == -1
    source.broken = set()
    slots.bring(coming(3))  # its slot is free again
    assert settled(slots) == []
    assert torch.equal(slots.bytes[slots.there[LAYER, 3]], source.bytes_of(3))


def test_what_leaves_is_gone_before_bytes_are_written(source: Source) -> None:
    slots = slots_of(source, 1)
    slots.bring(coming(2))
    settled(slots)
    source.go.clear()
    slots.bring([Move((LAYER, 6), (LAYER, 2))])
    assert (slots.slot_of == -1).all()
    assert torch.equal(slots.bytes[0], source.bytes_of(2))
    assert slots.coming
    assert slots.settle() == []  # and does not wait
    assert slots.coming
    source.go.set()
    settled(slots)
    assert slots.there == {(LAYER, 6): 0}
    assert torch.equal(slots.bytes[0], source.bytes_of(6))


@pytest.mark.parametrize("seed", range(4))
def test_sets_that_change(source: Source, seed: int) -> None:
    draw = random.Random(seed)
    slots = slots_of(source, 4, LateCopies() if seed % 2 else None)
    for _ in range(30):
        source.broken = set(draw.sample(range(EXPERTS), 2))
        there = list(slots.there)
        leaving = draw.sample(there, draw.randint(0, len(there)))
        others = [e for e in range(EXPERTS) if (LAYER, e) not in there]
        new = draw.sample(others, min(len(others), len(leaving) + draw.randint(0, 4 - len(there))))
        moves = [
            Move((LAYER, expert), leaving[at] if at < len(leaving) else None) for at, expert in enumerate(new)
        ]
        slots.bring(moves)
        lost = settled(slots)
        assert set(lost) == {(LAYER, e) for e in new if e in source.broken}
        gone = set(leaving[: len(new)])
        assert set(slots.there) == (set(there) - gone) | {m.comes for m in moves if m.comes not in lost}
        assert len(set(slots.there.values())) == len(slots.there)
        for (layer, expert), slot in slots.there.items():
            assert int(slots.slot_of[layer, expert]) == slot
            assert torch.equal(slots.bytes[slot], source.bytes_of(expert))
        assert int((slots.slot_of >= 0).sum()) == len(slots.there)
    slots.close()


def test_moves_that_cannot_be(source: Source) -> None:
    slots = slots_of(source, 2)
    slots.bring(coming(0))
    with pytest.raises(EngineError, match="on their way"):
        slots.bring(coming(1))
    settled(slots)
    for moves, message in (
        (coming(0), "must not"),
        ([Move((LAYER, 1), (LAYER, 2))], "must be there"),
        (coming(1, 2), "no room"),
    ):
        with pytest.raises(EngineError, match=message):
            slots.bring(moves)
    assert slots.there == {(LAYER, 0): int(slots.slot_of[LAYER, 0])}


def test_counts_are_fetched_once(source: Source) -> None:
    slots = slots_of(source, 0)
    slots.counts[LAYER, 3] += 2.5
    slots.fetch_counts().wait()
    slots.counts[0, 1] += 1
    assert slots.fetched[LAYER, 3] == 2.5
    assert slots.fetched.sum() == 2.5
    slots.fetch_counts().wait()
    assert slots.fetched[0, 1] == slots.fetched.sum() == 1


def test_bytes_are_accounted(source: Source) -> None:
    slots = slots_of(source, 3)
    assert slots.expert_bytes == source.store.expert_bytes
    assert slots.nbytes == 3 * slots.expert_bytes + 4 * LAYERS * (2 * EXPERTS + 1)


def test_the_keeper_follows_the_uses(source: Source) -> None:
    slots = slots_of(source, 2)
    keeper = HotKeeper(slots, HotRules(half_life=4.0, margin=0.1, interval=3, moves=1))

    def steps(count: int, *experts: int) -> None:
        for _ in range(count):
            slots.counts[LAYER, list(experts)] += 1
            keeper.between_steps()
            slots.wait()

    steps(2, 1)
    assert source.asked == []
    steps(4, 1)
    assert set(slots.there) == {(LAYER, 1)}
    source.broken = {4}
    steps(9, 1, 4)
    assert set(slots.there) == {(LAYER, 1)}
    assert source.asked.count(4) >= 2  # it earned its place again, and was asked for again
    source.broken = set()
    steps(9, 1, 4)
    assert set(slots.there) == {(LAYER, 1), (LAYER, 4)} == keeper.policy.chosen
    steps(30, 2, 4)
    assert set(slots.there) == {(LAYER, 2), (LAYER, 4)} == keeper.policy.chosen


def test_the_keeper_does_not_wait_for_a_disk(source: Source) -> None:
    slots = slots_of(source, 2)
    keeper = HotKeeper(slots, HotRules(interval=1, moves=1))
    source.go.clear()
    for _ in range(5):
        slots.counts[LAYER, :2] += 1
        keeper.between_steps()
    assert slots.coming
    assert (slots.slot_of == -1).all()
    source.go.set()
    slots.wait()
    keeper.between_steps()
    assert (LAYER, 0) in slots.there
    slots.wait()
