"""When the journal is tried again after a failure, and what is said of it."""

from __future__ import annotations

import logging

import pytest

from k2hybrid.cache.journal_health import FIRST_PAUSE_S, LONGEST_PAUSE_S, WriteHealth

FULL = OSError(28, "No space left on device")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def pause(health: WriteHealth, clock: Clock) -> float:
    """Seconds until it is ready."""
    begin = clock.now
    while not health.ready:
        clock.now += 1.0
    return clock.now - begin


def test_pauses_double_up_to_a_limit_and_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    health = WriteHealth(clock)
    assert health.ready
    pauses = []
    for _ in range(9):
        health.fail(FULL)
        health.fail(FULL)  # another thread, at the same time
        assert health.failed == health.last_error == "No space left on device"
        pauses.append(pause(health, clock))
    assert pauses[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert pauses[-1] == pauses[-2] == LONGEST_PAUSE_S
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    health.worked()
    health.worked()
    assert (health.ready, health.failed, health.last_error) == (True, "", "No space left on device")
    assert len(caplog.records) == 2


def test_another_reason_is_told(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    health = WriteHealth(clock)
    health.fail(FULL)
    pause(health, clock)
    health.fail(OSError(30, "Read-only file system"))
    assert "Read-only" in caplog.records[1].getMessage()
    assert health.failed == "Read-only file system"


def test_what_fails_soon_again_pauses_for_longer_and_later_for_a_while() -> None:
    """A small file may fit where the next does not: that is no recovery."""
    clock = Clock()
    health = WriteHealth(clock)
    pauses = []
    for _ in range(3):
        health.fail(FULL)
        pauses.append(pause(health, clock))
        health.worked()
    assert pauses == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    clock.now += 10 * LONGEST_PAUSE_S
    health.fail(FULL)
    assert pause(health, clock) == FIRST_PAUSE_S
