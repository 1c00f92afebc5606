"""Step times with and without prefetch: a second telling, closed formulas, a timeline by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2hybrid.errors import ConfigError
from k2hybrid.experts.synthetic import foreseen, synthetic
from k2hybrid.experts.traces import Trace, TraceHeader, offsets
from tests.unit.experts.brute_slots import BruteSlots, Score, halved_each_tick, last_use

pytest.importorskip("numba", reason="simulations need numba")

from k2hybrid.experts.prefetch import Rates, StepTimes, prefetch_gain, recall, step_times
from k2hybrid.experts.simulate import Tickets, replay

RATES = Rates(expert_bytes=10.0, dense_bytes=30.0, ram=10.0, disk=4.0)  # computes 1 s, reads 2.5 s; dense 3 s


def hand_made(experts: int, tickets: list[tuple[int, list[list[int]], int, list[list[int]]]]) -> Trace:
    """From (layer, ids of each row, layer foreseen or −1, its ids of each row)."""
    width = max((len(row) for _, _, _, ahead in tickets for row in ahead), default=1)
    ids = [np.array(rows, np.int32).ravel() for _, rows, _, _ in tickets]
    ahead = [np.array(rows, np.int32).ravel() for _, _, _, rows in tickets]
    return Trace(
        TraceHeader("m", 1 + max(layer for layer, *_ in tickets), experts, 1, "t", ahead=width),
        np.array([layer for layer, *_ in tickets], np.int32),
        np.array([len(rows) for _, rows, _, _ in tickets], np.int32),
        offsets(np.array([len(part) for part in ids])),
        np.concatenate(ids),
        np.array([layer for _, _, layer, _ in tickets], np.int32),
        offsets(np.array([len(part) for part in ahead])),
        np.concatenate(ahead).astype(np.int32),
    )


def told_again(
    trace: Trace, slots: int, rates: Rates, width: int, score: Score, remembers: bool, in_time: bool
) -> tuple[float, int, int, int]:
    """Seconds, experts missed, read ahead and used."""
    header, tickets = trace.header, Tickets.of(trace)
    state = BruteSlots(score, remembers, [None] * slots)
    compute, read = rates.expert_bytes / rates.ram, rates.expert_bytes / rates.disk
    clock = disk_free = 0.0
    arrives: dict[int, float] = {}  # read ahead, and not asked for yet
    missed = ahead = used = 0
    for at in range(len(trace)):
        asked = tickets.codes[tickets.starts[at] : tickets.starts[at + 1]].tolist()
        state.pinned.clear()
        hits = [code for code, (hit, _) in zip(asked, state.serve(asked), strict=True) if hit]
        done = clock + compute * len(hits)
        for code in asked:
            if code in arrives and code in hits:
                used += 1
                done = max(done, arrives[code])
            arrives.pop(code, None)
        lacking = len(asked) - len(hits)
        disk_free = max(disk_free, clock) + read * lacking
        if lacking:
            done = max(done, disk_free)
        missed += lacking
        clock = done + rates.dense_bytes / (rates.dense or rates.ram)
        rows = trace.ahead_ids[trace.ahead_starts[at] : trace.ahead_starts[at + 1]].reshape(-1, header.ahead)
        wanted = [
            int(trace.ahead_layer[at]) * header.experts + int(e)
            for rank in range(width)
            for e in rows[:, rank]
        ]
        state.pinned |= {code for code in wanted if code in state.held}
        for code in wanted:
            if disk_free >= clock or (in_time and disk_free + read > clock):
                break
            if code not in state.held:
                if state.load(code) is None:
                    break
                disk_free += read
                arrives[code] = disk_free
                ahead += 1
    return clock, missed, ahead, used


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    slots=st.integers(3, 18),
    width=st.integers(0, 5),
    quality=st.sampled_from([0.0, 0.6, 1.0]),
    disk=st.sampled_from([0.5, 4.0, 60.0]),
    in_time=st.booleans(),
    policy=st.sampled_from([("lru", None, last_use, False), ("lrfu-ghost", 1 / 3, halved_each_tick, True)]),
)
def test_times_and_counts_are_those_of_a_second_telling(
    seed: int, slots: int, width: int, quality: float, disk: float, policy: Any, in_time: bool
) -> None:
    trace = synthetic(layers=3, experts=6, top_k=3, passes=12, skew=0.5, stickiness=0.3, seed=seed)
    trace = foreseen(trace, 5, quality, seed)
    rates = dataclasses.replace(RATES, disk=disk)
    name, half_life, score, remembers = policy
    got = step_times(trace, slots, rates, width=width, policy=name, half_life=half_life, in_time=in_time)
    seconds, *counts = told_again(trace, slots, rates, width, score, remembers, in_time)
    assert [got.missed, got.read_ahead, got.used] == counts
    assert got.seconds == pytest.approx(seconds, rel=1e-12)
    assert got.step_ms == pytest.approx(1e3 * seconds / 12)


def test_many_rows_foresee_by_rank() -> None:
    """Disk time for two of four: the first choices of both rows, not both choices of the first."""
    trace = hand_made(
        9,
        [(0, [[0], [1]], 1, [[2, 3], [4, 5]]), (1, [[2], [4]], -1, [])],
    )
    times = step_times(trace, 9, dataclasses.replace(RATES, dense_bytes=50.0), width=2)
    assert (times.missed, times.read_ahead, times.used) == (2, 2, 2)


def test_without_prefetch_a_step_is_the_sum_of_its_hand_offs() -> None:
    trace = synthetic(layers=4, experts=16, top_k=4, passes=100, skew=0.8, stickiness=0.4, seed=5)
    for policy, half_life in (("lru", None), ("lrfu-ghost", 8.0)):
        missed = replay(trace, 30, policy, half_life).missed_by_ticket()  # type: ignore[arg-type]
        seconds = np.maximum((4 - missed) * 1.0, missed * 2.5) + 3.0
        got = step_times(trace, 30, RATES, policy=policy, half_life=half_life)  # type: ignore[arg-type]
        assert got.seconds == pytest.approx(seconds.sum(), rel=1e-12)
        assert (got.missed, got.read_ahead) == (missed.sum(), 0)


def test_a_timeline_by_hand() -> None:
    trace = hand_made(
        4,
        [
            (
                0,
                [[0]],
                1,
                [[1, 2]],
            ),  # 0: read to 2.5; dense to 5.5; expert 1 ahead from 2.5 to 5, 2 from 5 to 7.5
            (1, [[1]], -1, []),  # 5.5: computes to 6.5; dense to 9.5; the disk is busy to 7.5
            (0, [[3]], 1, [[0, 0]]),  # 9.5: read to 12; dense to 15; expert 0 ahead from 12 to 14.5
            (1, [[2]], -1, []),  # 15: there since 7.5; to 16; dense to 19
        ],
    )
    assert step_times(trace, 8, RATES, width=2) == StepTimes(19.0, 2.0, 2, 3, 2)
    # The second read, wrong this time, delays what is really missing: 5.5 to 7.5 to 10, instead of 8.
    late = hand_made(4, [(0, [[0]], 1, [[1, 2]]), (1, [[3]], -1, [])])
    assert step_times(late, 8, RATES, width=2).seconds == 13.0
    assert step_times(late, 8, RATES, width=1).seconds == 11.0
    assert step_times(late, 8, RATES, width=2, in_time=True).seconds == 11.0
    # A hand-off waits for what is on its way: asked for at 5.5, there at 7.5.
    waits = hand_made(4, [(0, [[0]], 1, [[2, 1]]), (1, [[1]], -1, [])])
    assert step_times(waits, 8, RATES, width=2).seconds == 10.5


def test_perfect_foresight_and_a_patient_disk_leave_only_the_first_layer() -> None:
    trace = foreseen(synthetic(layers=5, experts=8, top_k=3, passes=40, seed=2), 3, 1.0)
    gain = prefetch_gain(trace, 40, dataclasses.replace(RATES, dense_bytes=1e6), width=3)
    assert gain.without.missed == len(np.unique(Tickets.of(trace).codes))
    first_layer = trace.select(trace.layer == 0)
    assert gain.ahead.missed == len(np.unique(first_layer.ids))
    assert gain.ahead.used == gain.ahead.read_ahead == gain.without.missed - gain.ahead.missed
    assert 0 < gain.gain < 1e-3


def test_wrong_foresight_is_a_loss() -> None:
    trace = foreseen(synthetic(layers=5, experts=32, top_k=3, passes=100, skew=1.0, seed=2), 6, 0.0)
    gain = prefetch_gain(trace, 60, RATES, width=6)
    assert gain.ahead.read_ahead > 100
    assert gain.gain < -0.05


def test_recall_is_what_was_set() -> None:
    trace = synthetic(layers=6, experts=64, top_k=8, passes=300, skew=0.5, seed=1)
    for quality in (0.0, 0.3, 1.0):
        assert recall(foreseen(trace, 12, quality), 12) == pytest.approx(quality, abs=0.02)
    half = foreseen(trace, 8, 1.0)
    assert recall(half, 4) == pytest.approx(0.5)
    assert recall(trace.select(trace.layer == 0), 0) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 4}, "has 3 predicted ids a row, not 4"),
        ({"width": 0}, "not 0"),
        ({"slots": 1}, "too few"),
        ({"policy": "min"}, "not min"),
        ({"policy": "lrfu"}, "needs a half life"),
    ],
)
def test_what_cannot_be_replayed_is_said(change: dict[str, Any], message: str) -> None:
    trace = foreseen(synthetic(layers=2, experts=8, top_k=2, passes=3), 3, 0.5)
    with pytest.raises(ConfigError, match=message):
        prefetch_gain(trace, **{"slots": 4, "rates": RATES, "width": 3, **change})


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["expert_bytes", "ram", "disk"])
def test_rates_are_positive(name: str, bad: float) -> None:
    with pytest.raises(ConfigError, match="positive"):
        dataclasses.replace(RATES, **{name: bad})


def test_a_warm_up_fills_the_slots_and_is_not_counted() -> None:
    trace = synthetic(layers=2, experts=8, top_k=3, passes=40, seed=7)
    trace = foreseen(trace, 4, 0.7)
    first = trace.select(np.arange(80) < 30)
    for width in (0, 4):
        parts = [step_times(part, 10, RATES, width=width) for part in (trace, first)]
        rest = step_times(trace, 10, RATES, width=width, warm_up=30)
        assert rest.seconds == pytest.approx(parts[0].seconds - parts[1].seconds)
        assert rest.missed == parts[0].missed - parts[1].missed
        assert rest.passes == 25
        rate = replay(trace, 10).hit_rate_after(30)
        if width == 0:
            assert rate == pytest.approx(1 - rest.missed / (50 * 3))
