"""An answer does not depend on what runs beside it: prompts longer than a chunk, the built-in model."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from k2hybrid.config import MINI_MODEL, RuntimeConfig
from k2hybrid.runtime.generate import TokenRun
from k2hybrid.runtime.loading import open_runtime
from k2hybrid.runtime.runtime import Runtime
from k2hybrid.types import SamplingParams, TokenEvent

LENGTHS = (200, 515, 640, 1100)


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    config = RuntimeConfig(model=MINI_MODEL, idle_prefill=False)
    with open_runtime(config) as opened:
        yield opened


def start(runtime: Runtime, seed: int, length: int, tokens: int = 12) -> TokenRun:
    """A sampled answer to a random prompt, both by `seed`, whose tokens are told with their logprobs."""
    draw = random.Random(seed)
    prompt = [draw.randrange(runtime.spec.vocab_size - 300) for _ in range(length)]
    return runtime.generate(prompt, SamplingParams(1.5, seed=seed, logprobs=2), tokens, stop_ids=())


def said(run: TokenRun) -> list[TokenEvent]:
    return [event for event in run if isinstance(event, TokenEvent)]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_seed_gives_the_same_answer_to_the_last_bit_alone_and_in_a_crowd(
    runtime: Runtime, length: int
) -> None:
    seed = length
    crowd = [start(runtime, 10_000 + seed + n, 150 + 300 * n, 40) for n in range(4)]
    beside = start(runtime, seed, length)
    late = [start(runtime, 20_000 + seed + n, 30 + 90 * n, 10) for n in range(3)]
    together = said(beside)
    for run in [*crowd, *late]:
        said(run)
    with open_runtime(RuntimeConfig(model=MINI_MODEL, idle_prefill=False)) as fresh:  # nothing is cached
        assert said(start(fresh, seed, length)) == together
