"""Tokens from a real, tiny, random model through the whole engine."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from k2hybrid.errors import ContextLengthError, RequestError
from k2hybrid.runtime import Runtime
from k2hybrid.types import SamplingParams
from tests.unit.runtime.conftest import opened

GREEDY = SamplingParams(temperature=0.0)


def tokens(runtime: Runtime, ids: list[int], count: int, sampling: SamplingParams = GREEDY) -> list[int]:
    return [event.token for event in runtime.generate(ids, sampling, count, stop_ids=())]


def test_a_run_counts_and_ends(runtime: Runtime) -> None:
    run = runtime.generate([3, 1, 4], GREEDY, 9, stop_ids=())
    assert run.prompt_tokens == 3
    assert len(list(run)) == 9
    assert run.finish_reason == "length"
    assert (run.usage.prompt_tokens, run.usage.completion_tokens) == (3, 9)
    assert list(run) == []  # a second pass has nothing more


def test_stop_ids_end_it(runtime: Runtime) -> None:
    greedy = tokens(runtime, [9, 8, 7], 12)
    stop = greedy[5]
    run = runtime.generate([9, 8, 7], GREEDY, 12, stop_ids=(stop,))
    assert [event.token for event in run] == greedy[: greedy.index(stop) + 1]
    assert run.finish_reason == "stop"


def test_together_as_alone(runtime: Runtime, checkpoint: Path) -> None:
    prompts = [[n, 5, *range(300, 300 + 11 * n)] for n in range(1, 7)]
    runs = [runtime.generate(prompt, GREEDY, 12, stop_ids=()) for prompt in prompts]
    together = [[event.token for event in run] for run in runs]
    with opened(checkpoint) as fresh:  # what is cached is not computed by the same sums
        assert together == [tokens(fresh, prompt, 12) for prompt in prompts]


def test_a_cached_prefix_gives_the_same_tokens(runtime: Runtime) -> None:
    prompt = [(7 * n) % 700 for n in range(200)]
    first = runtime.generate(prompt, GREEDY, 8, stop_ids=())
    fresh = [event.token for event in first]
    again = runtime.generate(prompt, GREEDY, 8, stop_ids=())
    assert [event.token for event in again] == fresh
    assert first.usage.cached_tokens == 0
    assert again.usage.cached_tokens == 199


def test_seeds(runtime: Runtime) -> None:
    def draw(seed: int) -> list[int]:
        return tokens(runtime, [1, 2], 10, SamplingParams(seed=seed))

    assert draw(4) == draw(4)
    assert draw(4) != draw(5)


def test_output_is_clamped_to_what_the_context_leaves(runtime: Runtime) -> None:
    room = runtime.context_tokens - 1000
    run = runtime.generate([1] * 1000, GREEDY, 262_144, stop_ids=())
    assert len(list(run)) == room
    assert run.finish_reason == "length"
    unbounded = runtime.generate([1] * 1000, GREEDY, stop_ids=())
    assert len(list(unbounded)) == room


def test_a_prompt_without_room_for_an_answer_is_refused(runtime: Runtime) -> None:
    with pytest.raises(ContextLengthError, match="1024 tokens > 1023 maximum"):
        runtime.generate([1] * 1024)
    with pytest.raises(RequestError, match="max_tokens"):
        runtime.generate([1], max_tokens=0)


def test_leaving_the_loop_cancels(runtime: Runtime) -> None:
    run = runtime.generate([2, 2], GREEDY, 900, stop_ids=())
    for count, _ in enumerate(run):
        if count == 3:
            break
    # Its rows and pages are free again: a request that needs the whole context runs.
    assert len(tokens(runtime, [1] * 1000, 24)) == 24


def test_steps_are_measured(runtime: Runtime) -> None:
    metrics = runtime.engine.metrics
    before = metrics.steps
    tokens(runtime, [11, 12], 5)
    deadline = time.monotonic() + 20
    while (
        metrics.steps < before + 5 and time.monotonic() < deadline
    ):  # recorded just after its tokens are sent
        time.sleep(0.001)
    assert metrics.steps == before + 5
    record = metrics.recent[-1]
    assert (record.decode_tokens, record.prefill_tokens) == (1, 0)
    assert record.ms > 0
    spec = runtime.spec
    # One token, one MoE layer, top_k experts of three matrices: a nibble a weight and a bf16 scale per 32.
    expert = 3 * spec.hidden_size * spec.moe_intermediate_size
    assert record.expert_bytes == spec.top_k * (expert // 2 + expert // 32 * 2)
    assert record.bytes_read > record.expert_bytes
