"""What a messages request asks for, field by field."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from k2hybrid.errors import RequestError
from k2hybrid.server.messages_request import MessagesCall, parse_messages
from k2hybrid.server.parts import omitted
from k2hybrid.server.sealed import MAX_UNSEALED_BYTES, seal
from k2hybrid.types import Message, ToolCall

HI = {"role": "user", "content": "hi"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"name": "get_weather", "description": "Weather.", "input_schema": SCHEMA}
SEARCH = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "AAAA"}}
USE = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Rome"}}
CALL = ToolCall("toolu_1", "get_weather", '{"city":"Rome"}')


def parse(**fields: Any) -> MessagesCall:
    return parse_messages({"model": "m", "max_tokens": 64, "messages": [HI], **fields})


def history(*messages: dict[str, Any], **fields: Any) -> list[Message]:
    return list(parse(messages=list(messages), **fields).request.messages)


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def assistant(*content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(content)}


def text(value: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **more}


def result(content: Any = None, identity: str = "toolu_1", **more: Any) -> dict[str, Any]:
    block = {"type": "tool_result", "tool_use_id": identity, **more}
    return block if content is None else {**block, "content": content}


def tool(content: str, identity: str = "toolu_1") -> Message:
    return Message("tool", content, tool_call_id=identity)


# --- messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        (None, []),
        ("", []),
        ([], []),
        ("Be kind.", ["Be kind."]),
        (
            [text("Be kind.", cache_control={"type": "ephemeral"}), text("Be brief.")],
            ["Be kind.\n\nBe brief."],
        ),
        ([text("x-anthropic-billing-header: cc_version=2; cch=1a2b3;"), text("Be kind.")], ["Be kind."]),
        ("x-anthropic-billing-header: cch=1\nBe kind.", ["Be kind."]),
        ("x-anthropic-billing-header: cch=1", []),
        ([text("Be kind."), text("x-anthropic-billing-header")], ["Be kind.\n\nx-anthropic-billing-header"]),
    ],
)
def test_system_is_the_first_message(system: Any, expected: list[str]) -> None:
    assert history(HI, system=system) == [*(Message("system", s) for s in expected), Message("user", "hi")]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (HI, [Message("user", "hi")]),
        ({"role": "user"}, [Message("user", "")]),
        ({"role": "user", "content": None}, [Message("user", "")]),
        (user(), [Message("user", "")]),
        (user("a", text("b", cache_control={"type": "ephemeral"})), [Message("user", "a\n\nb")]),
        ({"role": "system", "content": "now"}, [Message("system", "now")]),
        ({"role": "developer", "content": [text("now")]}, [Message("system", "now")]),
        (user(result("sunny")), [tool("sunny")]),
        (user(result()), [tool("")]),
        (user(result([])), [tool("")]),
        (user(result([text("sunny"), text("warm")])), [tool("sunny\n\nwarm")]),
        (user(result("no such city", is_error=True)), [tool("Error: no such city")]),
        (user(result("error: no such city", is_error=True)), [tool("error: no such city")]),
        (user(result(is_error=True)), [tool("Error")]),
        (
            user(result("1", "a"), text("and now?"), result("2", "b")),
            [tool("1", "a"), tool("2", "b"), Message("user", "and now?")],
        ),
        (user(result([text("a plot"), IMAGE])), [tool(f"a plot\n\n{omitted('image')}")]),
        (user(result([PDF])), [tool(omitted("document"))]),
        (
            user({"type": "document", "title": "T", "source": {"type": "text", "data": "body"}}),
            [Message("user", "T\n\nbody")],
        ),
        (
            user({"type": "document", "source": {"type": "content", "content": [text("body"), IMAGE]}}),
            [Message("user", f"body\n\n{omitted('image')}")],
        ),
        (user(PDF, text("?")), [Message("user", f"{omitted('document')}\n\n?")]),
        (
            user({"type": "search_result", "title": "T", "source": "S", "content": [text("found")]}),
            [Message("user", "T\n\nS\n\nfound")],
        ),
        (
            user(result([{"type": "tool_reference", "tool_name": "f"}])),
            [tool("The tool f is ready for use.")],
        ),
        (user({"type": "container_upload", "file_id": "f"}), [Message("user", omitted("container_upload"))]),
    ],
)
def test_a_turn_becomes_messages(message: dict[str, Any], expected: list[Message]) -> None:
    assert history(message) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("fine", Message("assistant", "fine")),
        (None, Message("assistant", "")),
        ([text("It "), text("rains")], Message("assistant", "It rains")),
        ([USE], Message("assistant", "", tool_calls=(CALL,))),
        (
            [{"type": "thinking", "thinking": "hm", "signature": "foreign"}, text("I ask."), USE],
            Message("assistant", "I ask.", reasoning="hm", tool_calls=(CALL,)),
        ),
        ([{"type": "thinking", "thinking": "hm"}], Message("assistant", "", reasoning="hm")),
        (
            [{"type": "thinking", "thinking": "", "signature": seal("hm")}, text("I ask.")],
            Message("assistant", "I ask.", reasoning="hm"),
        ),
        (
            [{"type": "thinking", "thinking": "", "signature": "EqQBCkYIBxgCKkD"}, text("ok")],
            Message("assistant", "ok"),
        ),
        (
            [{"type": "redacted_thinking", "data": seal("hm")}, text("ok")],
            Message("assistant", "ok", reasoning="hm"),
        ),
        ([{"type": "redacted_thinking", "data": "foreign"}, text("ok")], Message("assistant", "ok")),
        (
            [{**USE, "input": None}, {**USE, "input": '{"city": "Rome"}'}],
            Message(
                "assistant",
                "",
                tool_calls=(
                    ToolCall("toolu_1", "get_weather", "{}"),
                    ToolCall("toolu_1", "get_weather", '{"city": "Rome"}'),
                ),
            ),
        ),
        (
            [
                {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}},
                {
                    "type": "web_search_tool_result",
                    "tool_use_id": "s",
                    "content": [{"type": "web_search_result", "url": "u", "encrypted_content": "x"}],
                },
                {
                    "type": "web_fetch_tool_result",
                    "content": {"content": {"source": {"type": "text", "data": "x"}}},
                },
                {"type": "mcp_tool_result", "content": [text("seen")]},
                {"type": "kind_of_tomorrow", "content": 3},
                text("Found."),
            ],
            Message("assistant", "seenFound."),
        ),
    ],
)
def test_an_answer_in_the_history(content: Any, expected: Message) -> None:
    assert history(HI, {"role": "assistant", "content": content}, HI)[1] == expected


def test_an_image_is_refused_in_the_newest_user_message_alone() -> None:
    older, answer = user(text("look"), IMAGE), assistant(text("I see."))
    assert history(older, answer, HI)[0] == Message("user", f"look\n\n{omitted('image')}")
    assert history(older, answer, user(result("x")))[0].content == f"look\n\n{omitted('image')}"
    for messages in ([older], [older, assistant("It is")], [older, {"role": "system", "content": "now"}]):
        with pytest.raises(RequestError) as caught:
            parse(messages=messages)
        assert caught.value.param == "messages[0].content[1]"
        assert caught.value.code == "unsupported_content"


def test_a_last_assistant_message_is_continued() -> None:
    assert history(HI, assistant(text("It is ")))[-1] == Message("assistant", "It is ", partial=True)
    assert not history(HI, assistant(text("It is ")), HI)[1].partial
    assert not history(HI, assistant(text("It is "), USE))[-1].partial


def test_reasoning_is_unsealed_up_to_a_size_in_common() -> None:
    large = seal("x" * (MAX_UNSEALED_BYTES // 2))
    message = assistant({"type": "thinking", "thinking": "", "signature": large})
    lengths = [len(m.reasoning or "") for m in history(*[message] * 4)]
    assert lengths == [MAX_UNSEALED_BYTES // 2] * 2 + [0, 0]


# --- tools ----------------------------------------------------------------------------------------


def test_tools_take_the_form_that_the_template_declares() -> None:
    sent = [
        {**WEATHER, "cache_control": {"type": "ephemeral"}, "defer_loading": True, "strict": True},
        {"type": "custom", "name": "plain", "input_schema": {"type": "object"}},
        SEARCH,
        {"type": "bash_20250124", "name": "bash"},
        {"type": "mcp_toolset", "mcp_server_name": "x"},
    ]
    assert parse(tools=sent).request.tools == (
        {
            "type": "function",
            "function": {"name": "get_weather", "description": "Weather.", "parameters": SCHEMA},
        },
        {"type": "function", "function": {"name": "plain", "parameters": {"type": "object"}}},
    )


@pytest.mark.parametrize(
    ("choice", "tools", "expected"),
    [
        (None, [WEATHER], ("auto", None, True)),
        ({"type": "auto"}, [WEATHER], ("auto", None, True)),
        ({"type": "auto", "disable_parallel_tool_use": True}, [WEATHER], ("auto", None, False)),
        ({"type": "none"}, [WEATHER], ("none", None, True)),
        ({"type": "any"}, [WEATHER, SEARCH], ("required", None, True)),
        ({"type": "any"}, [SEARCH], ("auto", None, True)),
        (
            {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True},
            [WEATHER],
            ("required", "get_weather", False),
        ),
        ({"type": "tool", "name": "web_search"}, [SEARCH], ("auto", None, True)),
    ],
)
def test_tool_choice(choice: Any, tools: list[Any], expected: tuple[Any, ...]) -> None:
    request = parse(tools=tools, tool_choice=choice).request
    assert (request.tool_choice, request.tool_name, request.parallel_tool_calls) == expected


# --- the answer -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "thinking", "budget", "display"),
    [
        ({}, True, None, "none"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2048}}, True, 2048, "text"),
        ({"thinking": {"type": "adaptive"}}, True, None, "text"),
        ({"thinking": {"type": "adaptive", "display": "summarized"}}, True, None, "text"),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, True, None, "sealed"),
        ({"thinking": {"type": "disabled"}}, False, None, "none"),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "max"}}, False, None, "none"),
        ({"thinking": True}, True, None, "text"),
        ({"output_config": {"effort": "low"}}, True, 4096, "none"),
        ({"output_config": {"effort": "max"}}, True, None, "none"),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "medium"}}, True, 16384, "text"),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 9}, "output_config": {"effort": "low"}},
            True,
            9,
            "text",
        ),
        ({"thinking": {"type": "adaptive"}, "thinking_budget": 5}, True, 5, "text"),
        ({"thinking_budget": 0}, False, None, "none"),
    ],
)
def test_thinking(fields: dict[str, Any], thinking: bool, budget: int | None, display: str) -> None:
    call = parse(**fields)
    assert (call.request.thinking, call.request.thinking_budget, call.display) == (thinking, budget, display)


def test_the_rest_of_the_fields() -> None:
    call = parse(
        max_tokens=10**9,
        stream=True,
        temperature=1.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        seed=7,
        stop_sequences=["END", ""],
        store=False,
        cache_prompt=False,
        output_config={"format": {"type": "json_schema", "schema": SCHEMA}},
        metadata={"user_id": "u"},
        context_management={"edits": []},
        service_tier="auto",
        betas=["x"],
        mcp_servers=[],
    )
    request = call.request
    assert call.stream
    assert request.max_tokens == 10**9
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.5, 0.9, 40)
    assert (sampling.min_p, sampling.seed) == (0.1, 7)
    assert request.stop == ("END",)
    assert not request.store
    assert not request.reuse
    assert request.json_schema == SCHEMA
    former = parse(output_format={"type": "json_schema", "schema": SCHEMA})
    assert former.request.json_schema == SCHEMA
    assert parse().request.json_schema is None


def test_counting_needs_no_max_tokens() -> None:
    assert parse_messages({"messages": [HI]}, counting=True).request.max_tokens is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [user({"text": "x"})]}, "messages[0].content[0].type"),
        ({"messages": [user({"type": "text"})]}, "messages[0].content[0].text"),
        ({"messages": [user(result(5))]}, "messages[0].content[0].content"),
        ({"messages": [user(result([5]))]}, "messages[0].content[0].content[0]"),
        ({"messages": [user(result("x", is_error="yes"))]}, "messages[0].content[0].is_error"),
        ({"messages": [HI, assistant({**USE, "name": ""})]}, "messages[1].content[0].name"),
        ({"messages": [HI, assistant({**USE, "input": [1]})]}, "messages[1].content[0].input"),
        ({"system": 5}, "system"),
        ({"system": [{"type": "text", "text": 5}]}, "system[0].text"),
        ({"tools": {}}, "tools"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
        ({"tools": [{**WEATHER, "name": "a b"}]}, "tools[0].name"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [{**WEATHER, "description": 5}]}, "tools[0].description"),
        ({"tools": [WEATHER] * 1025}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "some"}, "tools": [WEATHER]}, "tool_choice.type"),
        ({"tool_choice": {"type": "tool"}, "tools": [WEATHER]}, "tool_choice.name"),
        ({"tool_choice": {"type": "tool", "name": "f"}, "tools": [WEATHER]}, "tool_choice.name"),
        ({"thinking": {"type": "perhaps"}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking.budget_tokens"),
        ({"output_config": {"effort": 3}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"stop_sequences": 5}, "stop_sequences"),
        ({"stop_sequences": [5]}, "stop_sequences[0]"),
        ({"temperature": -1}, "temperature"),
        ({"top_k": 0.5}, "top_k"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(**fields)
    assert caught.value.param == param
    assert param.partition("[")[0].partition(".")[0] in str(caught.value)


def test_what_an_agent_sends_is_accepted() -> None:
    """The shape of a coding agent's request, from its system blocks to its tools."""
    body = {
        "model": "any",
        "max_tokens": 32000,
        "stream": True,
        "thinking": {"type": "adaptive", "display": "omitted"},
        "output_config": {"effort": "high"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "system": [
            text("x-anthropic-billing-header: cc_version=2.1; cc_entrypoint=cli; cch=00000;"),
            text("You are an agent.", cache_control={"type": "ephemeral", "ttl": "1h"}),
        ],
        "tools": [{**WEATHER, "defer_loading": True}, SEARCH],
        "messages": [
            user(text("<system-reminder>x</system-reminder>"), text("weather?")),
            {"role": "system", "content": "A list of skills."},
            assistant({"type": "thinking", "thinking": "", "signature": seal("I ask.")}, USE),
            user(result([text("sunny")], cache_control={"type": "ephemeral"})),
        ],
    }
    call = parse_messages(orjson.loads(orjson.dumps(body)))
    assert [m.role for m in call.request.messages] == ["system", "user", "system", "assistant", "tool"]
    assert call.request.messages[3].reasoning == "I ask."
    assert call.display == "sealed"
