"""What real clients send, and what the model gets to see of it."""

from __future__ import annotations

from typing import Any

import pytest

from k2hybrid.errors import RequestError
from k2hybrid.server.chat_request import parse_chat
from k2hybrid.types import Message, SamplingParams, ToolCall
from tests.server.conftest import Served

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}


def parsed(**body: Any) -> Any:
    return parse_chat({"messages": [USER], **body}).request


def message(**fields: Any) -> Message:
    (result,) = parse_chat({"messages": [fields]}).request.messages
    return result


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, None),
        ({"content": None}, None),
        ({"content": ""}, ""),
        ({"content": "x"}, "x"),
        ({"content": []}, ()),
        ({"content": [{"type": "text", "text": "x"}]}, ({"type": "text", "text": "x"},)),
        ({"content": ["x", {"type": "text", "text": "y", "cache_control": {}}]}, None),
    ],
)
def test_content_has_many_forms_in_every_role(role: str, content: dict[str, Any], expected: Any) -> None:
    if expected is None and content.get("content"):
        expected = ({"type": "text", "text": "x"}, {"type": "text", "text": "y"})
    assert message(role=role, **content) == Message(role, expected)


def test_developer_is_system_and_function_is_tool() -> None:
    assert message(role="developer", content="x").role == "system"
    assert message(role="function", content="x", name="f") == Message("tool", "x", name="f")


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_reasoning_comes_back_under_either_name(key: str) -> None:
    assert message(role="assistant", content="x", **{key: "because"}).reasoning == "because"


def test_assistant_calls_without_content_or_id() -> None:
    calls = [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{ "x": 1}'}},
        {"function": {"name": "g", "arguments": {"y": 2}}},
        {"function": {"name": "h"}},
    ]
    assert message(role="assistant", tool_calls=calls).tool_calls == (
        ToolCall("a", "f", '{ "x": 1}'),
        ToolCall("", "g", '{"y":2}'),
        ToolCall("", "h", "{}"),
    )


def test_partial_holds_for_the_last_message_only() -> None:
    turn = {"role": "assistant", "content": "x", "partial": True}
    messages = parse_chat({"messages": [turn, USER, turn]}).request.messages
    assert [m.partial for m in messages] == [False, False, True]


def test_a_partial_message_may_be_reasoning_alone() -> None:
    begun = message(role="assistant", content=None, reasoning_content="Let me", partial=True)
    assert begun == Message("assistant", None, reasoning="Let me", partial=True)


def test_every_sampling_field_arrives() -> None:
    assert parsed(
        temperature=0,
        top_p=0.5,
        top_k=5,
        min_p=0.1,
        seed=3,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.1,
        logit_bias={"5": -100},
        logprobs=True,
        top_logprobs=4,
    ).sampling == SamplingParams(0.0, 0.5, 5, 0.1, 3, 1.0, -1.0, 1.1, {5: -100.0}, 4)


def test_null_means_default() -> None:
    names = (
        "temperature top_p top_k min_p seed presence_penalty frequency_penalty repetition_penalty logit_bias "
        "logprobs top_logprobs max_tokens max_completion_tokens stop tools tool_choice n stream "
        "stream_options response_format store cache_prompt constrain"
    )
    assert parse_chat({"messages": [USER], **dict.fromkeys(names.split())}) == parse_chat(
        {"messages": [USER]}
    )


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 - 1, 10**30])
def test_any_integer_is_a_seed(seed: int) -> None:
    assert 0 <= parsed(seed=seed).sampling.seed < 2**63


def test_limits_too_large_are_no_error() -> None:
    assert parsed(max_completion_tokens=262144).max_tokens == 262144
    assert parsed(max_tokens=1e30).max_tokens == int(1e30)
    assert parsed(max_tokens=5, max_completion_tokens=7).max_tokens == 7
    assert parsed(max_tokens=-1).max_tokens is None


def test_values_at_their_edges_are_no_error() -> None:
    sampling = parsed(temperature=5, top_p=0, top_k=-1, presence_penalty=-2, logit_bias={}).sampling
    assert sampling == SamplingParams(temperature=5.0, top_p=0.0, presence_penalty=-2.0)


