"""The split between card and CPU: by hand, by search over all splits, and laws."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2hybrid.errors import ConfigError
from k2hybrid.experts.split import (
    SplitRates,
    card_experts,
    card_limits,
    plan_stream,
    streams,
)

# 24 bytes an expert: 1 s on the card, 4 s on the CPU, 6 s over the bus.
RATES = SplitRates(expert_bytes=24, card=24, ram=6, bus=4, bus_traffic=0.0)
# Kimi-K2-Thinking's experts; a card of 1 TB/s, RAM of 200 GB/s, a bus of 25 GB/s.
K2 = SplitRates(
    expert_bytes=24_772_608, card=1e12, ram=200e9, bus=25e9,
    card_row_s=2 * 44.04e6 / 100e12, cpu_row_s=2 * 44.04e6 / 4e12,
    card_busy_s=60e-6, card_launch_s=20e-6, handoff_s=30e-6, handoff_row_s=6 * 7168 / 25e9, plan_s=1e-3,
)  # fmt: skip

ROWS = 60
rates_drawn = st.builds(
    SplitRates,
    expert_bytes=st.integers(1, 100),
    card=st.integers(1, 100),
    ram=st.integers(1, 100),
    bus=st.integers(1, 100),
    card_row_s=st.floats(0, 1),
    cpu_row_s=st.floats(0, 1),
    card_busy_s=st.floats(0, 5),
    card_launch_s=st.floats(0, 5),
    handoff_s=st.floats(0, 5),
    handoff_row_s=st.floats(0, 0.2),
    bus_traffic=st.floats(0, 3),
)


def test_times_of_an_expert() -> None:
    rates = SplitRates(expert_bytes=24, card=24, ram=6, bus=4, card_row_s=0.25, cpu_row_s=2.0)
    assert (rates.card_s(1), rates.card_s(4), rates.card_s(8)) == (1.0, 1.0, 2.0)
    assert (rates.cpu_s(1), rates.cpu_s(2), rates.cpu_s(3)) == (4.0, 4.0, 6.0)
    assert rates.bus_s == 6.0
    assert rates.streamed_weight == 2.0  # 6 s saved where it would be streamed, 4 − 1 in a decode step


@pytest.mark.parametrize(
    ("distinct", "busy", "handoff", "launch", "want"),
    [
        (0, 0.0, 0.0, 0.0, 0),
        (1, 0.0, 0.0, 0.0, 1),  # 1 s instead of 4
        (5, 0.0, 0.0, 0.0, 4),  # card 4 s, CPU 4 s
        (8, 0.0, 0.0, 0.0, 7),  # 7 and 4; with 6: 6 and 8
        (8, 4.0, 0.0, 0.0, 6),  # 10 and 8; with 5: 9 and 12
        (8, 20.0, 0.0, 0.0, 3),  # 23 and 20; with 2: 22 and 24; with 4: 24 and 16
        (5, 0.0, 10.0, 0.0, 5),  # 5 and 10: the hand-off takes that anyway
        (5, 0.0, 0.0, 30.0, 0),  # to launch takes longer than the CPU for all
        (5, 0.0, 0.0, 14.0, 2),  # 16 and 12; with 1: 15 and 16; so with 0 and 3: 20, 17
    ],
)
def test_card_experts_by_hand(distinct: int, busy: float, handoff: float, launch: float, want: int) -> None:
    rates = SplitRates(
        expert_bytes=24, card=24, ram=6, bus=4, card_busy_s=busy, handoff_s=handoff, card_launch_s=launch
    )
    assert card_experts(rates, distinct, 1) == want


def test_limits_of_a_step() -> None:
    limits = card_limits(K2, rows=1, top_k=8, experts=384)
    assert len(limits) == 9
    # 24.8 µs each on the card after 80 µs, 124 µs each on the CPU after 30 µs.
    assert limits[8] == 7  # 253 and 154; with 6: 229 and 278
    assert limits[0] == 0
    assert len(card_limits(K2, rows=100, top_k=8, experts=384)) == 385
    assert all(0 <= limit <= distinct for distinct, limit in enumerate(card_limits(K2, 8, 8, 384)))


def test_a_slow_card_takes_little() -> None:
    slow = SplitRates(expert_bytes=24, card=6, ram=24, bus=4)
    assert card_limits(slow, 1, 5, 100) == [0, 0, 0, 0, 1, 1]  # 4 s, and so has the CPU with 4


def test_plan_by_hand() -> None:
    # Experts 3 and 5 are there. Of the others CPU 4 s each, bus 6 s: two on the CPU (8), one on the bus (6).
    plan = plan_stream(RATES, 3, {1: 1, 2: 1, 3: 1, 5: 1, 9: 1}, {3, 5, 7})
    assert plan.hot == (3, 5)
    assert (plan.cold, plan.streamed) == ((1, 2), (9,))
    assert (plan.seconds, plan.bus_bytes) == (8.0, 24)


def test_those_with_the_fewest_rows_stay() -> None:
    rates = SplitRates(expert_bytes=24, card=24, ram=24, bus=4, cpu_row_s=1.0, bus_traffic=0.0)
    # CPU: a second a row. 0 has 30 rows, 1 has 2, 2 has 9, 3 has 3: bus 6 + 6, CPU 2 + 3.
    plan = plan_stream(rates, 40, {0: 30, 1: 2, 2: 9, 3: 3}, ())
    assert (plan.cold, plan.streamed) == ((1, 3), (0, 2))
    assert plan.seconds == 12.0


def test_streaming_takes_ram_too() -> None:
    # With three passes over RAM of 6 bytes a second an expert streamed costs 12 s of it, one computed 4.
    rates = SplitRates(expert_bytes=24, card=24, ram=6, bus=24, cpu_row_s=3.0, bus_traffic=3.0)
    plan = plan_stream(rates, 4, {0: 4, 1: 4}, ())
    # Both on the CPU 24 s; one each: CPU 12 s, RAM 16; both streamed: RAM 24.
    assert (plan.cold, plan.streamed, plan.seconds) == ((0,), (1,), 16.0)


def test_rows_that_travel_count() -> None:
    # CPU 4 s an expert, bus 6 s; a row of the CPU's travels for half a second. One each: 6 + 4 · 0.5; both
    # streamed: 12; both on the CPU: 8 + 5 · 0.5, since there are 5 rows, not 8.
    rates = SplitRates(expert_bytes=24, card=24, ram=6, bus=4, handoff_row_s=0.5, bus_traffic=0.0)
    both = plan_stream(rates, 5, {0: 4, 1: 4}, ())
    assert (both.cold, both.streamed, both.seconds) == ((0,), (1,), 8.0)
    free = plan_stream(RATES, 5, {0: 4, 1: 4}, ())
    assert (free.cold, free.streamed, free.seconds) == ((0,), (1,), 6.0)
    dear = SplitRates(expert_bytes=24, card=24, ram=6, bus=4, handoff_row_s=2.0, bus_traffic=0.0)
    assert plan_stream(dear, 5, {0: 4, 1: 4}, ()).streamed == (0, 1)  # 12; with one 6 + 8


@given(
    rates_drawn,
    st.dictionaries(st.integers(0, 9), st.integers(1, 50), max_size=7),
    st.sets(st.integers(0, 9)),
)
@settings(max_examples=150, deadline=None)
def test_no_split_is_predicted_to_be_faster(
    rates: SplitRates, rows_of: dict[int, int], hot: set[int]
) -> None:
    plan = plan_stream(rates, ROWS, rows_of, hot)
    assert sorted(plan.hot + plan.streamed + plan.cold) == sorted(rows_of)
    assert set(plan.hot) == hot & set(rows_of)
    assert plan.bus_bytes == len(plan.streamed) * rates.expert_bytes
    rest = sorted(set(rows_of) - hot)

    def seconds(cold: tuple[int, ...]) -> float:
        streamed = [e for e in rest if e not in cold]
        card = [*plan.hot, *streamed]
        return max(
            sum(rates.cpu_s(rows_of[e]) for e in cold) + rates.handoff_s if cold else 0.0,
            rates.card_busy_s
            + (rates.card_launch_s + sum(rates.card_s(rows_of[e]) for e in card) if card else 0.0),
            len(streamed) * rates.bus_s,
            (len(cold) + rates.bus_traffic * len(streamed)) * rates.expert_bytes / rates.ram,
        ) + rates.handoff_row_s * min(sum(rows_of[e] for e in cold), ROWS)

    assert plan.seconds == pytest.approx(seconds(plan.cold))
    fewest = sorted(rest, key=lambda e: (rows_of[e], e))
    best = min(seconds(tuple(fewest[:count])) for count in range(len(rest) + 1))
    assert plan.seconds == pytest.approx(best)
    # With all rows equal, which ones stay does not matter: then it is the best of all splits.
    if len(set(rows_of.values())) == 1:
        every = itertools.chain.from_iterable(itertools.combinations(rest, n) for n in range(len(rest) + 1))
        assert plan.seconds == pytest.approx(min(seconds(cold) for cold in every))


@given(rates_drawn, st.integers(0, 30), st.floats(1, 20))
@settings(max_examples=100, deadline=None)
def test_both_finish_together(rates: SplitRates, distinct: int, each: float) -> None:
    taken = card_experts(rates, distinct, each)

    def seconds(count: int) -> float:
        card = rates.card_busy_s + (rates.card_launch_s + count * rates.card_s(each) if count else 0.0)
        return max(card, rates.handoff_s + (distinct - count) * rates.cpu_s(each))

    assert seconds(taken) == min(seconds(count) for count in range(distinct + 1))


def test_streaming_begins_where_it_pays() -> None:
    def first(rates: SplitRates) -> int:
        return next(rows for rows in range(16, 4096, 16) if streams(rates, rows, 8, 384))

    # Up to 270 rows an expert takes the CPU as long as its bytes; to send it on takes RAM three times that.
    begin = first(K2)
    assert 270 < begin < 512
    assert all(streams(K2, rows, 8, 384) for rows in (begin, 512, 4096, 16384))
    assert not any(streams(K2, rows, 8, 384) for rows in (0, 1, 8, 64, begin - 16))
    assert first(SplitRates(**{**vars_of(K2), "bus": 2e9})) > begin
    # A CPU without limits streams nothing, and all experts on a card that computes faster leave nothing to.
    strong = SplitRates(**{**vars_of(K2), "cpu_row_s": 0.0})
    assert not any(streams(strong, rows, 8, 384) for rows in (1, 64, 16384))
    assert not streams(K2, 16384, 8, 384, hot=384)


def vars_of(rates: SplitRates) -> dict[str, float]:
    return {name: getattr(rates, name) for name in SplitRates.__slots__}


@pytest.mark.parametrize("wrong", [{"bus": 0}, {"card": -1}, {"handoff_s": -1e-6}, {"bus_traffic": -1}])
def test_rates_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        SplitRates(**{**vars_of(K2), **wrong})
