"""What a Responses request becomes, item by item and tool by tool; and that nothing in one makes a 500."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import sys
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2hybrid.errors import RequestError
from k2hybrid.server import responses_references
from k2hybrid.server.app import create_app
from k2hybrid.server.body import parse_object
from k2hybrid.server.responses_items import call_id, item_id
from k2hybrid.server.responses_request import ResponsesCall, parse_responses
from k2hybrid.server.responses_store import Responses
from k2hybrid.server.responses_tools import custom_input, parse_choice
from k2hybrid.server.sealed import MAX_REASONING_BYTES, MAX_UNSEALED_BYTES, Unsealing, seal
from k2hybrid.types import Content, Message, ToolCall
from tests.server.scripted import Script, ScriptedModel, Step

NEW, OLD, OLDER = (f"resp_{digit * 32}" for digit in "abc")
FUNCTION = {
    "type": "function",
    "name": "f",
    "description": "d",
    "parameters": {"type": "object"},
    "strict": True,
}
USER = {"role": "user", "content": "hi"}


def parse(shelf: Responses | None = None, **body: Any) -> ResponsesCall:
    return parse_responses({"input": "hi", **body}, shelf or Responses(), NEW)


def messages(*items: Mapping[str, Any], **body: Any) -> tuple[Message, ...]:
    return parse(input=list(items), **body).request.messages


def text(value: str) -> tuple[dict[str, str], ...]:
    return ({"type": "text", "text": value},)


# --- input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"role": "user", "content": "x"}, Message("user", "x")),
        ({"type": "message", "role": "user", "content": None}, Message("user")),
        ({"role": "user"}, Message("user")),
        ({"role": "developer", "content": "x"}, Message("system", "x")),
        ({"role": "system", "content": [{"type": "input_text", "text": "x"}]}, Message("system", text("x"))),
        ({"role": "user", "content": [{"type": "text", "text": "x"}]}, Message("user", text("x"))),
        ({"role": "user", "content": ["x"]}, Message("user", text("x"))),
        ({"role": "assistant", "content": "x"}, Message("assistant", "x")),
        (
            {
                "role": "assistant",
                "content": [{"type": "output_text", "text": "x"}, {"type": "refusal", "refusal": "y"}],
            },
            Message("assistant", "xy"),
        ),
        (
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a":1}'},
            Message("assistant", "", tool_calls=(ToolCall("c", "f", '{"a":1}'),)),
        ),
        (
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": {"a": 1}},
            Message("assistant", "", tool_calls=(ToolCall("c", "f", '{"a":1}'),)),
        ),
        (
            {"type": "function_call", "id": "fc_1", "name": "f"},
            Message("assistant", "", tool_calls=(ToolCall("fc_1", "f", "{}"),)),
        ),
        (
            {"type": "custom_tool_call", "call_id": "c", "name": "patch", "input": 'a"b'},
            Message("assistant", "", tool_calls=(ToolCall("c", "patch", '{"input":"a\\"b"}'),)),
        ),
        (
            {"type": "local_shell_call", "call_id": "c", "action": {"type": "exec", "command": ["ls"]}},
            Message(
                "assistant",
                "",
                tool_calls=(ToolCall("c", "local_shell", '{"type":"exec","command":["ls"]}'),),
            ),
        ),
        (
            {"type": "function_call_output", "call_id": "c", "output": "x"},
            Message("tool", "x", tool_call_id="c"),
        ),
        (
            {"type": "custom_tool_call_output", "call_id": "c", "output": "x"},
            Message("tool", "x", tool_call_id="c"),
        ),
        (
            {"type": "local_shell_call_output", "id": "c", "output": "x"},
            Message("tool", "x", tool_call_id="c"),
        ),
        (
            {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "x"}]},
            Message("tool", text("x"), tool_call_id="c"),
        ),
        (
            {"type": "function_call_output", "call_id": "c", "output": {"content": "x", "success": False}},
            Message("tool", '{"content":"x","success":false}', tool_call_id="c"),
        ),
        (
            {"type": "shell_call_output", "call_id": "c", "output": [{"stdout": "x", "stderr": ""}]},
            Message("tool", '[{"stdout":"x","stderr":""}]', tool_call_id="c"),
        ),
        (
            {
                "type": "function_call_output",
                "call_id": "c",
                "output": [{"type": "input_image", "image_url": "x"}],
            },
            Message("tool", text("[image omitted: this model reads text only]"), tool_call_id="c"),
        ),
        (
            {
                "type": "reasoning",
                "id": "rs_1",
                "summary": [],
                "content": [{"type": "reasoning_text", "text": "x"}],
            },
            Message("assistant", "", reasoning="x"),
        ),
        (
            {"type": "reasoning", "summary": [], "content": None, "encrypted_content": seal("x")},
            Message("assistant", "", reasoning="x"),
        ),
        (
            {
                "type": "reasoning",
                "summary": [{"type": "summary_text", "text": "x"}],
                "encrypted_content": "gAAAA",
            },
            Message("assistant", "", reasoning="x"),
        ),
    ],
)
def test_an_item_becomes_a_message(item: dict[str, Any], message: Message) -> None:
    assert messages(item, USER) == (message, Message("user", "hi"))


@pytest.mark.parametrize(
    "item",
    [
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search"}},
        {"type": "web_search_call", "id": "ws_1"},
        {"type": "compaction", "encrypted_content": "x"},
        {"type": "ghost_snapshot", "ghost_commit": {"id": "x"}},
        {"type": "mcp_list_tools", "tools": [{"name": 5}]},
        {"type": "of the future", "role": 5, "content": 5},
    ],
)
def test_what_means_nothing_here_is_passed_over(item: dict[str, Any]) -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    said = Message("assistant", "x", tool_calls=(ToolCall("c", "f", "{}"),))
    assert messages({"role": "assistant", "content": "x"}, item, call, USER) == (said, Message("user", "hi"))


def test_items_in_a_row_are_one_assistant_message() -> None:
    items = [
        {"type": "reasoning", "summary": [], "encrypted_content": seal("I must look.")},
        {"role": "assistant", "content": "One moment."},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "function_call_output", "call_id": "c2", "output": "2"},
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    calls = (ToolCall("c1", "f", "{}"), ToolCall("c2", "g", "{}"))
    assert messages(*items) == (
        Message("assistant", "One moment.", reasoning="I must look.", tool_calls=calls),
        Message("tool", "1", tool_call_id="c1"),
        Message("tool", "2", tool_call_id="c2"),
        Message("assistant", "a\n\nb"),
    )


def test_answers_of_ours_are_told_apart_and_found_again() -> None:
    items = [
        {"role": "assistant", "content": "a", "id": item_id("message", OLD, 0)},
        {"role": "assistant", "content": "b", "id": item_id("message", OLD, 2)},
        {"role": "assistant", "content": "c", "id": item_id("message", OLDER, 0)},
        # Without the item's id the call's tells.
        {"type": "function_call", "call_id": call_id(OLDER, 1), "name": "f", "arguments": "{}"},
    ]
    calls = (ToolCall(call_id(OLDER, 1), "f", "{}"),)
    assert messages(*items) == (
        Message("assistant", "ab", response_id=OLD),
        Message("assistant", "c", response_id=OLDER, tool_calls=calls),
    )


@pytest.mark.parametrize(
    ("kind", "word"), [("input_image", "image"), ("input_file", "file"), ("odd", "part")]
)
def test_images_are_refused_only_where_they_are_to_be_answered(kind: str, word: str) -> None:
    seen = {
        "role": "user",
        "content": [{"type": "input_text", "text": "see"}, {"type": kind, "file_id": "x"}],
    }
    with pytest.raises(RequestError) as caught:
        parse(input=[USER, seen, {"role": "developer", "content": "x"}])
    assert caught.value.param == "input[1].content[1].type"
    omitted = Message("user", text("see") + text(f"[{word} omitted: this model reads text only]"))
    assert messages(seen, USER)[0] == omitted
    assert messages(seen, {"role": "assistant", "content": "x"})[0] == omitted
    assert messages(seen, {"type": "function_call_output", "call_id": "c"})[0] == omitted


def test_instructions_come_first() -> None:
    assert messages(USER, instructions="Be brief.")[0] == Message("system", "Be brief.")
    assert messages(USER, instructions=[{"role": "developer", "content": "x"}])[0] == Message("system", "x")
    assert messages(USER, instructions="") == (Message("user", "hi"),)


def test_items_are_kept_as_the_api_lists_them() -> None:
    named = {"type": "function_call_output", "id": "mine", "call_id": "c", "output": "x", "status": None}
    assert parse(input=[USER, {"role": "assistant", "content": "x"}, named]).items == (
        {
            "type": "message",
            "status": "completed",
            "id": f"msg_{'a' * 32}_in0",
            "role": "user",
            "content": [{"type": "input_text", "text": "hi"}],
        },
        {
            "type": "message",
            "status": "completed",
            "id": f"msg_{'a' * 32}_in1",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "x", "annotations": []}],
        },
        {"type": "function_call_output", "status": "completed", "id": "mine", "call_id": "c", "output": "x"},
    )


# --- what came before -----------------------------------------------------------------------------


def kept(shelf: Responses, response_id: str, **body: Any) -> Responses:
    """`shelf` with a response that says "yes"."""
    call = parse_responses({"input": "hi", **body}, shelf, response_id)
    said = {"type": "output_text", "text": "yes", "annotations": []}
    message = {
        "type": "message",
        "id": item_id("message", response_id, 0),
        "role": "assistant",
        "content": [said],
    }
    shelf.add({"id": response_id, "output": [message]}, call.items)
    return shelf


def test_a_response_is_gone_on_from_without_its_instructions() -> None:
    shelf = kept(kept(Responses(), OLDER, instructions="Old."), OLD, previous_response_id=OLDER, input="And?")
    call = parse(shelf, previous_response_id=OLD, instructions="New.", input="So?")
    assert call.request.messages == (
        Message("system", "New."),
        Message("user", text("hi")),
        Message("assistant", "yes", response_id=OLDER),
        Message("user", text("And?")),
        Message("assistant", "yes", response_id=OLD),
        Message("user", "So?"),
    )
    assert len(call.items) == 5
    assert call.echo["previous_response_id"] == OLD
    # Tool results alone, or nothing at all, are input enough.
    assert parse_responses({"previous_response_id": OLD}, shelf, NEW).request.messages[-1].role == "assistant"


@pytest.mark.parametrize("kind", [{}, {"type": "item_reference"}])
def test_an_item_may_be_brought_by_reference(kind: dict[str, str]) -> None:
    shelf = kept(Responses(), OLD)
    call = parse(shelf, input=[{**kind, "id": item_id("message", OLD, 0)}, USER])
    assert call.request.messages[0] == Message("assistant", "yes", response_id=OLD)
    assert call.items[0]["content"][0]["text"] == "yes"
    assert parse(shelf, input=[{"id": f"msg_{'b' * 32}_in0"}]).request.messages == (
        Message("user", text("hi")),
    )


def test_a_shelf_has_limits_by_count_and_by_size() -> None:
    ids = [f"resp_{i:032x}" for i in range(5)]
    by_count = Responses(max_responses=2)
    for identity in ids[:2]:
        kept(by_count, identity)
    assert by_count.get(ids[0]) is not None  # used: the other one goes first
    kept(by_count, ids[2])
    assert [by_count.get(identity) is not None for identity in ids[:3]] == [True, False, True]
    assert by_count.remove(ids[0])
    assert not by_count.remove(ids[0])
    assert len(by_count) == 1
    by_size = Responses(max_bytes=2000)
    for identity in ids:
        kept(by_size, identity, input="x" * 500)
    assert [by_size.get(identity) is not None for identity in ids] == [False, False, False, True, True]
    kept(by_size, OLD, input="x" * 3000)  # too large for it alone: the others stay
    assert [by_size.get(identity) is not None for identity in (OLD, *ids[3:])] == [False, True, True]
    kept(by_size, ids[4], input="x" * 3000)
    assert [by_size.get(identity) is not None for identity in ids[3:]] == [True, False]


def calls_of(function: Callable[[], object]) -> int:
    """Calls of Python and native functions: what work it is, whatever the machine."""
    count = 0

    def counted(_frame: object, event: str, _arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_references_are_found_at_once_and_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [{**USER, "content": str(i)} for i in range(responses_references.MAX_REFERENCES)]
    shelf = kept(Responses(), OLD, input=items)
    names = [
        {"type": "item_reference", "id": item_id("message", OLD, i, brought=True)} for i in range(len(items))
    ]
    few = calls_of(lambda: parse(shelf, input=names[:100]))
    assert parse(shelf, input=names).request.messages[-1] == Message("user", text(str(len(items) - 1)))
    assert calls_of(lambda: parse(shelf, input=names)) <= 1.5 * few * len(names) / 100
    with pytest.raises(RequestError) as many:
        parse(shelf, input=[*names, names[0]])
    assert many.value.param == "input"
    monkeypatch.setattr(responses_references, "MAX_REFERENCED_BYTES", 1000)
    assert parse(shelf, input=names[:5])
    with pytest.raises(RequestError) as large:
        parse(shelf, input=names[:1] * 20)
    assert large.value.param == "input"


def test_a_strange_id_of_an_item_is_no_id() -> None:
    shelf = kept(Responses(), OLD, input=[{**USER, "id": ["a"]}])
    assert shelf.item(item_id("message", OLD, 0)) is not None


# --- tools ----------------------------------------------------------------------------------------


def names(call: ResponsesCall) -> list[str]:
    return [tool["function"]["name"] for tool in call.request.tools]


def test_functions_are_offered_in_chat_form() -> None:
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    assert parse(tools=[FUNCTION]).request.tools == ({"type": "function", "function": function},)
    bare = parse(tools=[{"type": "function", "name": "f", "description": None, "parameters": None}])
    assert bare.request.tools == ({"type": "function", "function": {"name": "f"}},)


def test_a_custom_tool_is_a_function_of_one_text() -> None:
    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: /x/"}
    call = parse(tools=[{"type": "custom", "name": "patch", "description": "Patches.", "format": grammar}])
    (function,) = (tool["function"] for tool in call.request.tools)
    assert function["parameters"]["required"] == ["input"]
    assert function["description"].startswith("Patches.")
    assert "start: /x/" in function["description"]
    assert call.toolbox.origin("patch").custom
    assert custom_input('{"input":"a\\nb"}') == "a\nb"
    assert custom_input('{"input":"a') == '{"input":"a'
    assert custom_input("[]") == "[]"


def test_a_namespace_is_opened() -> None:
    space = {"type": "namespace", "name": "mcp__docs__", "description": "d"}
    inner = [FUNCTION, {"type": "function", "name": "g"}, {"type": "custom", "name": "h"}, {"type": "odd"}]
    other = {"type": "namespace", "name": "a b", "tools": [{"type": "function", "name": "g"}]}
    call = parse(tools=[{**space, "tools": inner}, FUNCTION, {"type": "web_search"}, other, FUNCTION])
    assert names(call) == ["mcp__docs__f", "g", "h", "f", "a_b__g"]
    origin = call.toolbox.origin("mcp__docs__f")
    assert (origin.name, origin.namespace) == ("f", "mcp__docs__")
    assert call.toolbox.find("f", "mcp__docs__") == "mcp__docs__f"
    assert call.toolbox.find("f", None) == "f"
    assert call.toolbox.find("g", "a b") == "a_b__g"
    # The history names them as the client does.
    history = {
        "type": "function_call",
        "call_id": "c",
        "namespace": "mcp__docs__",
        "name": "f",
        "arguments": "{}",
    }
    (said, _) = messages(history, USER, tools=[{**space, "tools": inner}, FUNCTION])
    assert said.tool_calls[0].name == "mcp__docs__f"


def test_a_name_is_found_among_many_at_once() -> None:
    tools = [{"type": "namespace", "name": f"n{i}", "tools": [FUNCTION]} for i in range(1000)]
    call = parse(tools=[*tools, FUNCTION])
    box = call.toolbox
    assert (box.find("f", None), box.find("f", "n7"), box.find("f", "no"), box.find("g", None)) == (
        "f",
        "n7__f",
        None,
        None,
    )
    assert all(box.find("f", f"n{i % 1000}") for i in range(1000))
    assert calls_of(lambda: box.find("f", "n999")) < 10
    assert parse_choice(
        {"type": "allowed_tools", "tools": [{"type": "namespace", "name": "n1"}, {"name": "f"}]}, box
    )[0].functions == tuple(t for t in box.functions if t["function"]["name"] in ("f", "n1__f"))


def test_of_a_hosted_tool_no_more_is_repeated_than_which_it_is() -> None:
    mcp = {"type": "mcp", "server_label": "a", "authorization": "secret", "headers": {"x": "y" * 99}}
    tools = parse(tools=[mcp, FUNCTION, {"type": "web_search", "filters": {}}]).echo["tools"]
    assert tools == [{"type": "mcp", "server_label": "a"}, FUNCTION, {"type": "web_search"}]


def test_items_may_declare_tools() -> None:
    more = {
        "type": "additional_tools",
        "role": "developer",
        "tools": [FUNCTION, {"type": "function", "name": "g"}],
    }
    assert names(parse(input=[more, USER], tools=[FUNCTION])) == ["f", "g"]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ("auto", None, 2)),
        ("auto", ("auto", None, 2)),
        ("none", ("none", None, 2)),
        ("required", ("required", None, 2)),
        ({"type": "function", "name": "f"}, ("required", "f", 2)),
        ({"type": "custom", "name": "g"}, ("required", "g", 2)),
        ({"type": "web_search_preview"}, ("auto", None, 2)),
        ({"type": "mcp", "server_label": "x"}, ("auto", None, 2)),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]},
            ("required", None, 1),
        ),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "web_search"}]}, ("auto", None, 0)),
    ],
)
def test_tool_choice(choice: Any, expected: tuple[str, str | None, int]) -> None:
    request = parse(tools=[FUNCTION, {"type": "custom", "name": "g"}], tool_choice=choice).request
    assert (request.tool_choice, request.tool_name, len(request.tools)) == expected


def test_required_is_no_error_where_only_hosted_tools_were_left_out() -> None:
    assert parse(tools=[{"type": "web_search"}], tool_choice="required").request.tool_choice == "auto"


# --- the rest -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"max_output_tokens": 5}, {"max_tokens": 5}),
        ({"store": False}, {"store": False}),
        ({"parallel_tool_calls": False}, {"parallel_tool_calls": False}),
        ({"reasoning": {"effort": "none"}}, {"thinking": False}),
        ({"reasoning": {"effort": "low", "summary": "auto"}}, {"thinking": True, "thinking_budget": 4096}),
        ({"reasoning": {"effort": "low"}, "thinking_budget": 9}, {"thinking_budget": 9}),
        ({"text": {"format": {"type": "text"}, "verbosity": "low"}}, {"json_schema": None}),
        ({"text": {"format": {"type": "json_object"}}}, {"json_schema": {"type": "object"}}),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"a": 1}}}},
            {"json_schema": {"a": 1}},
        ),
        ({"stop": ["x"], "cache_prompt": False}, {"stop": ("x",), "reuse": False}),
        ({"return_progress": True, "stream": True}, {"progress": True}),
        ({"return_progress": True}, {"progress": False}),
    ],
)
def test_other_fields(body: dict[str, Any], expected: dict[str, Any]) -> None:
    request = parse(**body).request
    assert {key: getattr(request, key) for key in expected} == expected


def test_numbers_without_bounds_can_be_repeated() -> None:
    call = parse(max_output_tokens=1e30, max_tool_calls=1e30)
    assert call.request.max_tokens == int(1e30)
    assert orjson.loads(orjson.dumps(call.echo))["max_tool_calls"] == 1e30


def test_sampling_and_log_probabilities() -> None:
    sampling = parse(temperature=0.5, top_p=0.9, seed=3, top_k=4, min_p=0.1).request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.top_k) == (0.5, 0.9, 3, 4)
    assert sampling.logprobs is None
    assert parse(top_logprobs=2).request.sampling.logprobs == 2
    assert parse(include=["message.output_text.logprobs"]).request.sampling.logprobs == 0


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"input": None}, "input", "missing_required"),
        ({"input": 5}, "input", "invalid_type"),
        ({"input": []}, "input", "missing_required"),
        ({"input": [{"type": "web_search_call"}]}, "input", "missing_required"),
        ({"input": ["x"]}, "input[0]", "invalid_type"),
        ({"input": [{}]}, "input[0].role", "missing_required"),
        ({"input": [{"role": "narrator"}]}, "input[0].role", "invalid_value"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content", "invalid_type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
            "input[0].content[0].text",
            None,
        ),
        ({"input": [{"type": 5}]}, "input[0].type", "invalid_type"),
        ({"input": [{"type": "function_call", "call_id": "c"}]}, "input[0].name", "missing_required"),
        ({"input": [{"type": "item_reference", "id": "msg_x"}]}, "input[0].id", "item_not_found"),
        ({"input": [{"id": item_id("message", OLD, 0)}]}, "input[0].id", "item_not_found"),
        ({"previous_response_id": OLD}, "previous_response_id", "previous_response_not_found"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"conversation": "conv_1"}, "conversation", "unsupported_parameter"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "unsupported_parameter"),
        ({"instructions": 5}, "instructions", "invalid_type"),
        ({"tools": [{"name": "f"}]}, "tools[0].type", "missing_required"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "missing_required"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", "invalid_value"),
        ({"tools": [{**FUNCTION, "parameters": []}]}, "tools[0].parameters", "invalid_type"),
        ({"tools": [FUNCTION] * 1025}, "tools", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tool_choice": "maybe"}, "tool_choice", "invalid_value"),
        ({"tool_choice": 5}, "tool_choice", "invalid_type"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "invalid_value"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "no"}}, "tool_choice.mode", "invalid_value"),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
        ({"top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"temperature": "x"}, "temperature", "invalid_type"),
        ({"reasoning": {"effort": "heroic"}}, "reasoning.effort", "invalid_value"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "invalid_value"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", "invalid_type"),
        ({"metadata": {"a": 5}}, "metadata.a", "invalid_type"),
        ({"stream": 1}, "stream", "invalid_type"),
    ],
)
def test_a_wrong_field_is_named(body: dict[str, Any], param: str, code: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        parse(**body)
    assert caught.value.param == param
    assert code is None or caught.value.code == code


@given(st.text())
def test_sealed_reasoning_comes_back(reasoning: str) -> None:
    assert Unsealing().text(seal(reasoning)) == reasoning


def test_what_is_not_ours_or_damaged_is_not_unsealed() -> None:
    sealed = seal("x" * 100)
    others = ("", "k2s1.", "k2s1.é", "gAAAAA", sealed.swapcase(), sealed + "AAAA")
    assert not any(Unsealing().text(text) for text in (*others, *(sealed[:n] for n in range(len(sealed)))))
    assert not Unsealing().text(seal("x" * (MAX_REASONING_BYTES + 1)))
    largest = "x" * MAX_REASONING_BYTES
    assert Unsealing().text(seal(largest)) == largest


@pytest.mark.parametrize("damage", ["digest", "checksum", "end"])
def test_what_unpacks_in_vain_counts_too(damage: str) -> None:
    raw = b"x" * 5_000_000
    packed = zlib.compress(raw)
    data = {"digest": packed, "checksum": packed[:-1] + b"?", "end": packed[:-4]}[damage]
    broken = "k2s1." + base64.urlsafe_b64encode(b"12345678" + data).decode().rstrip("=")
    unsealing = Unsealing(8_000_000)
    assert not unsealing.text(broken)
    assert unsealing.text(seal("y" * 1_000_000))
    assert not unsealing.text(broken)
    assert not unsealing.text(seal("y"))


def test_reasoning_is_unsealed_up_to_a_size_in_common() -> None:
    half = seal("x" * (MAX_UNSEALED_BYTES // 2))
    items = [
        item
        for n in range(4)
        for item in (
            {"type": "reasoning", "encrypted_content": half, "summary": []},
            {**USER, "content": str(n)},
        )
    ]
    said = [m for m in messages(*items) if m.role == "assistant"]
    assert [len(m.reasoning or "") for m in said] == [MAX_UNSEALED_BYTES // 2] * 2 + [0, 0]


# --- anything -------------------------------------------------------------------------------------

KEYS = (
    "input instructions type role content id call_id name arguments output summary encrypted_content action "
    "text tools tool_choice mode namespace format schema reasoning effort include metadata stream store "
    "previous_response_id background conversation prompt max_output_tokens top_logprobs temperature stop "
    "parameters description definition max_tool_calls truncation parallel_tool_calls thinking"
).split()
WORDS = [
    "user", "assistant", "developer", "message", "reasoning", "function", "custom", "namespace",
    "function_call", "function_call_output", "custom_tool_call", "local_shell_call", "item_reference",
    "additional_tools", "allowed_tools", "input_text", "input_image", "json_schema", "required", "f", "",
]  # fmt: skip
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(WORDS)
    | st.text(max_size=5)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
objects = st.dictionaries(st.sampled_from(KEYS), values, max_size=6)
parts = st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(WORDS), "text": st.text(max_size=5)}), max_size=2
)
texts = st.text(max_size=5) | parts
likely = st.fixed_dictionaries(
    {"type": st.sampled_from(WORDS), "role": st.sampled_from(WORDS[:3]), "name": st.just("f")},
    optional={"content": texts, "output": texts | values, "summary": parts, "call_id": st.text(max_size=5)},
)
few = st.dictionaries(st.sampled_from(KEYS), values, max_size=1)
items = st.builds(lambda a, b: {**a, **b}, likely, few | st.just({}))
bodies = objects | st.builds(
    lambda a, b: {**a, **b},
    st.fixed_dictionaries(
        {"input": st.just("hi") | st.lists(items, min_size=1, max_size=4)},
        optional={"tools": st.lists(items, max_size=3), "tool_choice": items},
    ),
    few | st.just({}),
)


@given(bodies)
@settings(max_examples=200, deadline=None)
def test_any_body_parses_or_is_refused_by_name(body: dict[str, Any]) -> None:
    with contextlib.suppress(RequestError):
        call = parse_responses(parse_object(json.dumps(body).encode()), Responses(), NEW)
        assert call.request.messages
        orjson.dumps([call.items, call.echo])


@given(st.lists(st.tuples(st.sampled_from(["", "/input_tokens", "/x/cancel"]), bodies), max_size=4))
@settings(max_examples=10, deadline=None)
def test_no_body_makes_a_500(requests: list[tuple[str, dict[str, Any]]]) -> None:
    app = create_app(ScriptedModel(Script([Step((Content("ok"),))])))

    async def post_all() -> list[int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [
                (await client.post(f"/v1/responses{path}", json=body)).status_code for path, body in requests
            ]

    assert set(asyncio.run(post_all())) <= {200, 400, 404}
