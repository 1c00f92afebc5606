"""A runtime whose routed experts run through numba."""

from __future__ import annotations

import pytest

from k2hybrid.config import MINI_MODEL, RuntimeConfig
from k2hybrid.errors import ConfigError
from k2hybrid.runtime import load
from k2hybrid.types import SamplingParams, TokenEvent

PROMPTS = ([3, 1, 4, 1, 5], [9, 2, 6])


def said(experts: str) -> list[list[int]]:
    """Greedy answers of the built-in model to both prompts at once."""
    with load(threads=2, isa="scalar", experts=experts, latent_bytes=1 << 26) as runtime:
        runs = [runtime.generate(ids, SamplingParams(temperature=0), 12, stop_ids=()) for ids in PROMPTS]
        return [[event.token for event in run if isinstance(event, TokenEvent)] for run in runs]


def test_its_answers_are_those_of_plain_cpp() -> None:
    pytest.importorskip("numba", reason="the portable experts need numba")
    assert said("portable") == said("native")


def test_another_kind_of_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="native or portable, not 'gpu'"):
        RuntimeConfig(model=MINI_MODEL, experts="gpu")
