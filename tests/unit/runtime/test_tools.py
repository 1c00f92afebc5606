"""Tool calls, JSON and thinking as a runtime gives them: constrained, validated, generated again, in time."""

from __future__ import annotations

import asyncio
import json
import queue
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from k2hybrid.chat.exchanges import Answer, gather
from k2hybrid.engine.memory import PageMemory
from k2hybrid.errors import RequestError
from k2hybrid.runtime import ChatRun, Runtime
from k2hybrid.runtime.guarded import RETRIES
from k2hybrid.runtime.rules import thinking_budget
from k2hybrid.types import (
    ChatRequest,
    Content,
    Event,
    Malformed,
    Message,
    PromptProgress,
    Reasoning,
    SamplingParams,
    ToolCall,
    ToolCallStart,
)
from tests.unit.runtime.scripted import ScriptedModel, scripted_runtime

HELLO = (Message("user", "Hello"),)


def tool(name: str, properties: dict[str, Any], *required: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


FLAG = tool("flag", {"on": {"type": "boolean"}, "why": {"enum": ["a", "b"]}}, "on")
OTHER = tool("other", {"n": {"type": "integer", "minimum": 1, "maximum": 9}}, "n")
# Half of what the grammar allows is not valid; and nothing of it.
CHOOSY = tool("choosy", {"on": {"type": "boolean", "not": {"const": True}}}, "on")
NEVER = tool("never", {"on": {"type": "boolean", "not": {"enum": [True, False]}}}, "on")


def answer_of(run: ChatRun) -> tuple[Answer, list[Event]]:
    events = [event for delta in run for event in delta.events]
    return gather(events), events


def ask(
    runtime: Runtime, *tools: dict[str, Any], seed: int = 0, **fields: Any
) -> tuple[ChatRun, list[Event]]:
    fields = {"max_tokens": 200, "thinking_budget": 4, "tool_choice": "required", **fields}
    request = ChatRequest(HELLO, tools=tools, sampling=SamplingParams(seed=seed), **fields)
    run = runtime.chat(request)
    return run, answer_of(run)[1]


@pytest.fixture
def scripted(checkpoint: Path) -> Iterator[tuple[Runtime, ScriptedModel]]:
    runtime, model = scripted_runtime(checkpoint)
    with runtime:
        yield runtime, model


def test_required_calls_are_made_and_fit(runtime: Runtime) -> None:
    names = set()
    for seed in range(20):
        run, events = ask(runtime, FLAG, OTHER, seed=seed)
        answer = gather(events)
        assert run.finish_reason == "tool_calls"
        assert answer.calls
        assert not answer.content
        for name, arguments in answer.calls:
            schema = {"flag": FLAG, "other": OTHER}[name]["function"]["parameters"]
            jsonschema.validate(json.loads(arguments), schema)
            names.add(name)
    assert names == {"flag", "other"}


def test_a_named_tool_and_one_call_at_most(runtime: Runtime) -> None:
    for seed in range(10):
        _, events = ask(runtime, FLAG, OTHER, seed=seed, tool_name="other", parallel_tool_calls=False)
        assert [name for name, _ in gather(events).calls] == ["other"]


def test_forced_tokens_take_no_step_of_their_own(runtime: Runtime) -> None:
    before = runtime.engine.metrics.steps
    run, _ = ask(runtime, FLAG, parallel_tool_calls=False, thinking=False)
    assert run.usage.completion_tokens > 1.5 * (runtime.engine.metrics.steps - before)


def test_ids_go_on_over_the_conversation(runtime: Runtime) -> None:
    history = (
        *HELLO,
        Message("assistant", None, tool_calls=(ToolCall("toolu_x", "flag", '{"on": true}'),)),
        Message("tool", "done", tool_call_id="toolu_x"),
    )
    run = runtime.chat(
        ChatRequest(history, tools=(FLAG,), tool_choice="required", max_tokens=200, thinking=False)
    )
    _, events = answer_of(run)
    assert next(e.id for e in events if isinstance(e, ToolCallStart)) == "functions.flag:1"


def test_calls_that_do_not_fit_are_generated_again(runtime: Runtime) -> None:
    before = runtime.invalid_calls.retried
    for seed in range(12):
        run, events = ask(runtime, CHOOSY, seed=seed, parallel_tool_calls=False)
        given_up = [event for event in events if isinstance(event, Malformed)]
        if not given_up:
            assert run.finish_reason == "tool_calls"
            assert [json.loads(arguments) for _, arguments in gather(events).calls] == [{"on": False}]
            assert run.usage.completion_tokens == len(run.ids)
    assert runtime.invalid_calls.retried > before


def test_greedy_calls_are_generated_again_with_some_heat(runtime: Runtime) -> None:
    answers = set()
    for on in (True, False):
        schema = {"on": {"type": "boolean", "not": {"const": on}}}
        request = ChatRequest(
            HELLO, tools=(tool("choosy", schema, "on"),), tool_choice="required", thinking=False,
            sampling=SamplingParams(temperature=0.0, seed=4), max_tokens=100, parallel_tool_calls=False,
        )  # fmt: skip
        _, events = answer_of(runtime.chat(request))
        answers |= {arguments for _, arguments in gather(events).calls}
    assert len(answers) == 2  # what greedy decoding writes fits one of the two only


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_call_that_never_fits_is_reported_and_never_sent(runtime: Runtime, asynchronous: bool) -> None:
    counts = runtime.invalid_calls
    before = (counts.retried, counts.given_up)
    request = ChatRequest(HELLO, tools=(NEVER,), tool_choice="required", max_tokens=200, thinking=False)
    run = runtime.chat(request)
    if asynchronous:

        async def collect() -> list[Event]:
            return [event async for delta in run for event in delta.events]

        events = asyncio.run(collect())
    else:
        _, events = answer_of(run)
    assert [event.code for event in events if isinstance(event, Malformed)] == ["invalid_tool_call"]
    assert not any(isinstance(event, ToolCallStart) for event in events)
    assert run.finish_reason == "stop"
    assert (counts.retried - before[0], counts.given_up - before[1]) == (RETRIES, 1)


def test_valid_calls_before_one_that_never_fits_stay(scripted: tuple[Runtime, ScriptedModel]) -> None:
    runtime, model = scripted
    says = (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.flag:0<|tool_call_argument_begin|>"
        '{"on":true}<|tool_call_end|><|tool_call_begin|>functions.never:1<|tool_call_argument_begin|>'
        '{"on":true}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
    )
    model.play(runtime.tokenizer.encode_with_specials(says))
    run = runtime.chat(ChatRequest(HELLO, tools=(FLAG, NEVER), max_tokens=300, thinking=False))
    answer, events = answer_of(run)
    assert answer.calls == (("flag", '{"on":true}'),)
    assert [event.code for event in events if isinstance(event, Malformed)] == ["invalid_tool_call"]
    assert run.finish_reason == "tool_calls"


@pytest.mark.parametrize("calls", [True, False])
def test_an_answer_that_ends_in_a_call_leaves_its_latents_leased(
    scripted: tuple[Runtime, ScriptedModel], *, calls: bool
) -> None:
    runtime, model = scripted
    call = '<|tool_call_begin|>functions.flag:0<|tool_call_argument_begin|>{"on":true}<|tool_call_end|>'
    said = f"<|tool_calls_section_begin|>{call}<|tool_calls_section_end|>" if calls else "Hello."
    model.play(runtime.tokenizer.encode_with_specials(f"{said}<|im_end|>"))
    run = runtime.chat(ChatRequest(HELLO, tools=(FLAG,), max_tokens=300, thinking=False))
    answer_of(run)
    assert run.finish_reason == ("tool_calls" if calls else "stop")
    leased: queue.Queue[tuple[int, int]] = queue.Queue()

    def count(memory: PageMemory) -> None:
        now = memory.now()
        later = memory.tree.leased(now + runtime.config.lease_seconds + 1)
        leased.put((memory.tree.leased(now), later))

    runtime.engine.call(count)
    held, afterwards = leased.get(timeout=10)
    assert bool(held) is calls
    assert afterwards == 0


def test_a_parked_guarded_answer_comes_again(runtime: Runtime) -> None:
    request = ChatRequest(
        HELLO, tools=(CHOOSY,), tool_choice="required", max_tokens=300, thinking_budget=5, retry_key="k",
        sampling=SamplingParams(seed=2),
    )  # fmt: skip
    first = runtime.chat(request)
    whole, _ = answer_of(first)
    first.park()
    again = runtime.chat(request)
    assert answer_of(again)[0] == whole
    assert again.finish_reason == first.finish_reason


def test_content_as_json(runtime: Runtime) -> None:
    schema = FLAG["function"]["parameters"]
    for seed in range(10):
        run, events = ask(runtime, seed=seed, tool_choice="auto", json_schema=schema)
        jsonschema.validate(json.loads(gather(events).content), schema)
        assert run.finish_reason == "stop"
        assert any(isinstance(event, Reasoning) for event in events) or run.usage.reasoning_tokens == 0


def test_json_that_never_fits_is_reported(runtime: Runtime) -> None:
    schema = NEVER["function"]["parameters"]
    _, events = ask(runtime, tool_choice="auto", json_schema=schema)
    assert [event.code for event in events if isinstance(event, Malformed)] == ["invalid_json"]
    assert not any(isinstance(event, Content) for event in events)


def test_json_that_fits_at_a_later_try_goes_out(runtime: Runtime) -> None:
    schema = CHOOSY["function"]["parameters"]
    for seed in range(8):
        _, events = ask(runtime, seed=seed, tool_choice="auto", json_schema=schema)
        if not any(isinstance(event, Malformed) for event in events):
            assert json.loads(gather(events).content) == {"on": False}


def test_no_thinking_begins_behind_an_empty_reasoning(scripted: tuple[Runtime, ScriptedModel]) -> None:
    runtime, model = scripted
    thinking = ChatRequest(HELLO, max_tokens=300)
    silent = replace(thinking, thinking=False)
    assert runtime.count(silent) == runtime.count(thinking) + 2
    model.play(runtime.tokenizer.encode_with_specials("Hi there<|im_end|>"))
    run = runtime.chat(silent)
    answer, _ = answer_of(run)
    assert (answer.content, answer.reasoning) == ("Hi there", "")
    assert run.usage.reasoning_tokens == 0
    # The next turn goes on from the very tokens.
    history = (*HELLO, Message("assistant", "Hi there"), Message("user", "And?"))
    model.play(runtime.tokenizer.encode_with_specials("Yes<|im_end|>"))
    following = runtime.chat(replace(silent, messages=history))
    answer_of(following)
    assert following.usage.cached_tokens >= run.prompt_tokens + len(run.ids) - 1


def test_an_answer_has_room_beside_the_reasoning(scripted: tuple[Runtime, ScriptedModel]) -> None:
    runtime, model = scripted
    for limit in (64, 300, 800):
        model.play(runtime.tokenizer.encode_with_specials("<think>"))
        run = runtime.chat(ChatRequest(HELLO, max_tokens=limit))
        answer, _ = answer_of(run)
        assert run.usage.completion_tokens == limit
        assert len(answer.content) >= min(limit, max(256, limit // 5)) - 2  # the reasoning's markers
    assert thinking_budget(None, 64) == 0
    assert thinking_budget(None, 10_000) == 8_000
    assert thinking_budget(50, 10_000) == 50
    assert thinking_budget(64, 64) == 56


def test_progress_of_the_prompt(runtime: Runtime) -> None:
    message = Message("user", "a long one " * 60)
    run = runtime.chat(ChatRequest((message,), max_tokens=3, thinking=False, progress=True))
    told: list[PromptProgress] = [delta.progress for delta in run if delta.progress is not None]
    assert [entry.processed for entry in told][-1] == run.prompt_tokens
    assert len(told) > 1


def test_a_schema_at_fault_is_named(runtime: Runtime) -> None:
    bad = {"type": "function", "function": {"name": "f", "parameters": {"$ref": "http://127.0.0.1:9/x"}}}
    with pytest.raises(RequestError) as refused:
        runtime.chat(ChatRequest(HELLO, tools=(bad,)))
    assert refused.value.param == "tools[0].function.parameters"
    # Where no tool may be called, nothing is compiled.
    run = runtime.chat(ChatRequest(HELLO, tools=(bad,), tool_choice="none", max_tokens=1, thinking=False))
    answer_of(run)


def test_cancelled_while_validated_it_ends(runtime: Runtime) -> None:
    request = ChatRequest(
        HELLO, tools=(CHOOSY,), tool_choice="required", max_tokens=600, thinking=False,
        sampling=SamplingParams(seed=5),
    )  # fmt: skip
    run = runtime.chat(request)
    check = runtime._rulebook._validator.check

    def cancels(*args: Any) -> str | None:
        run.cancel()
        return check(*args)

    runtime._rulebook._validator.check = cancels  # type: ignore[method-assign]
    try:
        answer_of(run)
    finally:
        runtime._rulebook._validator.check = check  # type: ignore[method-assign]
    assert run.finish_reason == "cancelled"


def test_a_request_counts_once_however_often_it_was_generated_again(runtime: Runtime) -> None:
    before = dict(runtime.engine.metrics.finished)
    ask(runtime, tool_choice="auto", json_schema=NEVER["function"]["parameters"])
    ask(runtime, NEVER)
    assert sum(runtime.engine.metrics.finished.values()) - sum(before.values()) <= 2


def test_a_stop_string_in_held_json_ends_it_as_it_is(scripted: tuple[Runtime, ScriptedModel]) -> None:
    runtime, model = scripted
    schema = {"type": "object", "properties": {"s": {"type": "string", "not": {"const": "no"}}}}
    model.play(runtime.tokenizer.encode_with_specials('{"s":"one STOP two"}<|im_end|>'))
    run = runtime.chat(ChatRequest(HELLO, json_schema=schema, stop=("STOP",), max_tokens=300, thinking=False))
    answer, events = answer_of(run)
    assert answer.content == '{"s":"one '
    assert run.stop_sequence == "STOP"
    assert not any(isinstance(event, Malformed) for event in events)


def test_json_cannot_continue_a_partial_message(runtime: Runtime) -> None:
    messages = (*HELLO, Message("assistant", "{", partial=True))
    with pytest.raises(RequestError, match="partial"):
        runtime.chat(ChatRequest(messages, json_schema={"type": "object"}))
