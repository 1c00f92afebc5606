"""The bench of the hand-off with an ordinary thread as the device: what it computes and how it counts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from bench import gpu_handoff
from bench.gpu_handoff import Experts, Steps, measure
from k2hybrid.hardware.streams import EmulatedStream


@pytest.fixture
def steps() -> Iterator[Steps]:
    steps = Steps(Experts(64, 32, 5, 3), EmulatedStream(), layers=3, top_k=2, rows=2)
    yield steps
    steps.handoff.close()


def test_a_row_counts_microseconds_a_layer(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.accumulate(itertools.cycle([9.0, 0.009, 9.0, 0.003]))  # pause, step, pause, CPU alone
    monkeypatch.setattr(gpu_handoff.time, "perf_counter", lambda: next(ticks))
    row = measure(steps, "emulated", steps.record, replays=5)
    assert (row["rows"], row["layers"], row["replays"]) == (2, 3, 5)
    assert (row["us_median"], row["us_p99"], row["limit_us"]) == (3000.0, 3000.0, 1000.0)
    assert (row["added_us"], row["share_of_limit"]) == (2000.0, 0.333)


def test_a_wrong_sum_is_no_measurement(steps: Steps) -> None:
    steps.step(steps.record)
    steps.check()
    steps.outs[-1][0, 0] += 1
    with pytest.raises(AssertionError, match="something else"):
        steps.check()
