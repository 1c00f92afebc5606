"""Replays: compiled slots against a search by hand, the bound against all choices, and laws of caches."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2hybrid.errors import ConfigError
from k2hybrid.experts.synthetic import synthetic
from tests.unit.experts.brute_slots import (
    Score,
    brute_replay,
    fewest_misses,
    halved_each_tick,
    halved_every,
    last_use,
    soonest_needed,
)

pytest.importorskip("numba", reason="simulations need numba")

from k2hybrid.experts.simulate import POLICIES, Replay, Tickets, replay, replay_ids, sweep

EXPERTS = 7


@st.composite
def histories(draw: Callable[[Any], Any], layers: int = 3, tickets: int = 40, widest: int = 4) -> Any:
    """Layers and ids of hand-offs: repeats, padding and empty ones included."""
    count = draw(st.integers(0, tickets))
    ids = st.lists(st.integers(-1, EXPERTS - 1), max_size=widest)
    return (
        draw(st.lists(st.integers(0, layers - 1), min_size=count, max_size=count)),
        draw(st.lists(ids, min_size=count, max_size=count)),
    )


def codes(layer_of: list[int], ids: list[list[int]]) -> list[list[int]]:
    return [
        sorted({layer * EXPERTS + e for e in t if e >= 0}) for layer, t in zip(layer_of, ids, strict=True)
    ]


def found(result: Replay) -> list[tuple[bool, int]]:
    return list(zip(result.hit.tolist(), result.slot.tolist(), strict=True))


@pytest.mark.parametrize(
    ("policy", "half_life_ticks", "score", "remembers"),
    [
        ("lru", None, last_use, False),
        ("lrfu", 1, halved_each_tick, False),
        ("lrfu-ghost", 1, halved_each_tick, True),
        ("min", None, soonest_needed, False),
    ],
)
@settings(max_examples=150, deadline=None)
@given(history=histories(), slots=st.integers(4, 22))
def test_every_hit_and_every_slot_are_those_of_a_search_by_hand(
    policy: Any, half_life_ticks: int | None, score: Score, remembers: bool, history: Any, slots: int
) -> None:
    # One MoE layer in the pass: a half life of one pass is one tick, whose weights are exact.
    result = replay_ids(
        *history, experts=EXPERTS, slots=slots, policy=policy, half_life=half_life_ticks, moe_layers=1
    )
    assert found(result) == brute_replay(codes(*history), slots, score, remembers)


@pytest.mark.parametrize("remembers", [False, True])
@pytest.mark.parametrize(("half_life", "moe_layers"), [(0.37, 3), (5.3, 2), (40.1, 4)])
def test_other_half_lives(half_life: float, moe_layers: int, remembers: bool) -> None:
    """Where weights are rounded, ties of different histories do not occur with such odd half lives."""
    trace = synthetic(layers=3, experts=EXPERTS, top_k=2, passes=60, skew=0.7, stickiness=0.2, seed=3)
    history = trace.layer.tolist(), trace.ids.reshape(-1, 2).tolist()
    policy: Any = "lrfu-ghost" if remembers else "lrfu"
    result = replay_ids(
        *history, experts=EXPERTS, slots=8, policy=policy, half_life=half_life, moe_layers=moe_layers
    )
    wanted = brute_replay(codes(*history), 8, halved_every(half_life * moe_layers), remembers)
    assert found(result) == wanted
    assert 0.1 < result.hit_rate < 0.9


@settings(max_examples=60, deadline=None)
@given(history=histories(layers=1, tickets=14, widest=3), slots=st.integers(3, 5))
def test_the_bound_is_the_best_of_all_choices(history: Any, slots: int) -> None:
    result = replay_ids(*history, experts=EXPERTS, slots=slots, policy="min")
    assert result.misses == fewest_misses(codes(*history), slots)


@settings(max_examples=100, deadline=None)
@given(history=histories(), slots=st.integers(4, 22), half_life=st.floats(0.01, 1000))
def test_nothing_beats_the_bound(history: Any, slots: int, half_life: float) -> None:
    tickets = Tickets.from_ids(*history, experts=EXPERTS)
    hits = {result.policy: result.hits for result in sweep(tickets, [slots], POLICIES, half_life)}
    assert max(hits.values()) == hits["min"]


@settings(max_examples=100, deadline=None)
@given(history=histories(widest=1), policy=st.sampled_from(["lru", "min"]))
def test_more_slots_find_all_that_fewer_find(history: Any, policy: Any) -> None:
    """The inclusion property, expert by expert: one a ticket, since ties within a ticket go by slot."""
    tickets = Tickets.from_ids(*history, experts=EXPERTS)
    smaller: list[bool] = [False] * len(tickets.codes)
    for slots in range(1, 3 * EXPERTS + 1):
        larger = replay(tickets, slots, policy).hit.tolist()
        assert sum(larger) >= sum(smaller)
        if policy == "lru":
            assert all(now for before, now in zip(smaller, larger, strict=True) if before)
        smaller = larger


@settings(max_examples=100, deadline=None)
@given(history=histories(), slots=st.integers(4, 22), half_life=st.floats(0.01, 1000))
def test_slots_for_all_miss_each_expert_once(history: Any, slots: int, half_life: float) -> None:
    tickets = Tickets.from_ids(*history, experts=EXPERTS)
    everything = max(tickets.used, 1)
    for result in sweep(tickets, [everything, everything + 9], POLICIES, half_life):
        assert result.misses == tickets.used
    # And fewer cannot do with less.
    assert all(r.misses >= tickets.used for r in sweep(tickets, [slots], POLICIES, half_life))


def test_lru_and_a_very_short_half_life_agree() -> None:
    trace = synthetic(layers=4, experts=16, top_k=3, passes=300, skew=0.5, stickiness=0.3, seed=1)
    lru, short = replay(trace, 24), replay(trace, 24, "lrfu-ghost", 1e-3)
    assert (lru.hit == short.hit).all()
    assert (lru.slot == short.slot).all()


def test_by_layer_and_by_ticket_add_up() -> None:
    trace = synthetic(layers=5, experts=12, top_k=4, passes=50, skew=1.0, stickiness=0.5, seed=2)
    trace = trace.select(trace.layer != 2)  # a layer without experts of its own
    result = replay(trace, 30, "lrfu", 4.0)
    by_layer = result.by_layer()
    assert sorted(by_layer) == [0, 1, 3, 4]
    assert sum(hits for hits, _ in by_layer.values()) == result.hits
    assert all(hits + misses == 50 * 4 for hits, misses in by_layer.values())
    missed = result.missed_by_ticket()
    assert missed.sum() == result.misses == len(result.hit) - result.hits
    assert missed[0] == 4, "nothing is there at first"
    for layer, (_, misses) in by_layer.items():
        assert missed[trace.layer == layer].sum() == misses


def test_many_rows_are_one_ticket() -> None:
    result = replay_ids([0, 0], [[3, 1, 3, -1, 1], [1, 2]], experts=4, slots=3)
    assert result.tickets.codes.tolist() == [1, 3, 1, 2]
    assert found(result) == [(False, 0), (False, 1), (True, 0), (False, 2)]


def test_an_empty_history() -> None:
    for policy, half_life in (("lru", None), ("lrfu", 1.0), ("min", None)):
        result = replay_ids([], [], experts=4, slots=1, policy=policy, half_life=half_life)  # type: ignore[arg-type]
        assert (result.hits, result.misses, result.hit_rate, result.by_layer()) == (0, 0, 1.0, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": 1}, "1 slots are too few: one hand-off asks for 2"),
        ({"slots": 0}, "too few"),
        ({"policy": "fifo"}, "no policy 'fifo'; known: lru, lrfu, lrfu-ghost, min"),
        ({"policy": "lrfu"}, "needs a half life"),
        ({"policy": "lrfu", "half_life": 0.0}, "above 0"),
        ({"policy": "lrfu-ghost", "half_life": float("nan")}, "above 0"),
        ({"policy": "lrfu", "half_life": float("inf")}, "above 0"),
        ({"policy": "lru", "half_life": 2.0}, "has no half life"),
        ({"experts": 1}, "ids are −1…0"),
    ],
)
def test_what_cannot_be_replayed_is_said(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"experts": 2, "slots": 2, **change}
    with pytest.raises(ConfigError, match=message):
        replay_ids([0], [[0, 1]], **given)


def test_layers_and_ids_that_do_not_belong_together() -> None:
    with pytest.raises(ConfigError, match="a layer each"):
        Tickets.from_ids([0, 1], [[0]], experts=2)
    with pytest.raises(ConfigError, match="a layer each"):
        Tickets.from_ids([-1], [[0]], experts=2)


def test_without_numba_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "k2hybrid.experts.slot_kernels", raising=False)
    monkeypatch.delitem(sys.modules, "k2hybrid.experts.simulate", raising=False)
    monkeypatch.delattr("k2hybrid.experts.slot_kernels", raising=False)
    with pytest.raises(ConfigError, match="pip install numba"):
        __import__("k2hybrid.experts.simulate")
