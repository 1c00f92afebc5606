"""What templates are given: of a history that grew only what is new is converted, and nobody can tell."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2hybrid.chat import conversation
from k2hybrid.chat.conversation import Preparation
from k2hybrid.errors import RequestError
from k2hybrid.types import Message, ToolCall

_IDS = ("a", "b", "functions.f:0", "functions_f_1", "")
_TEXTS = st.sampled_from(
    ["", "x", "\udc80", ({"type": "text", "text": "p", "n": 1},), ({"type": "text", "text": "p", "n": True},)]
)
_CALLS = st.lists(
    st.builds(ToolCall, st.sampled_from(_IDS), st.sampled_from(["f", "g"]), st.just("{}")), max_size=2
).map(tuple)
_MESSAGES = st.one_of(
    st.builds(Message, st.just("user"), _TEXTS),
    st.builds(Message, st.just("assistant"), _TEXTS, tool_calls=_CALLS),
    st.builds(
        Message, st.just("tool"), _TEXTS, st.sampled_from([None, "g"]), tool_call_id=st.sampled_from(_IDS)
    ),
)


def said(preparation: Preparation, messages: Sequence[Message]) -> str:
    """The conversation as a template gets it; as JSON, in which 1 and true differ."""
    made = preparation.prepare(messages, ({"type": "function"},))
    return json.dumps([made.messages, made.tools, made.partial, made.calls])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 12), st.lists(_MESSAGES, max_size=4)), min_size=1, max_size=8))
def test_a_history_that_grew_is_as_one_that_is_new(turns: list[tuple[int, list[Message]]]) -> None:
    """Turns that go on from all of the last one, from a part of it, or only repeat it."""
    preparation = Preparation()
    history: list[Message] = []
    for kept, more in turns:
        history = [*history[: len(history) - max(0, kept - 8)], *more]
        assert said(preparation, history) == said(Preparation(), history)


def test_two_histories_may_go_on_from_one() -> None:
    preparation = Preparation()
    begun = [Message("user", "x"), Message("assistant", tool_calls=(ToolCall("a", "f", "{}"),))]
    said(preparation, begun)
    for content in ("one", "two"):
        grown = [*begun, Message("tool", content, tool_call_id="a")]
        assert said(preparation, grown) == said(Preparation(), grown)


def test_a_partial_message_is_continued_and_answered() -> None:
    preparation = Preparation()
    begun = [Message("user", "x"), Message("assistant", "y", partial=True)]
    for history in (begun, begun, [*begun[:1], Message("assistant", "yz")], [*begun, Message("user", "z")]):
        assert said(preparation, history) == said(Preparation(), history)


def test_what_was_counted_counts_for_a_longer_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "MAX_CHARS", 160)
    preparation = Preparation()
    long = [Message("user", "x" * 36)] * 4  # and the role
    said_before = said(preparation, long[:3])
    preparation.prepare(long, ())
    preparation.prepare(long, ())
    with pytest.raises(RequestError, match="characters"):
        preparation.prepare([*long, Message("user", "")], ())
    with pytest.raises(RequestError, match="characters"):
        preparation.prepare(long, ({"type": "function"},))
    assert said(preparation, long[:3]) == said_before
