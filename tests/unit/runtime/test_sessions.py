"""Turns of a conversation: what is cached when the next one comes, however the client echoes the last.

And what becomes of it in the journal at the end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from k2hybrid.cache.journal import Journal
from k2hybrid.cache.journal_writer import JournalWriter
from k2hybrid.cache.page_keys import page_keys
from k2hybrid.cache.session_log import Exchange as LoggedExchange
from k2hybrid.chat.exchanges import Exchanges
from k2hybrid.runtime import Runtime, sessions
from k2hybrid.runtime.sessions import Sessions
from k2hybrid.types import ChatRequest, Content, Message, Reasoning, SamplingParams, ToolCall
from tests.unit.runtime.scripted import ScriptedModel, scripted_runtime

SB, SE = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL = "<|tool_call_begin|>functions.weather:{n}<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
QUESTION = Message("user", "How is the weather in all of these places? " * 6)
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture
def scripted(checkpoint: Path) -> Iterator[tuple[Runtime, ScriptedModel]]:
    runtime, model = scripted_runtime(checkpoint, idle_prefill=True)
    with runtime:
        yield runtime, model


def request(*messages: Message, **options: object) -> ChatRequest:
    return replace(ChatRequest(messages, tools=(TOOL,), sampling=GREEDY, max_tokens=320), **options)


def say(runtime: Runtime, model: ScriptedModel, text: str, asked: ChatRequest) -> tuple[Message, int, int]:
    """Have the model say `text`; the message as a client sees it, prompt tokens, cached tokens."""
    model.play(runtime.tokenizer.encode_with_specials(text))
    run = runtime.chat(asked)
    events = [event for delta in run for event in delta.events]
    calls = SB in text
    message = Message(
        "assistant",
        "".join(e.text for e in events if isinstance(e, Content)),
        reasoning="".join(e.text for e in events if isinstance(e, Reasoning)),
        tool_calls=(ToolCall("call_abc", "weather", "{ }"),) if calls else (),
    )
    return message, run.usage.prompt_tokens, run.usage.cached_tokens


def settled(condition: Callable[[], bool]) -> bool:
    """Whether `condition` comes true while the machine is idle."""
    for _ in range(200):
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("keeps", ["all", "no reasoning"])
def test_a_tool_result_costs_its_own_tokens(scripted: tuple[Runtime, ScriptedModel], keeps: str) -> None:
    runtime, model = scripted
    said, first, cached = say(
        runtime, model, f"<think>I look it up.</think>{SB}{CALL.format(n=0)}{SE}<|im_end|>", request(QUESTION)
    )
    assert cached == 0
    if keeps == "no reasoning":
        said = replace(said, reasoning=None)
    result = Message("tool", "rain", tool_call_id="call_abc")
    _, second, cached = say(runtime, model, "<think></think>Rain.<|im_end|>", request(QUESTION, said, result))
    generated = len(
        runtime.tokenizer.encode_with_specials(f"<think>I look it up.</think>{SB}{CALL.format(n=0)}{SE}")
    )
    # All but the section's end and the answer's, which follow from the call's end and were never run.
    assert cached == first + generated - 1
    assert second > cached


def test_after_an_answer_the_idle_machine_computes_what_the_next_turn_begins_with(
    scripted: tuple[Runtime, ScriptedModel],
) -> None:
    runtime, model = scripted
    said, first, _ = say(
        runtime,
        model,
        "<think>A long thought that will be dropped.</think>Rain.<|im_end|>",
        request(QUESTION),
    )
    following = request(QUESTION, said, Message("user", "Sure?"))
    ids = runtime.template.render(following.messages, following.tools).ids
    wanted = len(runtime.template.render((QUESTION, said), following.tools, add_generation_prompt=False).ids)
    assert settled(lambda: runtime.engine.cached_prefix(ids) >= wanted)
    _, _, cached = say(runtime, model, "<think></think>Yes.<|im_end|>", following)
    assert cached >= wanted > first


def test_a_parked_answer_is_given_again_and_goes_on(scripted: tuple[Runtime, ScriptedModel]) -> None:
    runtime, model = scripted
    text = "<think>One two three.</think>Four five six seven eight.<|im_end|>"
    asked = request(QUESTION, retry_key="k")
    model.play(runtime.tokenizer.encode_with_specials(text))
    run = runtime.chat(asked)
    deltas = iter(run)
    for _ in range(6):
        next(deltas)
    run.park()
    deltas.close()
    again = runtime.chat(asked)
    events = [event for delta in again for event in delta.events]
    assert "".join(e.text for e in events if isinstance(e, Reasoning)) == "One two three."
    assert "".join(e.text for e in events if isinstance(e, Content)) == "Four five six seven eight."
    assert again.finish_reason == "stop"
    assert again.ids == runtime.tokenizer.encode_with_specials(text)
    assert runtime.engine.metrics.completion_tokens < 2 * len(
        again.ids
    )  # the rest, not the whole, was generated


def test_another_scope_and_no_reuse_see_nothing(scripted: tuple[Runtime, ScriptedModel]) -> None:
    runtime, model = scripted
    text = "<think></think>Rain.<|im_end|>"
    say(runtime, model, text, request(QUESTION))
    assert say(runtime, model, text, request(QUESTION))[2] > 0
    assert say(runtime, model, text, request(QUESTION, scope="b"))[2] == 0
    assert say(runtime, model, text, request(QUESTION, reuse=False))[2] == 0


# --- the journal ------------------------------------------------------------------------------------------

PAGE_BYTES = 64
FULL = OSError(28, "No space left on device")


class Slow:
    """Sessions over a journal whose pages take a while each."""

    def __init__(self, scripted_exchanges: Exchanges, folder: Path, page_seconds: float) -> None:
        self.journal = Journal(folder, "0123456789abcdef", PAGE_BYTES)
        self.writer = JournalWriter(self.journal)
        self.sessions = Sessions(scripted_exchanges, 4, self.journal, self.writer)
        self.page_seconds = page_seconds

    def offer(self, pages: int) -> None:
        for n in range(pages):
            (page,) = page_keys("s", [n], 4)
            assert self.writer.offer(page.key, page.parent, [n], self.payload, lambda: None)

    def payload(self) -> bytes:
        time.sleep(self.page_seconds)
        return bytes(PAGE_BYTES)


def exchanges_of(scripted: tuple[Runtime, ScriptedModel]) -> Exchanges:
    return scripted[0]._sessions.exchanges


@pytest.mark.parametrize("rate", [PAGE_BYTES / 5.0, 1e12])
def test_what_waits_has_as_long_as_a_slow_disk_takes(
    scripted: tuple[Runtime, ScriptedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    rate: float,
) -> None:
    """At the rate that is supposed of it; what was not written then is named."""
    monkeypatch.setattr(sessions, "_FLUSH_SECONDS", 0.05)
    monkeypatch.setattr(sessions, "_SLOW_DISK", rate)
    slow = Slow(exchanges_of(scripted), tmp_path / "j", page_seconds=0.1)
    slow.offer(6)
    slow.sessions.close()
    written = len(list((tmp_path / "j").rglob("*.page")))
    if rate < 1e12:
        assert written == 6
        assert caplog.records == []
    else:
        assert written < 6
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert "latent pages" in record.getMessage()
        assert "were not written" in record.getMessage()


def test_answers_that_could_not_be_written_are_named_by_their_session(
    scripted: tuple[Runtime, ScriptedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sessions, "_FLUSH_SECONDS", 0.05)
    slow = Slow(exchanges_of(scripted), tmp_path / "j", page_seconds=0.0)
    go_on = threading.Event()
    monkeypatch.setattr(slow, "payload", lambda: bytes(PAGE_BYTES * go_on.wait(20)))
    slow.offer(1)
    slow.writer.append(LoggedExchange("a-session", "r", "s", "c", "m", (1,), "", 1, "", 1))
    close = slow.writer.close
    monkeypatch.setattr(slow.writer, "close", lambda: close(timeout_s=0.05))
    slow.sessions.close()
    assert "a-session" in caplog.records[-1].getMessage()
    go_on.set()
    assert close()


def test_the_journals_state_is_told(scripted: tuple[Runtime, ScriptedModel], tmp_path: Path) -> None:
    exchanges = exchanges_of(scripted)
    assert Sessions(exchanges, 4).status() == {"enabled": False}
    slow = Slow(exchanges, tmp_path / "j", page_seconds=0.0)
    told = {"enabled": True, "writing": True, "last_error": "", "bytes": 0}
    assert slow.sessions.status() == told
    slow.journal._health.fail(FULL)
    assert slow.sessions.status() == {**told, "writing": False, "last_error": FULL.strerror}
    slow.journal._health.worked()
    assert slow.sessions.status() == {**told, "last_error": FULL.strerror}
    slow.sessions.close()
