"""The built-in model on the emulated device beside the same on the CPU, by every way that experts go."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from k2hybrid.chat.exchanges import gather
from k2hybrid.runtime import Runtime, load
from k2hybrid.types import Message, SamplingParams, TokenEvent
from tests.mini_sizes import PAGE_BYTES, ROUTED_EXPERTS
from tests.unit.runtime.emulated import (
    GREEDY,
    HANDED,
    OPTIONS,
    QUESTIONS,
    SOME_HOT,
    STREAMED,
    Opened,
    agree,
    chat,
    idle,
    largest_distance,
    opened,
)

BOUND = 0.15  # 4 E of the built-in model (docs/numerics.md, "On a device")
ALL_HOT = 1 << 30

Answers = list[tuple[list[int], torch.Tensor]]

WAYS = {
    "handed": {"max_step_tokens": HANDED, "hot_experts": 0},
    "some hot": {"max_step_tokens": HANDED, "hot_experts": SOME_HOT},
    "all hot": {"max_step_tokens": HANDED, "hot_experts": ALL_HOT},
    "streamed": {"max_step_tokens": STREAMED, "hot_experts": 0},
    "streamed and hot": {"max_step_tokens": STREAMED, "hot_experts": SOME_HOT},
}
STORED = [
    {},
    {"dense_weights": "int8"},
    {"dense_weights": "fp8", "latent_rows": "fp8"},
]


@pytest.fixture(scope="module", params=STORED, ids=lambda options: " ".join(options.values()) or "bf16")
def wanted(request: pytest.FixtureRequest) -> tuple[dict[str, str], list[list[int]], Answers]:
    """What the CPU says: options, prompts, tokens and logits."""
    options: dict[str, str] = request.param
    with opened("cpu", max_step_tokens=STREAMED, **options) as cpu:
        prompts = [cpu.ids(text) for text in QUESTIONS]
        return options, prompts, [cpu.answer(ids) for ids in prompts]


@pytest.mark.parametrize("way", WAYS)
def test_answers_are_those_of_the_cpu(
    wanted: tuple[dict[str, str], list[list[int]], Answers], way: str
) -> None:
    options, prompts, want = wanted
    with opened("emulated", **WAYS[way], **options) as device:
        got = [device.answer(ids) for ids in prompts]
        for _ in range(2):  # with what has come to the card meanwhile
            again = [device.answer(ids) for ids in prompts]
            for mine, yours in zip(again, want, strict=True):
                agree(mine, yours, BOUND)
        status = device.runtime.status()
    for mine, yours in zip(got, want, strict=True):
        agree(mine, yours, BOUND)
    assert status["engine"]["failed_steps"] == status["engine"]["integrity_errors"] == 0
    found = status["device"]
    assert (found["handed_rows"] < found["chunk"]) == ("streamed" in way)
    assert (found["hot_experts"] > 0) == ("hot" in way)
    assert (
        found["hot_experts"]
        <= found["hot_slots"]
        == {0: 0, SOME_HOT: 8, ALL_HOT: ROUTED_EXPERTS}[WAYS[way]["hot_experts"]]
    )
    assert found["recorded"] == [*range(1, 9)]


def test_another_model_is_outside_the_bound(
    wanted: tuple[dict[str, str], list[list[int]], Answers],
) -> None:
    """The bound can fail: one wrong token in the prompt exceeds it."""
    options, prompts, want = wanted
    with opened("emulated", **WAYS["some hot"], **options) as device:
        _, logits = device.answer([*prompts[0][:-4], prompts[0][-4] + 1, *prompts[0][-3:]], 1)
    assert largest_distance(logits, want[0][1][:1]) > BOUND


def test_steps_are_recorded_before_the_first_request() -> None:
    """And no expert is read for that, nor anything served by it in anybody's pages."""
    with opened("emulated", **WAYS["some hot"]) as device:
        deadline = time.monotonic() + 60
        while device.runtime.status()["device"]["recorded"] != [*range(1, 9)]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert idle(device.runtime)
        assert device.runtime.engine._meter.expert_bytes == device.runtime.status()["engine"]["steps"] == 0
        assert not device.spied.sizes


# --- several at once ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["handed", "streamed", "streamed and hot"])
def device(request: pytest.FixtureRequest) -> Iterator[Opened]:
    with opened("emulated", **WAYS[request.param]) as model:
        yield model


def prompts_of(model: Opened, count: int, longest: int = 150) -> list[list[int]]:
    draw = random.Random(count)
    words = [*range(300, 1500)]
    return [
        [*model.ids(QUESTIONS[n % 4])[:30], *draw.choices(words, k=draw.randrange(3, longest)), n]
        for n in range(count)
    ]


def test_several_at_once_decode_in_recorded_steps(device: Opened) -> None:
    """In batches of several sizes, and beside prefill."""
    prompts = prompts_of(device, 7)
    device.spied.sizes.clear()
    tokens = 40  # enough that the last prompt's prefill ends while others still decode
    together = device.together(prompts, tokens)
    assert [len(said) for said in together] == [tokens] * 7
    decoding = {len(sizes) for sizes in device.spied.sizes if set(sizes) == {1}}
    first = next(at for at, sizes in enumerate(device.spied.sizes) if set(sizes) == {1})
    beside = [sizes for sizes in device.spied.sizes[first:] if max(sizes) > 1]  # joined, or in between
    assert max(decoding) > 1
    assert set(device.runtime.status()["device"]["recorded"]) >= decoding
    assert beside, device.spied.sizes
    assert device.runtime.status()["engine"]["failed_steps"] == 0


