"""What tests/gpu/test_model.py asks of a card, asked of the emulated device."""

from __future__ import annotations

from typing import Any

import pytest

from tests import device_checks


@pytest.mark.parametrize("options", device_checks.VARIANTS, ids=str)
def test_batches_say_what_the_cpu_says(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    device_checks.check_batches("emulated", (1, 3, 5), options, monkeypatch)


@pytest.mark.parametrize("options", device_checks.VARIANTS[:2] + device_checks.VARIANTS[-1:], ids=str)
def test_streamed_chunks_say_what_the_cpu_says(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    device_checks.check_streamed("emulated", options, monkeypatch)


def test_spilled_sessions_come_back() -> None:
    device_checks.check_spilled("emulated")


def test_a_stuck_worker_is_an_error_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    device_checks.check_stuck("emulated", monkeypatch)