def test_stop_is_a_string_or_several() -> None:
    assert parsed(stop="x").stop == ("x",)
    assert parsed(stop=["x", "", "y"]).stop == ("x", "y")
    assert parsed(stop="").stop == ()
    assert len(parsed(stop=[str(i) for i in range(16)]).stop) == 16


def test_tools_pass_verbatim_and_foreign_kinds_are_dropped() -> None:
    builtin = {"type": "builtin_function", "function": {"name": "$web_search"}}
    tool = {**TOOL, "x": {"b": 1, "a": [2]}}
    assert parsed(tools=[tool, builtin, {"type": "web_search"}]).tools == (tool,)
    assert parsed(tools=[]).tools == ()


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("auto", "auto"),
        ("none", "none"),
        ("required", "required"),
        ({"type": "function", "function": {"name": "get_weather"}}, "get_weather"),
    ],
)
def test_tool_choice(choice: Any, expected: str) -> None:
    request = parsed(tools=[TOOL], tool_choice=choice)
    if expected == "get_weather":
        assert (request.tool_choice, request.tool_name) == ("required", expected)
    else:
        assert (request.tool_choice, request.tool_name) == (expected, None)


def test_one_call_or_several() -> None:
    assert parsed(tools=[TOOL]).parallel_tool_calls is True
    assert parsed(tools=[TOOL], parallel_tool_calls=False).parallel_tool_calls is False


def test_messages_may_carry_tools() -> None:
    def named(name: str, **more: Any) -> dict[str, Any]:
        return {"type": "function", "function": {"name": name, **more}}

    builtin = {"type": "builtin_function", "function": {"name": "$web_search"}}
    carrier = {"role": "system", "tools": [named("g"), builtin, named("f", description="other"), named("g")]}
    assert parsed(messages=[carrier, USER], tools=[named("f")]).tools == (named("f"), named("g"))
    assert parsed(messages=[carrier, USER], tool_choice="required").tools == (
        named("g"),
        named("f", description="other"),
    )
    assert parsed(messages=[{"role": "developer", "tools": None}, USER]).tools == ()


def test_functions_are_tools_of_an_earlier_age() -> None:
    function = TOOL["function"]
    call = parse_chat({"messages": [USER], "functions": [function], "function_call": "auto"})
    assert call.legacy
    assert call.request.tools == (TOOL,)
    assert call.request.parallel_tool_calls is False
    assert not parse_chat({"messages": [USER], "tools": [TOOL], "functions": []}).legacy
    named = parsed(functions=[function], function_call={"name": "get_weather"})
    assert (named.tool_choice, named.tool_name) == ("required", "get_weather")
    assert parsed(functions=[function], function_call="none").tool_choice == "none"
    asked = message(role="assistant", content=None, function_call={"name": "f", "arguments": '{"x":1}'})
    assert asked.tool_calls == (ToolCall("", "f", '{"x":1}'),)


@pytest.mark.parametrize(
    ("wanted", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "array"}}},
            {"type": "array"},
        ),
    ],
)
def test_response_format(wanted: Any, schema: Any) -> None:
    assert parsed(response_format=wanted).json_schema == schema


@pytest.mark.parametrize(
    ("fields", "enabled", "budget"),
    [
        ({}, True, None),
        ({"thinking": {"type": "disabled"}}, False, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, True, 9),
        ({"thinking": {"type": "enabled", "keep": "all"}}, True, None),
        ({"thinking": False}, False, None),
        ({"thinking_budget": 0}, False, None),
        ({"thinking_budget": 7, "reasoning_effort": "none"}, True, 7),
        ({"reasoning_effort": "none"}, False, None),
        ({"reasoning_effort": "low"}, True, 4096),
        ({"reasoning_effort": "high"}, True, None),
        ({"reasoning": {"effort": "low"}}, True, 4096),
        ({"reasoning": {"effort": "low", "max_tokens": 5}}, True, 5),
        ({"reasoning": {"enabled": False}}, False, None),
        ({"reasoning": {"enabled": True}}, True, None),
        ({"chat_template_kwargs": {"thinking": False}}, False, None),
        ({"chat_template_kwargs": {"enable_thinking": False, "x": 1}}, False, None),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True, None),
    ],
)
def test_how_much_to_think_in_everyones_words(
    fields: dict[str, Any], enabled: bool, budget: int | None
) -> None:
    request = parsed(**fields)
    assert (request.thinking, request.thinking_budget) == (enabled, budget)


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({"type": "image_url", "image_url": {"url": "data:…"}}, "image"),
        ({"type": "input_image"}, "image"),
        ({"type": "input_audio", "input_audio": {}}, "audio"),
        ({"type": "video_url"}, "video"),
        ({"type": "file", "file": {}}, "file"),
    ],
)
def test_media_are_left_out_aloud_but_for_the_newest_question(part: Any, kind: str) -> None:
    line = {"type": "text", "text": f"[{kind} omitted: this model reads text only]"}
    text = {"type": "text", "text": "x"}
    old = {"role": "user", "content": [text, part]}
    for before, after in (([old], [USER]), ([USER], [{"role": "tool", "content": [text, part]}])):
        messages = parse_chat({"messages": [*before, *after]}).request.messages
        assert (text, line) in [message.content for message in messages]
    with pytest.raises(RequestError, match="text parts only") as caught:
        parsed(messages=[USER, old, {"role": "assistant", "content": "x"}])
    assert caught.value.code == "unsupported_content"
    assert caught.value.param == "messages[1].content[1].type"


