"""Rates of the last seconds, by a clock that stands still."""

from __future__ import annotations

import pytest

from k2hybrid.engine.metrics import RATE_SECONDS, RECENT_STEPS, EngineMetrics, StepRecord


def record(
    ended_s: float, *, decode: int = 0, prefill: int = 0, ms: float = 100.0, read: int = 0
) -> StepRecord:
    return StepRecord(decode, prefill, ms, read, 0, ended_s)


def rates(metrics: EngineMetrics) -> tuple[float, float, float, float | None]:
    found = metrics.snapshot()
    return tuple(found[key] for key in ("decode_tokens_per_s", "prefill_tokens_per_s", "busy", "read_gb_s"))


@pytest.fixture
def metrics() -> EngineMetrics:
    return EngineMetrics(now=lambda: 100.0)


def test_nothing_ran(metrics: EngineMetrics) -> None:
    assert rates(metrics) == (0, 0, 0, None)


def test_tokens_are_counted_by_the_clock_and_bytes_by_the_time_computed(metrics: EngineMetrics) -> None:
    metrics.step(record(100 - RATE_SECONDS, decode=1000, read=10**12))  # over
    metrics.step(record(96, decode=3, prefill=20, ms=400, read=2 * 10**9))
    metrics.step(record(99, decode=2, ms=100, read=10**9))
    assert rates(metrics) == pytest.approx((5 / RATE_SECONDS, 20 / RATE_SECONDS, 0.5 / RATE_SECONDS, 6.0))


def test_a_pass_longer_than_the_time_looked_at_counts_over_all_of_its_own(metrics: EngineMetrics) -> None:
    metrics.step(record(98, prefill=200, ms=18_000))
    assert rates(metrics)[:3] == pytest.approx((0, 200 / 20, 18 / 20))


def test_more_steps_than_are_kept_are_taken_for_the_time_they_span(metrics: EngineMetrics) -> None:
    for n in range(2 * RECENT_STEPS):  # a millisecond each, the last one now
        metrics.step(record(100 - (2 * RECENT_STEPS - 1 - n) / 1000, decode=1, ms=1))
    decode, _, busy, _ = rates(metrics)
    assert decode == pytest.approx(1000)
    assert busy == pytest.approx(1)
