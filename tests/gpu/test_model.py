"""The built-in model with --device cuda: the CPU's answers, and no more memory than was asked for."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from k2hybrid.experts.plan import Need
from k2hybrid.model.card_memory import CONTEXT_BYTES
from k2hybrid.runtime import card as cards
from tests import device_checks
from tests.device_parity import opened

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("options", device_checks.VARIANTS, ids=str)
def test_batches_say_what_the_cpu_says(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    device_checks.check_batches("cuda", range(1, 9), options, monkeypatch)


@pytest.mark.parametrize("options", device_checks.VARIANTS, ids=str)
def test_streamed_chunks_say_what_the_cpu_says(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    device_checks.check_streamed("cuda", options, monkeypatch)


def test_spilled_sessions_come_back() -> None:
    device_checks.check_spilled("cuda")


def test_a_stuck_worker_is_an_error_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    device_checks.check_stuck("cuda", monkeypatch)


@pytest.mark.parametrize("hot_experts", [0, None])
def test_no_more_memory_is_taken_than_was_asked_for(
    hot_experts: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs: list[Need] = []
    monkeypatch.setattr(cards, "log_needs", needs.extend)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    vram = 3 << 30
    with opened("cuda", vram=vram, hot_experts=hot_experts, dense_weights="int8") as card:
        chunk = card.runtime.config.max_step_tokens
        assert chunk is not None
        for count in range(1, 9):
            card.told.seen.clear()
            card.answer(card.prompts(count, 200), 4)
        most = torch.cuda.max_memory_allocated() - before
    # The context is the driver's, and the graphs' part of it too.
    planned = sum(need.nbytes for need in needs if need.name != "CUDA context")
    print(f"{most:,} bytes allocated of {planned:,} planned, of chunks of {chunk:,} rows")
    assert most <= planned <= vram - CONTEXT_BYTES
