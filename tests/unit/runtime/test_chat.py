"""Chat runs: events, ends, masks, clamping, plain and asynchronous iteration, cancelling at every stage."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from k2hybrid.errors import ContextLengthError, EngineError, RequestError
from k2hybrid.runtime import ChatRun, Runtime
from k2hybrid.runtime.mailbox import Mailbox
from k2hybrid.types import (
    ChatRequest,
    Content,
    DoneEvent,
    EngineEvent,
    Event,
    Message,
    Reasoning,
    SamplingParams,
    TokenEvent,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    Usage,
)
from tests.unit.runtime.scripted import ScriptedModel, scripted_runtime

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
HELLO = (Message("user", "Hello"),)
CALL = (
    "<think>hm</think><|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
    '<|tool_call_argument_begin|>{"city":"Beijing"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
)


@pytest.fixture
def scripted(checkpoint: Path) -> Iterator[tuple[Runtime, ScriptedModel]]:
    runtime, model = scripted_runtime(checkpoint)
    with runtime:
        yield runtime, model


def ask(scripted: tuple[Runtime, ScriptedModel], says: str, **fields: Any) -> tuple[ChatRun, list[Event]]:
    """Run a request against a model that says `says`; the run and its events."""
    runtime, model = scripted
    model.play(runtime.tokenizer.encode_with_specials(says))
    run = runtime.chat(ChatRequest(HELLO, **fields))
    return run, [event for delta in run for event in delta.events]


def text_of(events: list[Event], kind: type[Reasoning] | type[Content]) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


def wait_idle(runtime: Runtime) -> None:
    deadline = time.monotonic() + 20
    while runtime.engine.metrics.running or runtime.engine.metrics.waiting:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_an_answer(scripted: tuple[Runtime, ScriptedModel]) -> None:
    run, events = ask(scripted, "<think>so so</think>Hi there<|im_end|>")
    assert text_of(events, Reasoning) == "so so"
    assert text_of(events, Content) == "Hi there"
    assert run.finish_reason == "stop"
    tokenizer = scripted[0].tokenizer
    assert run.usage.reasoning_tokens == len(tokenizer.encode("so so")) + 2
    assert (
        run.usage.completion_tokens == len(tokenizer.encode("so so")) + len(tokenizer.encode("Hi there")) + 3
    )
    assert run.usage.prompt_tokens == run.prompt_tokens == len(scripted[0].template.render(HELLO).ids)
    assert list(run) == []


def test_a_tool_call(scripted: tuple[Runtime, ScriptedModel]) -> None:
    run, events = ask(scripted, CALL, tools=(WEATHER,))
    assert run.finish_reason == "tool_calls"
    assert ToolCallStart(0, "functions.get_weather:0", "get_weather") in events
    assert ToolCallEnd(0) in events
    arguments = "".join(event.text for event in events if isinstance(event, ToolCallArguments))
    assert arguments == '{"city":"Beijing"}'


@pytest.mark.parametrize("fields", [{}, {"tools": (WEATHER,), "tool_choice": "none"}])
def test_calls_are_impossible_where_none_may_be_made(
    scripted: tuple[Runtime, ScriptedModel], fields: dict[str, Any]
) -> None:
    run, events = ask(scripted, CALL, **fields)
    assert run.finish_reason == "stop"
    assert not any(isinstance(event, ToolCallStart | ToolCallArguments) for event in events)
    assert text_of(events, Content).startswith("xx")  # what the model says instead of the two openings
    # The tools are rendered all the same: the conversation's prefix does not depend on tool_choice.
    tools = fields.get("tools", ())
    assert run.prompt_tokens == len(scripted[0].template.render(HELLO, tools).ids)


def test_a_stop_string_ends_the_answer_before_it(scripted: tuple[Runtime, ScriptedModel]) -> None:
    run, events = ask(scripted, "<think>STOP</think>one STOP two<|im_end|>", stop=("STOP",))
    assert text_of(events, Content) == "one "
    assert run.finish_reason == "stop"
    said = len(scripted[0].tokenizer.encode_with_specials("<think>STOP</think>one STOP two"))
    assert run.usage.completion_tokens < said


def test_max_tokens_end_it_with_length(scripted: tuple[Runtime, ScriptedModel]) -> None:
    run, events = ask(scripted, "<think>", max_tokens=7, thinking_budget=3)
    assert run.finish_reason == "length"
    assert run.usage.completion_tokens == 7
    assert run.usage.reasoning_tokens == 5  # three of text and their markers
    assert text_of(events, Content) == "xx"


@pytest.mark.parametrize("asked", [262_144, None])
def test_more_output_than_the_context_leaves_is_clamped(
    scripted: tuple[Runtime, ScriptedModel], asked: int | None
) -> None:
    run, _ = ask(scripted, "", max_tokens=asked)
    assert run.finish_reason == "length"
    assert run.prompt_tokens + run.usage.completion_tokens == 1024


def test_a_prompt_beyond_the_context_is_refused_with_numbers(scripted: tuple[Runtime, ScriptedModel]) -> None:
    messages = (Message("user", "word " * 2000),)
    tokens = len(scripted[0].template.render(messages).ids)
    with pytest.raises(ContextLengthError, match=rf"{tokens} tokens > 1023 maximum") as refused:
        scripted[0].chat(ChatRequest(messages))
    assert refused.value.code == "context_length_exceeded"


def test_bad_sampling_is_refused_before_anything_runs(scripted: tuple[Runtime, ScriptedModel]) -> None:
    with pytest.raises(RequestError, match="top_p"):
        scripted[0].chat(ChatRequest(HELLO, sampling=SamplingParams(top_p=7)))
    assert scripted[0].engine.metrics.steps == 0


def test_a_failing_step_raises_in_the_consumer_and_the_next_request_runs(
    scripted: tuple[Runtime, ScriptedModel],
) -> None:
    runtime, model = scripted
    steps = 0

    def fail_third() -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise ValueError("disk on fire")

    model.before_step = fail_third
    with pytest.raises(EngineError, match="disk on fire"):
        ask(scripted, "abc")
    assert ask(scripted, "Hi<|im_end|>")[0].finish_reason == "stop"
    assert runtime.engine.metrics.failed_steps == 1


def test_a_partial_answer_is_continued(scripted: tuple[Runtime, ScriptedModel]) -> None:
    runtime, model = scripted
    model.play(runtime.tokenizer.encode_with_specials("more</think>done<|im_end|>"))
    partial = Message("assistant", None, reasoning="some ", partial=True)
    events = [event for delta in runtime.chat(ChatRequest((*HELLO, partial))) for event in delta.events]
    assert text_of(events, Reasoning) == "more"
    assert text_of(events, Content) == "done"


def test_logprobs_come_with_their_token(scripted: tuple[Runtime, ScriptedModel]) -> None:
    runtime, model = scripted
    script = runtime.tokenizer.encode_with_specials("Hi<|im_end|>")
    model.play(script)
    deltas = list(runtime.chat(ChatRequest(HELLO, sampling=SamplingParams(logprobs=1))))
    assert [delta.logprob.token for delta in deltas if delta.logprob] == script


def test_breaking_off_cancels(scripted: tuple[Runtime, ScriptedModel]) -> None:
    runtime, model = scripted
    model.play(())
    run = runtime.chat(ChatRequest(HELLO))
    deltas = iter(run)
    next(deltas)
    deltas.close()
    wait_idle(runtime)
    deadline = time.monotonic() + 20
    while not runtime.engine.metrics.finished["cancelled"] and time.monotonic() < deadline:
        time.sleep(0.002)
    assert runtime.engine.metrics.finished["cancelled"] == 1
    run.cancel()


class TestAsync:
    """The same under an event loop."""

    def test_events_are_the_same_and_the_loop_stays_free(
        self, scripted: tuple[Runtime, ScriptedModel]
    ) -> None:
        runtime, model = scripted
        says = "<think>a</think>" + "Hello world " * 3 + "<|im_end|>"
        _, expected = ask(scripted, says)
        go_on = threading.Event()

        def wait_for_release() -> None:
            assert go_on.wait(20)

        async def consume() -> tuple[ChatRun, list[Event]]:
            model.play(runtime.tokenizer.encode_with_specials(says))
            model.before_step = wait_for_release
            run = await runtime.start_chat(ChatRequest(HELLO))
            # The engine is stuck until this task runs: an iteration that blocked the loop would never end.
            releasing = asyncio.get_running_loop().call_later(0.05, go_on.set)
            events = [event async for delta in run for event in delta.events]
            assert releasing.when() > 0
            return run, events

        run, events = asyncio.run(consume())
        assert text_of(events, Content) == text_of(expected, Content)
        assert run.finish_reason == "stop"

    def test_many_waiting_events_let_other_tasks_run(self, scripted: tuple[Runtime, ScriptedModel]) -> None:
        runtime, _ = scripted

        async def consume() -> tuple[int, int]:
            run = await runtime.start_chat(ChatRequest(HELLO))
            await asyncio.to_thread(wait_idle, runtime)
            turns = 0

            async def count() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            counting = asyncio.ensure_future(count())
            deltas = 0
            async for _ in run:
                deltas += 1
            counting.cancel()
            return deltas, turns

        deltas, turns = asyncio.run(consume())
        assert deltas > 500
        assert turns >= deltas

    def test_a_cancelled_consumer_cancels_the_answer(self, scripted: tuple[Runtime, ScriptedModel]) -> None:
        runtime, model = scripted
        model.before_step = lambda: time.sleep(0.002)

        async def consume() -> None:
            run = await runtime.start_chat(ChatRequest(HELLO))

            async def read() -> None:
                async for _ in run:
                    pass

            reading = asyncio.ensure_future(read())
            await asyncio.sleep(0.05)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            await asyncio.to_thread(wait_idle, runtime)

        asyncio.run(consume())
        assert runtime.engine.metrics.finished["cancelled"] == 1

    def test_a_start_that_is_cancelled_leaves_nothing_running(
        self, scripted: tuple[Runtime, ScriptedModel], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runtime, model = scripted
        model.before_step = lambda: time.sleep(0.002)
        rendering, go_on = threading.Event(), threading.Event()
        render = runtime.template.render

        def slow(*args: Any, **kwargs: Any) -> Any:
            rendering.set()
            assert go_on.wait(20)
            return render(*args, **kwargs)

        monkeypatch.setattr(runtime.template, "render", slow)

        async def start() -> None:
            starting = asyncio.ensure_future(runtime.start_chat(ChatRequest(HELLO)))
            assert await asyncio.to_thread(rendering.wait, 20)
            starting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await starting
            go_on.set()
            deadline = time.monotonic() + 20
            while not runtime.engine.metrics.finished["cancelled"] and time.monotonic() < deadline:
                await asyncio.sleep(0.005)

        asyncio.run(start())
        assert runtime.engine.metrics.finished == {"cancelled": 1}

    def test_errors_reach_the_coroutine(self, scripted: tuple[Runtime, ScriptedModel]) -> None:
        runtime, model = scripted

        def fail() -> None:
            raise ValueError("planned")

        async def consume() -> None:
            model.before_step = fail
            async for _ in await runtime.start_chat(ChatRequest(HELLO)):
                raise AssertionError("no token can come")

        with pytest.raises(EngineError, match="planned"):
            asyncio.run(consume())


class TestMailbox:
    """Order, and consumers that are gone."""

    def test_order_is_kept_between_threads(self) -> None:
        mailbox = Mailbox()

        def feed() -> None:
            for n in range(500):
                mailbox.put(TokenEvent(n))

        feeder = threading.Thread(target=feed)
        feeder.start()
        assert [mailbox.get() for _ in range(500)] == [TokenEvent(n) for n in range(500)]
        feeder.join()

    def test_order_is_kept_into_an_event_loop_and_nothing_is_waited_for_in_vain(self) -> None:
        mailbox = Mailbox()

        def feed() -> None:
            for n in range(2000):
                mailbox.put(TokenEvent(n))
                if n % 7 == 0:
                    time.sleep(0)  # sometimes the consumer is ahead, sometimes behind

        async def consume() -> list[EngineEvent]:
            return [await asyncio.wait_for(mailbox.get_async(), 10) for _ in range(2000)]

        feeder = threading.Thread(target=feed)
        feeder.start()
        assert asyncio.run(consume()) == [TokenEvent(n) for n in range(2000)]
        feeder.join()

    def test_a_closed_loop_is_an_error_for_the_sender(self) -> None:
        mailbox = Mailbox()
        loop = asyncio.new_event_loop()
        waiting = loop.create_task(mailbox.get_async())
        loop.run_until_complete(asyncio.sleep(0.01))
        waiting.cancel()
        loop.close()
        with pytest.raises(RuntimeError, match="closed"):
            mailbox.put(TokenEvent(1))
        mailbox.put(DoneEvent("cancelled", Usage()))  # nobody waits any more: it is only kept
        assert mailbox.get() == TokenEvent(1)