def test_the_same_request_alone_gives_the_same_bits_while_nothing_is_hot() -> None:
    """On one device, the same passes: recorded or not, again and again."""
    with opened("emulated", **WAYS["handed"]) as device:
        ids = device.ids(QUESTIONS[0])
        first, logits = device.answer(ids)
        for _ in range(3):
            said, again = device.answer([*ids])
            assert said == first
            # The last token of the prompt is computed alone then, in a decode step.
            assert largest_distance(again, logits) <= BOUND
        said, last = device.answer([*ids])
        assert torch.equal(last, again)


def test_batches_differ_from_single_requests_within_the_bound(device: Opened) -> None:
    """Not the same bits, as on the CPU: what is promised is the bound. Tokens may differ at near ties."""
    prompts = prompts_of(device, 4, 40)
    alone = [device.answer(ids, 6) for ids in prompts]
    batch = device.together(prompts, 6)
    for (said, logits), other in zip(alone, batch, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(said, other, strict=True)) if a != b), None)
        if same is not None:
            gap = logits[same, said[same]] - logits[same, other[same]]
            assert gap <= 2 * BOUND * logits[same].norm()


def test_several_samples_of_one_prompt(device: Opened) -> None:
    ids = prompts_of(device, 1)[0]
    runs = [
        device.runtime.generate(ids, SamplingParams(temperature=1.5, seed=seed), 8, stop_ids=())
        for seed in range(5)
    ]
    said = [[event.token for event in run if isinstance(event, TokenEvent)] for run in runs]
    assert [len(one) for one in said] == [8] * 5
    assert len({tuple(one) for one in said}) > 1


def test_cancelled_requests_leave_the_others_alone(device: Opened) -> None:
    prompts = prompts_of(device, 8)
    runs = [device.runtime.generate(ids, GREEDY, 40, stop_ids=()) for ids in prompts]
    draw = random.Random(3)

    def cancel(run: Any) -> None:
        time.sleep(draw.uniform(0, 0.2))
        run.cancel()

    threads = [threading.Thread(target=cancel, args=(run,)) for run in runs[::2]]
    for thread in threads:
        thread.start()
    said = [[event.token for event in run if isinstance(event, TokenEvent)] for run in runs]
    for thread in threads:
        thread.join()
    assert [len(one) for one in said[1::2]] == [40] * 4
    assert idle(device.runtime)
    assert device.runtime.status()["engine"]["failed_steps"] == 0


# --- chat ---------------------------------------------------------------------------------------------

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "required": ["city"],
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
        },
    },
}


@pytest.mark.parametrize("seed", [0, 1])
def test_tool_calls_are_constrained(device: Opened, seed: int) -> None:
    request = chat(
        QUESTIONS[1],
        tools=(WEATHER,),
        tool_choice="required",
        sampling=SamplingParams(temperature=1.0, seed=seed),
        thinking_budget=4,
        max_tokens=120,
    )
    run = device.runtime.chat(request)
    answer = gather([event for delta in run for event in delta.events])
    assert run.finish_reason == "tool_calls"
    assert answer.calls
    for name, arguments in answer.calls:
        assert name == "get_weather"
        jsonschema.validate(json.loads(arguments), WEATHER["function"]["parameters"])


def turns(model: Runtime, count: int = 3) -> tuple[list[list[int]], list[int]]:
    """A conversation: what is said, and tokens found cached at each turn."""
    messages: list[Message] = [Message("user", "Compare 3.7 and 3.65, " * 12)]
    said, cached = [], []
    for turn in range(count):
        run = model.chat(replace(chat("Hello"), messages=tuple(messages)))
        answer = gather([event for delta in run for event in delta.events])
        said.append(list(run.ids))
        cached.append(run.usage.cached_tokens)
        messages += [answer.message(), Message("user", f"And now {turn}.5?")]
    return said, cached


@pytest.mark.parametrize("way", ["handed", "streamed and hot"])
def test_sessions_come_back_from_journal_and_ram(tmp_path: Path, way: str) -> None:
    options = {**OPTIONS, **WAYS[way], "device": "emulated", "journal": tmp_path / "journal"}
    with load(**options) as first:
        said, cached = turns(first)
        assert cached[0] == 0
        assert min(cached[1:]) >= 64
    with load(**options) as second:
        again, found = turns(second)
        assert found[0] >= 64
        assert second.status()["engine"]["cached_journal_tokens"] >= 64
    assert [one[0] for one in again] == [one[0] for one in said]
    options |= {"latent_bytes": 10 * PAGE_BYTES, "cache_ram": 40 * PAGE_BYTES, "context_tokens": 512}
    del options["journal"]
    with load(**options) as small:
        draw = random.Random(1)
        histories = [draw.choices(range(300, 1500), k=280) for _ in range(3)]
        for _ in range(2):
            for history in histories:
                run = small.generate(history, GREEDY, 4, stop_ids=())
                history += [e.token for e in run if isinstance(e, TokenEvent)]
        engine = small.status()["engine"]
        assert engine["cached_ram_tokens"] > 200
        assert engine["page_copy_errors"] == engine["failed_steps"] == 0
