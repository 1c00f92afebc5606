"""The chat stream, event by event, as `openai` reads it and as it is on the wire."""

from __future__ import annotations

import orjson

from k2hybrid.errors import EngineError
from k2hybrid.types import (
    Content,
    Malformed,
    PromptProgress,
    Reasoning,
    TokenLogprob,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from tests.server.conftest import Served
from tests.server.scripted import Script, Step

CALLING = Script(
    [
        Step((Reasoning("I must "),)),
        Step(()),
        Step((Reasoning("look."),)),
        Step((Content("One moment."),)),
        Step((ToolCallStart(0, "functions.get_weather:0", "get_weather"),)),
        Step((ToolCallArguments(0, '{"city"'),)),
        Step((ToolCallArguments(0, ':"Beijing"}'), ToolCallEnd(0))),
        Step(
            (ToolCallStart(1, "functions.get_time:1", "get_time"), ToolCallArguments(1, "{}"), ToolCallEnd(1))
        ),
    ],
    finish="tool_calls",
    cached_tokens=3,
    reasoning_tokens=3,
)


def events(text: str) -> list[object]:
    """The stream's `data:` payloads, the closing [DONE] as a string."""
    frames = [frame for frame in text.split("\n\n") if frame and not frame.startswith(":")]
    assert all(frame.startswith("data: ") for frame in frames)
    return [frame[6:] if frame == "data: [DONE]" else orjson.loads(frame[6:]) for frame in frames]


def test_events_come_in_the_order_clients_rely_on(server: Served) -> None:
    server.model.play(CALLING)
    response = server.chat(stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert {chunk["model"] for chunk in chunks} == {"k2"}
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:-1]] == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "I must "},
        {"reasoning_content": "look."},
        {"content": "One moment."},
        {
            "tool_calls": [
                {
                    "index": 0,
                    "id": "functions.get_weather:0",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": ""},
                }
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ':"Beijing"}'}}]},
        {
            "tool_calls": [
                {
                    "index": 1,
                    "id": "functions.get_time:1",
                    "type": "function",
                    "function": {"name": "get_time", "arguments": ""},
                }
            ]
        },
        {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
        {},
    ]
    usage = {
        "prompt_tokens": 18,
        "completion_tokens": 8,
        "total_tokens": 26,
        "cached_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 3},
    }
    assert chunks[-2]["choices"][0]["finish_reason"] == "tool_calls"
    assert chunks[-2]["choices"][0]["usage"] == usage
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == usage


