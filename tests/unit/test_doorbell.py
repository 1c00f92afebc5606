"""The doorbell's protocol with an ordinary thread in the device's place: order, epochs, abort, watchdog."""

from __future__ import annotations

import ctypes
import threading
import time
from typing import Any

import pytest

from k2hybrid.errors import EngineError
from k2hybrid.hardware.doorbell import Doorbell, StepOutcome
from k2hybrid.native.doorbell import EchoDoorbell, play_device
from k2hybrid.native.extension import ExtensionError


def play_in_background(doorbell: Doorbell, layers: int) -> tuple[threading.Thread, dict[str, Any]]:
    played: dict[str, Any] = {}
    thread = threading.Thread(target=lambda: played.update(doorbell.play_device(layers)))
    thread.start()
    return thread, played


def words(doorbell: Doorbell, field: str) -> list[int]:
    return [ctypes.c_uint32.from_address(doorbell.word(i, field)).value for i in range(doorbell.slots)]


def test_many_steps_answer_every_ring_with_its_own_answer() -> None:
    doorbell = Doorbell(60)
    for step in range(200):
        epoch = doorbell.publish(rows=1, layers=60)
        assert epoch == step + 1
        assert doorbell.play_device(60, seed=1000 * step) == {
            "answered": 60, "poisoned": 0, "wrong": 0, "timed_out": False,
        }  # fmt: skip
        assert doorbell.finish() == StepOutcome(epoch, 60, 60, "")
    assert words(doorbell, "request") == words(doorbell, "reply") == [0] * 60


def test_steps_may_use_fewer_layers_than_there_are_slots() -> None:
    doorbell = Doorbell(8)
    for layers in (8, 1, 5):
        doorbell.publish(rows=1, layers=layers)
        assert doorbell.play_device(layers)["answered"] == layers
        doorbell.finish().require_answered()


def test_the_watchdog_frees_a_device_that_nobody_answers_and_the_outcome_says_so() -> None:
    doorbell = Doorbell(12, timeout_ms=60)
    doorbell.stall_at(5)
    doorbell.publish(rows=1, layers=12)
    start = time.monotonic()
    played = doorbell.play_device(12, limit_ms=20_000)
    assert (
        time.monotonic() - start < 10
    )  # the watchdog's timeout plus a sweep, with room for a loaded machine
    assert played == {"answered": 5, "poisoned": 7, "wrong": 0, "timed_out": False}
    outcome = doorbell.finish()
    assert (outcome.answered, outcome.aborted) == (5, "watchdog")
    with pytest.raises(EngineError, match="aborted \\(watchdog\\) after 5 of 12 layers"):
        outcome.require_answered()

    with pytest.raises(ExtensionError, match="Reset"):
        doorbell.publish(rows=1, layers=12)
    with pytest.raises(ExtensionError, match="still inside an answer"):
        doorbell.reset()
    doorbell.stall_at(-1)
    recover(doorbell)
    doorbell.publish(rows=1, layers=12)
    assert doorbell.play_device(12, seed=7)["answered"] == 12
    assert doorbell.finish().aborted == ""


def recover(doorbell: Doorbell) -> None:
    """Reset once the answering thread is back, which takes it a moment."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return doorbell.reset()
        except ExtensionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.001)


def test_without_the_watchdog_in_time_the_device_waits() -> None:
    """The counterpart: a wait is a real wait, and it is the abort that ends it."""
    doorbell = Doorbell(2, timeout_ms=60_000)
    doorbell.stall_at(0)
    doorbell.publish(rows=1, layers=2)
    assert doorbell.play_device(2, limit_ms=100) == {
        "answered": 0, "poisoned": 0, "wrong": 0, "timed_out": True,
    }  # fmt: skip
    doorbell.stall_at(-1)


def test_an_abort_from_another_thread_completes_the_step() -> None:
    doorbell = Doorbell(4, timeout_ms=60_000)
    doorbell.stall_at(2)
    doorbell.publish(rows=1, layers=4)
    thread, played = play_in_background(doorbell, 4)
    while words(doorbell, "request")[2] == 0:
        time.sleep(0.001)
    doorbell.abort()
    thread.join(10)
    assert played == {"answered": 2, "poisoned": 2, "wrong": 0, "timed_out": False}
    assert doorbell.finish().aborted == "asked"
    doorbell.stall_at(-1)


def test_a_step_launched_behind_an_aborted_one_completes_too() -> None:
    doorbell = Doorbell(6, timeout_ms=60_000)
    doorbell.publish(rows=1, layers=6)
    doorbell.abort()
    for _ in range(3):
        assert doorbell.play_device(6)["poisoned"] == 6
    assert doorbell.finish().answered == 0
    recover(doorbell)
    doorbell.publish(rows=1, layers=6)
    assert doorbell.play_device(6)["answered"] == 6


def test_an_answer_that_throws_poisons_the_step() -> None:
    doorbell = Doorbell(3, timeout_ms=60_000)
    doorbell.throw_at(1)
    doorbell.publish(rows=1, layers=3)
    assert doorbell.play_device(3) == {"answered": 1, "poisoned": 2, "wrong": 0, "timed_out": False}
    assert doorbell.finish().aborted == "answer threw"


def test_a_slow_device_is_not_aborted() -> None:
    """The watchdog counts the CPU's time only: nothing is rung, so nothing is late."""
    doorbell = Doorbell(2, timeout_ms=30)
    doorbell.publish(rows=1, layers=2)
    time.sleep(0.2)
    assert doorbell.play_device(2)["answered"] == 2
    assert doorbell.finish().aborted == ""


def test_steps_are_opened_and_closed_in_order() -> None:
    doorbell = Doorbell(2)
    with pytest.raises(ExtensionError, match="no step is open"):
        doorbell.finish()
    doorbell.publish(rows=1, layers=2)
    with pytest.raises(ExtensionError, match="is open"):
        doorbell.publish(rows=1, layers=2)
    with pytest.raises(ExtensionError, match="2 slots were not rung"):
        doorbell.finish()
    assert doorbell.play_device(2)["answered"] == 2
    doorbell.finish()
    for layers in (0, 3):
        with pytest.raises(ExtensionError, match="layers for 2 slots"):
            doorbell.publish(rows=1, layers=layers)


def test_misaligned_memory_is_refused() -> None:
    buffer = ctypes.create_string_buffer(4096)
    address = -(-ctypes.addressof(buffer) // 128) * 128 + 64
    with pytest.raises(ExtensionError, match="128 bytes"):
        EchoDoorbell(buffer, address, 1, 100.0, 0.0)


def test_tearing_down_in_the_middle_of_a_step_frees_the_device() -> None:
    doorbell = Doorbell(3, timeout_ms=60_000)
    storage = doorbell.storage  # outlives the doorbell, as the device still writes there
    doorbell.stall_at(1)
    doorbell.publish(rows=1, layers=3)
    address, played = doorbell.address, {}
    thread = threading.Thread(target=lambda: played.update(play_device(address, 3, 0, 20_000.0)))
    thread.start()
    while words(doorbell, "request")[1] == 0:
        time.sleep(0.001)
    del doorbell
    thread.join(20)
    assert played["poisoned"] == 2
    assert storage.numel() > 0