def test_progress_is_for_streams() -> None:
    assert parsed(return_progress=True, stream=True).progress is True
    assert parsed(return_progress=True).progress is False
    assert parsed(stream=True).progress is False


def test_what_may_be_stored_and_reused() -> None:
    assert (parsed().store, parsed().reuse) == (True, True)
    assert (parsed(store=False).store, parsed(store=True).store) == (False, True)
    assert (parsed(cache_prompt=False).reuse, parsed(cache_prompt=True).reuse) == (False, True)
    assert (parsed(constrain=False).constrained, parsed().constrained) == (False, True)
    for wrong in ({"store": 0}, {"cache_prompt": "no"}, {"constrain": "no"}):
        with pytest.raises(RequestError, match="must be a boolean"):
            parsed(**wrong)


@pytest.mark.parametrize(
    ("identity", "expected"), [("chatcmpl-1", "chatcmpl-1"), ("", None), (None, None), (5, None), ({}, None)]
)
def test_an_assistant_message_may_say_which_response_it_was(identity: Any, expected: str | None) -> None:
    assert message(role="assistant", content="x", id=identity).response_id == expected
    assert message(role="user", content="x", id=identity).response_id is None


def test_the_runtime_learns_how_a_request_is_known_elsewhere(server: Served) -> None:
    response = server.chat(store=False)
    (request,) = server.model.requests
    assert request.response_id == response.json()["id"]
    assert request.request_id == response.headers["x-request-id"]
    assert request.store is False
    assert request.retry_key


def test_unknown_fields_are_ignored(server: Served) -> None:
    response = server.chat(
        chat_template="{{ 1/0 }}",
        store=False,
        metadata={"a": 1},
        thinking={"type": "enabled", "keep": "all"},
        user=5,
        model="some-other-model",
    )
    assert response.status_code == 200
    assert response.json()["model"] == "k2"


def test_a_whole_completion(server: Served) -> None:
    answer = server.openai().chat.completions.create(model="x", messages=[{"role": "user", "content": "hi"}])
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content == "Hello."
    assert answer.choices[0].message.reasoning_content is None
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 2


def test_a_tool_round_trip_through_the_sdk(server: Served) -> None:
    from tests.server.test_openai_stream import CALLING

    server.model.play(CALLING)
    client = server.openai()
    messages: list[Any] = [{"role": "user", "content": "weather?"}]
    answer = client.chat.completions.create(model="x", messages=messages, tools=[TOOL])
    messages.append(answer.choices[0].message)
    messages += [
        {"role": "tool", "tool_call_id": call.id, "name": call.function.name, "content": "sunny"}
        for call in answer.choices[0].message.tool_calls
    ]
    client.chat.completions.create(model="x", messages=messages, tools=[TOOL])
    _, assistant, first, _ = server.model.requests[1].messages
    assert assistant.reasoning == "I must look."
    assert assistant.tool_calls[0] == ToolCall("functions.get_weather:0", "get_weather", '{"city":"Beijing"}')
    assert first == Message("tool", "sunny", name="get_weather", tool_call_id="functions.get_weather:0")


def test_several_choices_in_one_completion(server: Served) -> None:
    answer = server.chat(n=8).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(8))
    assert answer["usage"]["completion_tokens"] == 16
