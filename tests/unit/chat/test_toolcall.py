"""Tool-call ids in histories, as real clients send them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import pytest

from k2hybrid.chat.toolcall import CallHistory
from k2hybrid.types import Message, ToolCall


def calls(*pairs: tuple[str, str]) -> Message:
    return Message("assistant", tool_calls=tuple(ToolCall(call_id, name, "{}") for call_id, name in pairs))


def result(call_id: str | None, name: str | None = None) -> Message:
    return Message("tool", "r", name=name, tool_call_id=call_id)


USER = Message("user", "hi")


def canonicalise(messages: Sequence[Message]) -> tuple[list[Message], int]:
    """Renamed messages, and the number of ids given."""
    history = CallHistory()
    return history.renamed(messages), history.count


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
        # ids rewritten in the results alone, in another order
        (
            [
                calls(("functions.f:0", "f"), ("functions.my-tool:1", "my-tool")),
                result("functions_my_tool_1"),
                result("functions_f_0"),
            ],
            [("functions.my-tool:1", "my-tool"), ("functions.f:0", "f")],
            2,
        ),
        # an exact id goes before one that is alike
        (
            [calls(("a_1", "f"), ("a.1", "g")), result("a.1"), result("a_1")],
            [("functions.g:1", "g"), ("functions.f:0", "f")],
            2,
        ),
        # other dialects' ids
        (
            [
                calls(("toolu_01AbC", "Bash"), ("call_9f", "Read"), ("fc_1|call_2", "Edit")),
                result("call_9f"),
                result("fc_1|call_2"),
                result("toolu_01AbC"),
            ],
            [("functions.Read:1", "Read"), ("functions.Edit:2", "Edit"), ("functions.Bash:0", "Bash")],
            3,
        ),
        # no ids at all
        (
            [calls(("", "f"), ("", "g"), ("", "f")), result(""), result(""), result("")],
            [("functions.f:0", "f"), ("functions.g:1", "g"), ("functions.f:2", "f")],
            3,
        ),
        # parallel calls of one tool
        (
            [calls(("x", "f"), ("y", "f"), ("z", "f")), result("z"), result("x"), result(None, "f")],
            [("functions.f:2", "f"), ("functions.f:0", "f"), ("functions.f:1", "f")],
            3,
        ),
        # names as clients have them
        (
            [
                calls(("1", "a.b.c"), ("2", "mcp__server__do"), ("3", "web-search")),
                result("3"),
                result("2"),
                result("1"),
            ],
            [
                ("functions.web-search:2", "web-search"),
                ("functions.mcp__server__do:1", "mcp__server__do"),
                ("functions.a.b.c:0", "a.b.c"),
            ],
            3,
        ),
        # a second result of one call is its call's too
        (
            [calls(("a", "f")), result("a"), result("a")],
            [("functions.f:0", "f"), ("functions.f:0", "f")],
            1,
        ),
        # of the latest call, where ids come again
        (
            [calls(("a", "f")), result("a"), calls(("a", "g")), result("a"), result("a")],
            [("functions.f:0", "f"), ("functions.g:1", "g"), ("functions.g:1", "g")],
            2,
        ),
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


@pytest.mark.parametrize(
    ("orphan", "canonical"),
    [
        (result("a"), "functions.unknown:0"),
        (result(None), "functions.unknown:0"),
        (result(""), "functions.unknown:0"),
        (result("toolu_01AbC"), "functions.unknown:0"),
        (result("call_3"), "functions.unknown:0"),
        (result("a", "f"), "functions.f:0"),
        (result("functions.my-tool:7"), "functions.my-tool:0"),
        (result("functions_Bash_12"), "functions.Bash:0"),
        (result("functions.mcp__a__b:1"), "functions.mcp__a__b:0"),
        (result("functions.\nno name:1"), "functions.unknown:0"),
        (result("x", "no name:\n"), "functions.unknown:0"),
        (result("functions." + "x" * 65 + ":1"), "functions.unknown:0"),
    ],
)
def test_a_result_of_no_call_has_an_id_of_its_own(orphan: Message, canonical: str) -> None:
    """Neither a foreign id nor another call's reaches the model: it counts like a call that is not shown."""
    renamed, count = canonicalise([orphan, USER, calls(("a", "f")), result("a")])
    assert renamed[0].tool_call_id == canonical
    assert renamed[0].name == orphan.name
    assert renamed[2].tool_calls[0].id == renamed[3].tool_call_id == "functions.f:1"
    assert count == 2


def test_an_orphan_between_results_takes_none_of_their_ids() -> None:
    messages = [calls(("a", "f")), result("a"), result("zz"), result(None), calls(("b", "f")), result("b")]
    renamed, count = canonicalise(messages)
    ids = [message.tool_call_id for message in renamed if message.role == "tool"]
    assert ids == ["functions.f:0", "functions.unknown:1", "functions.unknown:2", "functions.f:3"]
    assert count == 4


def test_what_is_canonical_stays_as_it_is() -> None:
    """So the ids of a turn are the same in every later one."""
    messages = [
        calls(("x", "f"), ("y", "g")),
        result("y"),
        result("x"),
        USER,
        calls(("x", "f")),
        result(None),
    ]
    once, count = canonicalise(messages)
    assert canonicalise(once) == (once, count)
    for end in range(len(messages)):
        assert canonicalise(messages[:end])[0] == once[:end]


def test_a_long_history_is_read_in_one_go() -> None:
    many = 20_000  # a look-up through all calls for each would take minutes
    called = calls(*((f"a{i}", "f") for i in range(many)))
    answered = [result(f"b{i}", "g") for i in reversed(range(many))]
    renamed, count = canonicalise([called, *answered, *answered])
    assert count == 2 * many
    assert renamed[1].tool_call_id == "functions.f:0"
    assert renamed[-1].tool_call_id == f"functions.g:{2 * many - 1}"


def test_a_changed_message_keeps_all_else() -> None:
    call = ToolCall("functions.f:0", "f", "{}")
    message = Message("tool", "c", "n", "r", (call,), "id", partial=True, response_id="resp")
    assert len(fields(Message)) == 8
    assert message.with_reasoning("other") == replace(message, reasoning="other")
    assert message.with_calls(()) == replace(message, tool_calls=())
    assert message.answering("x", None) == replace(message, tool_call_id="x", name=None)
    assert message.with_calls((call,)) == message
