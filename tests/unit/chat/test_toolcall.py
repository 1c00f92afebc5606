"""Tool-call ids in histories, as real clients send them."""

from __future__ import annotations

import pytest

from k2hybrid.chat.toolcall import canonicalise
from k2hybrid.types import Message, ToolCall


def calls(*pairs: tuple[str, str]) -> Message:
    return Message("assistant", tool_calls=tuple(ToolCall(call_id, name, "{}") for call_id, name in pairs))


def result(call_id: str | None, name: str | None = None) -> Message:
    return Message("tool", "r", name=name, tool_call_id=call_id)


USER = Message("user", "hi")


@pytest.mark.parametrize(
    ("messages", "ids", "count"),
    [
        # canonical ids stay
        ([calls(("functions.f:0", "f")), result("functions.f:0")], [("functions.f:0", "f")], 1),
        # counted over the whole conversation, whatever the client counted
        (
            [calls(("a", "f")), result("a"), USER, calls(("b", "g")), result("b")],
            [("functions.f:0", "f"), ("functions.g:1", "g")],
            2,
        ),
        # rewritten ids; results in another order
        (
            [
                calls(("functions_f_0", "f"), ("functions_g_1", "g")),
                result("functions_g_1"),
                result("functions_f_0"),
            ],
            [("functions.g:1", "g"), ("functions.f:0", "f")],
            2,
        ),
        # the same id in every turn
        (
            [calls(("call_0", "f")), result("call_0"), calls(("call_0", "g")), result("call_0")],
            [("functions.f:0", "f"), ("functions.g:1", "g")],
            2,
        ),
        # the same id twice in one turn
        (
            [calls(("x", "f"), ("x", "f")), result("x"), result("x")],
            [("functions.f:0", "f"), ("functions.f:1", "f")],
            2,
        ),
        # no id, or one of nobody's: by order, and by name where there is one
        (
            [calls(("a", "f"), ("b", "g")), result(None), result("z")],
            [("functions.f:0", "f"), ("functions.g:1", "g")],
            2,
        ),
        (
            [calls(("a", "f"), ("b", "g")), result("z", "g"), result(None)],
            [("functions.g:1", "g"), ("functions.f:0", "f")],
            2,
        ),
        # an exact id later in the run goes first
        (
            [calls(("a", "f"), ("b", "g")), result(None), result("a")],
            [("functions.g:1", "g"), ("functions.f:0", "f")],
            2,
        ),
        # an answer that comes a turn late
        (
            [calls(("a", "f")), calls(("b", "g")), result("a"), result("b")],
            [("functions.f:0", "f"), ("functions.g:1", "g")],
            2,
        ),
        # a given name stays
        ([calls(("a", "f")), result("a", "other")], [("functions.f:0", "other")], 1),
        # results of nothing are left alone
        ([result("a"), USER, result(None)], [("a", None), (None, None)], 0),
        ([calls(("a", "f")), result("a"), result("a")], [("functions.f:0", "f"), ("a", None)], 1),
    ],
)
def test_results_find_their_calls(messages: list[Message], ids: list[tuple], count: int) -> None:
    renamed, counted = canonicalise(messages)
    assert [(message.tool_call_id, message.name) for message in renamed if message.role == "tool"] == ids
    assert counted == count
    found = [call.id for message in renamed for call in message.tool_calls]
    assert [int(call_id.rpartition(":")[2]) for call_id in found] == list(range(count))
    assert len(renamed) == len(messages)


def test_the_given_messages_are_untouched() -> None:
    messages = [calls(("a", "f")), result("a")]
    canonicalise(messages)
    assert messages == [calls(("a", "f")), result("a")]
