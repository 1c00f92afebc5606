"""Which experts lie on the card: capacity, hysteresis, ties, and replays against a search by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2hybrid.errors import ConfigError
from k2hybrid.experts.hot import HotPolicy, HotRules, Move
from k2hybrid.experts.hot_replay import replay_hot, uses_by_pass
from k2hybrid.experts.synthetic import synthetic

LAYERS, EXPERTS = 3, 5
ALWAYS = HotRules(half_life=1e9, margin=0.25, interval=1, moves=4)

histories = st.lists(
    st.lists(st.integers(0, 3), min_size=LAYERS * EXPERTS, max_size=LAYERS * EXPERTS), max_size=30
)


def table(*uses: tuple[int, int, float]) -> np.ndarray:
    counts = np.zeros((LAYERS, EXPERTS))
    for layer, expert, count in uses:
        counts[layer, expert] = count
    return counts


@given(
    histories,
    st.integers(0, LAYERS * EXPERTS + 2),
    st.floats(0.5, 1000),
    st.floats(0, 2),
    st.integers(1, 6),
)
@settings(max_examples=150, deadline=None)
def test_laws(history: list[list[int]], capacity: int, half_life: float, margin: float, most: int) -> None:
    policy = HotPolicy(LAYERS, EXPERTS, capacity, HotRules(half_life, margin, 1, most))
    there: set[tuple[int, int]] = set()
    for uses in history:
        policy.observe(np.array(uses).reshape(LAYERS, EXPERTS), 1)
        score = policy.scores
        moves = policy.decide()
        assert len(moves) <= most
        for move in moves:
            assert move.comes not in there
            assert score[move.comes] > 0
            if move.leaves is None:
                assert len(there) < policy.capacity
            else:
                assert score[move.comes] > score[move.leaves] * (1 + margin)
                there.remove(move.leaves)
            there.add(move.comes)
        assert there == policy.chosen
        assert len(there) <= min(capacity, LAYERS * EXPERTS)
        if len(moves) < most:  # nothing worth it is left
            outside = [score[k] for k in np.ndindex(score.shape) if k not in there]
            weakest = min((score[k] for k in there), default=0.0)
            full = len(there) == policy.capacity
            bar = weakest * (1 + margin) if full else 0.0
            assert capacity == 0 or max(outside, default=0.0) <= bar + 1e-12


@given(st.integers(1, LAYERS * EXPERTS), st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_equal_uses_do_not_take_turns(capacity: int, rounds: int) -> None:
    policy = HotPolicy(LAYERS, EXPERTS, capacity, HotRules(3.0, 0.0, 1, LAYERS * EXPERTS))
    policy.observe(np.ones((LAYERS, EXPERTS)), 1)
    first = policy.decide()
    assert [move.comes for move in first] == [divmod(code, EXPERTS) for code in range(capacity)]
    for _ in range(rounds):
        policy.observe(np.ones((LAYERS, EXPERTS)), 1)
        assert policy.decide() == []


def test_two_that_alternate_do_not_chase_each_other() -> None:
    policy = HotPolicy(LAYERS, EXPERTS, 1, HotRules(half_life=8.0, margin=0.25, interval=1, moves=4))
    moves = 0
    for step in range(200):
        policy.observe(table((1, step % 2, 1.0)), 1)
        moves += len(policy.decide())
    assert moves == 1  # a use of one step is 2^(1/8) = 1.09 times one of the step before, less than 1.25


def test_a_newcomer_comes_once_it_beats_the_margin() -> None:
    policy = HotPolicy(LAYERS, EXPERTS, 2, ALWAYS)
    policy.observe(table((0, 0, 8), (2, 4, 4)), 1)
    assert policy.decide() == [Move((0, 0)), Move((2, 4))]
    policy.observe(table((1, 1, 4.9)), 1)
    assert policy.decide() == []  # less than 4 · 1.25
    policy.observe(table((1, 1, 0.5)), 1)
    assert policy.decide() == [Move((1, 1), (2, 4))]


def test_a_layer_may_have_more_than_another() -> None:
    policy = HotPolicy(LAYERS, EXPERTS, 5, HotRules(moves=10))
    policy.observe(table(*((1, e, 9 - e) for e in range(4)), (0, 3, 1), (2, 2, 0.5)), 1)
    policy.decide()
    assert policy.chosen == {(1, 0), (1, 1), (1, 2), (1, 3), (0, 3)}


def test_uses_decay() -> None:
    policy = HotPolicy(LAYERS, EXPERTS, 1, HotRules(half_life=4.0))
    policy.observe(table((0, 0, 8)), 1)
    policy.observe(table((0, 1, 1)), 8)
    assert policy.scores[0, :2] == pytest.approx([2.0, 1.0])


def test_what_could_not_be_read_earns_its_place_anew() -> None:
    policy = HotPolicy(LAYERS, EXPERTS, 1, ALWAYS)
    policy.observe(table((0, 0, 8), (0, 1, 2)), 1)
    assert policy.decide() == [Move((0, 0))]
    policy.lost((0, 0))
    assert policy.decide() == [Move((0, 1))]
    policy.observe(table((0, 0, 3)), 1)
    assert policy.decide() == [Move((0, 0), (0, 1))]


@pytest.mark.parametrize(
    "rules",
    [
        {"half_life": 0.0},
        {"half_life": float("inf")},
        {"margin": -0.1},
        {"interval": 0},
        {"moves": 0},
    ],
)
def test_rules_are_checked(rules: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        HotRules(**rules)  # type: ignore[arg-type]


def test_counts_are_checked() -> None:
    policy = HotPolicy(LAYERS, EXPERTS, 1)
    for bad in (np.ones(3), table((0, 0, -1)), table((0, 0, np.nan))):
        with pytest.raises(ConfigError):
            policy.observe(bad, 1)


def test_replay_by_hand() -> None:
    trace = synthetic(layers=2, experts=6, top_k=2, passes=40, skew=1.0, stickiness=0.3, drift=0.1, seed=3)
    rules = HotRules(half_life=5.0, margin=0.1, interval=4, moves=2)
    found = replay_hot(trace, 3, rules, warm_up=12)

    ids = trace.ids.reshape(40, 2, 2)
    policy = HotPolicy(2, 6, 3, rules)
    here: set[tuple[int, int]] = set()
    coming: list[tuple[int, int]] = []
    served = asked = 0
    totals: dict[tuple[int, int], int] = {}
    for step in range(40):
        uses = {(layer, int(e)) for layer in range(2) for e in ids[step, layer]}
        if step >= 12:
            served += len(uses & here)
            asked += len(uses)
            for key in uses:
                totals[key] = totals.get(key, 0) + 1
        if step % 4 == 0:
            block = np.zeros((2, 6))
        for key in uses:
            block[key] += 1
        if step % 4 == 3:
            here |= set(coming)
            policy.observe(block, 4)
            moves = policy.decide()
            here -= {move.leaves for move in moves if move.leaves}
            coming = [move.comes for move in moves]
    assert served > 0
    assert found.share == served / asked
    assert found.best == sum(sorted(totals.values())[-3:]) / asked


def test_nothing_beats_the_best_fixed_set_where_nothing_drifts() -> None:
    trace = synthetic(layers=3, experts=32, top_k=4, passes=900, skew=1.2, seed=1)
    rules = HotRules(half_life=200.0, margin=0.25, interval=8, moves=8)
    found = replay_hot(trace, 12, rules, warm_up=400)
    assert 0.9 * found.best < found.share <= found.best
    assert found.moves < 0.1


def test_what_drifts_is_followed() -> None:
    trace = synthetic(layers=3, experts=32, top_k=4, passes=1500, skew=1.2, drift=1 / 300, seed=1)
    found = replay_hot(trace, 12, HotRules(half_life=32.0, moves=8), warm_up=300)
    assert found.share > 1.1 * found.best


def test_uses_leave_padding_and_dense_layers_out() -> None:
    trace = synthetic(layers=2, experts=6, top_k=2, passes=3, seed=3)
    trace.ids[0] = -1
    trace.layer[:] += 4
    used = uses_by_pass(trace)
    assert used.shape == (3, 2, 6)
    assert used.sum() == len(trace.ids) - 1
