"""The real vocabulary, and short ways to read streams and messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from k2hybrid.chat.markers import Markers
from k2hybrid.chat.stream import ChatStream
from k2hybrid.chat.tokenizer import Tokenizer
from k2hybrid.types import Event, Message, ToolCall

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(GOLDEN)


@pytest.fixture(scope="session")
def markers(tokenizer: Tokenizer) -> Markers:
    return Markers.from_specials(tokenizer.specials)


@pytest.fixture(scope="session")
def events_of(tokenizer: Tokenizer, markers: Markers) -> Callable[..., list[Event]]:
    """Events of a whole answer, given as text in which spellings mean the control tokens."""

    def run(text: str, **options: Any) -> list[Event]:
        stream = ChatStream(markers, tokenizer, **options)
        events = [event for token in tokenizer.encode_with_specials(text) for event in stream.push(token)]
        return events + stream.finish()

    return run


@pytest.fixture(scope="session")
def message_of() -> Callable[[Mapping[str, Any]], Message]:
    """A message from the OpenAI form."""

    def convert(given: Mapping[str, Any]) -> Message:
        content = given.get("content")
        return Message(
            role=given["role"],
            content=tuple(content) if isinstance(content, list) else content,
            name=given.get("name"),
            reasoning=given.get("reasoning_content"),
            tool_calls=tuple(
                ToolCall(call["id"], call["function"]["name"], call["function"]["arguments"])
                for call in given.get("tool_calls", ())
            ),
            tool_call_id=given.get("tool_call_id"),
            partial=given.get("partial", False),
        )

    return convert