def test_without_include_usage_no_chunk_has_usage(server: Served) -> None:
    *chunks, _ = events(server.chat(stream=True).text)
    assert all("usage" not in chunk for chunk in chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_the_sdk_accumulates_a_stream_into_the_whole_completion(server: Served) -> None:
    server.model.play(CALLING)
    client = server.openai()
    messages = [{"role": "user", "content": "hi"}]
    whole = client.chat.completions.create(model="k2", messages=messages)
    with client.chat.completions.stream(model="k2", messages=messages) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion()
    ours, theirs = whole.choices[0].message, streamed.choices[0].message
    assert theirs.content == ours.content == "One moment."
    assert ours.reasoning_content == "I must look."
    assert [(call.id, call.function.name, call.function.arguments) for call in ours.tool_calls] == [
        ("functions.get_weather:0", "get_weather", '{"city":"Beijing"}'),
        ("functions.get_time:1", "get_time", "{}"),
    ]
    assert [(call.id, call.function.name, call.function.arguments) for call in theirs.tool_calls] == [
        (call.id, call.function.name, call.function.arguments) for call in ours.tool_calls
    ]
    assert whole.choices[0].finish_reason == streamed.choices[0].finish_reason == "tool_calls"
    assert whole.usage.completion_tokens_details.reasoning_tokens == 3


def test_several_choices_interleave_under_their_indices(server: Served) -> None:
    server.model.play(Script([Step((Content("a"),))]), Script([Step((Content("b"),))], finish="length"))
    *chunks, _ = events(server.chat(stream=True, n=2, seed=7, stream_options={"include_usage": True}).text)
    text, finish = {0: "", 1: ""}, {}
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        text[choice["index"]] += choice["delta"].get("content", "")
        finish[choice["index"]] = choice["finish_reason"] or finish.get(choice["index"])
    assert text == {0: "a", 1: "b"}
    assert finish == {0: "stop", 1: "length"}
    assert [request.sampling.seed for request in server.model.requests] == [7, 8]
    assert chunks[-1]["usage"]["completion_tokens"] == 2
    assert chunks[-1]["usage"]["prompt_tokens"] == 18


def test_an_error_in_the_middle_becomes_an_event_and_the_stream_ends(server: Served) -> None:
    server.model.play(Script([Step((Content("a"),)), Step(error=EngineError("the step failed"))]))
    *_, content, error, done = events(server.chat(stream=True).text)
    assert content["choices"][0]["delta"] == {"content": "a"}
    assert error == {
        "error": {"message": "the step failed", "type": "server_error", "param": None, "code": "engine_error"}
    }
    assert done == "[DONE]"


def test_what_cannot_be_parsed_reaches_the_client(server: Served) -> None:
    server.model.play(Script([Step((Content("x"), Malformed("<junk>", "no such tool")))]))
    expected = {"malformed": [{"text": "<junk>", "reason": "no such tool", "code": "malformed"}]}
    *_, malformed, _finish, _done = events(server.chat(stream=True).text)
    assert malformed["choices"][0]["delta"] == {"k2hybrid": expected}
    assert server.chat().json()["choices"][0]["message"]["k2hybrid"] == expected


def test_logprobs_cover_the_content_tokens_and_nothing_else(server: Served) -> None:
    def step(token: int, *happened: object) -> Step:
        return Step(happened, TokenLogprob(token, -0.5, ((token, -0.5), (66, float("-inf")))))

    server.model.play(
        Script(
            [
                step(65, Reasoning("A")),
                step(257),  # </think> makes no event
                step(0xC3),  # half a character
                step(0xA9, Content("é")),
                step(67, Content("C")),
                step(68, ToolCallStart(0, "functions.f:0", "f")),
            ]
        )
    )
    answer = server.chat(logprobs=True, top_logprobs=2).json()["choices"][0]
    content = answer["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[0xC3], [0xA9], [67]]
    assert content[2]["token"] == "C"
    assert content[2]["logprob"] == -0.5
    assert content[2]["top_logprobs"][1] == {"token": "B", "logprob": -9999.0, "bytes": [66]}
    assert server.model.requests[0].sampling.logprobs == 2
    chunks = events(server.chat(stream=True, logprobs=True, top_logprobs=2).text)[:-1]
    streamed = [
        entry for chunk in chunks if (lp := chunk["choices"][0]["logprobs"]) for entry in lp["content"]
    ]
    assert streamed == content


def test_progress_comes_in_chunks_that_add_nothing(server: Served) -> None:
    slow = [Step(progress=PromptProgress(100, 64, 64 + done, 1000.4 * done)) for done in (12, 36)]
    script = Script([*slow, Step((Content("x"),))])
    server.model.play(script)
    chunks = events(server.chat(stream=True, return_progress=True).text)[:-1]
    assert [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk] == [
        {"total": 100, "cache": 64, "processed": 76, "time_ms": 12005},
        {"total": 100, "cache": 64, "processed": 100, "time_ms": 36014},
    ]
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {},
        {},
        {"content": "x"},
        {},
    ]
    with server.openai().chat.completions.stream(
        model="m", messages=[{"role": "user", "content": "hi"}], extra_body={"return_progress": True}
    ) as stream:
        assert stream.until_done().get_final_completion().choices[0].message.content == "x"


FUNCTION = {"name": "get_weather", "parameters": {"type": "object"}}
ONE_CALL = Script(
    [
        Step((ToolCallStart(0, "functions.get_weather:0", "get_weather"),)),
        Step((ToolCallArguments(0, '{"city"'),)),
        Step((ToolCallArguments(0, ':"x"}'), ToolCallEnd(0))),
    ],
    finish="tool_calls",
)


def test_whoever_declares_functions_gets_a_function_call(server: Served) -> None:
    server.model.play(ONE_CALL)
    choice = server.chat(functions=[FUNCTION]).json()["choices"][0]
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["function_call"] == {"name": "get_weather", "arguments": '{"city":"x"}'}
    assert choice["message"]["content"] is None
    assert "tool_calls" not in choice["message"]
    *chunks, _ = events(server.chat(functions=[FUNCTION], stream=True).text)
    assert [chunk["choices"][0]["delta"].get("function_call") for chunk in chunks] == [
        None,
        {"name": "get_weather", "arguments": ""},
        {"arguments": '{"city"'},
        {"arguments": ':"x"}'},
        None,
    ]
    assert chunks[-1]["choices"][0]["finish_reason"] == "function_call"


def test_reasoning_can_be_left_out(server: Served) -> None:
    server.model.play(CALLING)
    hidden = server.chat(reasoning={"exclude": True}).json()
    assert hidden["choices"][0]["message"]["reasoning_content"] is None
    assert hidden["usage"]["completion_tokens_details"]["reasoning_tokens"] == 3
    assert "I must" not in server.chat(reasoning={"exclude": True}, stream=True).text


def test_without_logprobs_the_field_is_null(server: Served) -> None:
    assert server.chat().json()["choices"][0]["logprobs"] is None
