"""The Responses stream, event by event, as `openai` reads it and as it is on the wire."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import orjson
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from k2hybrid.errors import CapacityError, ContextLengthError, EngineError
from k2hybrid.server import sse
from k2hybrid.server.app import Settings
from k2hybrid.server.sealed import Unsealing
from k2hybrid.types import (
    Content,
    Event,
    Malformed,
    Message,
    PromptProgress,
    Reasoning,
    TokenLogprob,
    ToolCall,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from tests.server.conftest import Served, serving
from tests.server.scripted import Script, ScriptedModel, Step

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "name": "get_weather", "parameters": {"type": "object"}, "strict": False},
    {"type": "custom", "name": "apply_patch"},
    {
        "type": "namespace",
        "name": "clock",
        "description": "d",
        "tools": [{"type": "function", "name": "get_time", "parameters": {"type": "object"}}],
    },
    {"type": "web_search"},
]
CALLING = Script(
    [
        Step((Reasoning("I must "),)),
        Step(()),
        Step((Reasoning("look."),)),
        Step((Content("One "),)),
        Step((Content("moment."),)),
        Step((ToolCallStart(0, "functions.get_weather:0", "get_weather"),)),
        Step((ToolCallArguments(0, '{"city"'),)),
        Step((ToolCallArguments(0, ':"Beijing"}'), ToolCallEnd(0))),
        Step((ToolCallStart(1, "functions.apply_patch:1", "apply_patch"),)),
        Step((ToolCallArguments(1, '{"input":"a\\n'),)),
        Step((ToolCallArguments(1, 'b"}'), ToolCallEnd(1))),
        Step(
            (ToolCallStart(2, "functions.get_time:2", "get_time"), ToolCallArguments(2, "{}"), ToolCallEnd(2))
        ),
    ],
    finish="tool_calls",
    cached_tokens=3,
    reasoning_tokens=3,
)
HI = Script([Step((Content("Hello"),)), Step((Content("."),))])
EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream: each named as its type, numbered, and as the SDK's types have it."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = [frame.split("\n") for frame in response.text.split("\n\n") if frame]
    happened = [orjson.loads(data.removeprefix("data: ")) for _, data in frames]
    assert [name for name, _ in frames] == [f"event: {event['type']}" for event in happened]
    assert [event["sequence_number"] for event in happened] == list(range(len(happened)))
    for event in happened:
        if event.get("response", {}).get("error") is None:  # whose codes are a closed list there
            EVENT.validate_python(event)
    return happened


def create(server: Served, **fields: Any) -> httpx.Response:
    return server.post("/v1/responses", json={"input": "hi", **fields})


def stream(server: Served, **fields: Any) -> list[dict[str, Any]]:
    return events(create(server, stream=True, **fields))


def without_ids(output: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in item.items() if key not in ("id", "call_id")} for item in output]


def play(server: Served, *happened: Event, **more: Any) -> None:
    server.model.play(Script([Step((event,)) for event in happened], **more))


# --- what comes -----------------------------------------------------------------------------------


def test_events_come_in_the_order_of_the_api(server: Served) -> None:
    server.model.play(CALLING)
    happened = stream(server, tools=TOOLS)
    assert [event["type"].removeprefix("response.") for event in happened] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "custom_tool_call_input.delta",
        "custom_tool_call_input.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    response = happened[-1]["response"]
    assert [event["item"] for event in happened if event["type"].endswith("item.done")] == response["output"]
    ids = [item["id"] for item in response["output"]]
    assert [identity.partition("_")[0] for identity in ids] == ["rs", "msg", "fc", "ctc", "fc"]
    assert len(set(ids)) == len(ids)
    for event in happened:
        if "item_id" in event:
            assert event["item_id"] == ids[event["output_index"]]
    reasoning, message, weather, patch, clock = without_ids(response["output"])
    assert reasoning == {
        "type": "reasoning",
        "status": "completed",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "I must look."}],
    }
    part = {"type": "output_text", "text": "One moment.", "annotations": [], "logprobs": []}
    assert message == {"type": "message", "status": "completed", "role": "assistant", "content": [part]}
    assert (weather["name"], weather["arguments"]) == ("get_weather", '{"city":"Beijing"}')
    assert (patch["type"], patch["input"]) == ("custom_tool_call", "a\nb")
    assert (clock["name"], clock["namespace"], clock["arguments"]) == ("get_time", "clock", "{}")
    calls = [item["call_id"] for item in response["output"][2:]]
    assert all(identity.startswith("call_") for identity in calls)
    assert len(set(calls)) == 3
    assert response["usage"] == {
        "input_tokens": 26,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 23},
        "output_tokens": 12,
        "output_tokens_details": {"reasoning_tokens": 3},
        "total_tokens": 38,
    }
    assert (response["status"], response["model"], response["tools"][1:]) == ("completed", "k2", TOOLS[1:])
    assert server.model.requests[0].response_id == response["id"]


def test_a_whole_response_is_the_sum_of_its_stream(server: Served) -> None:
    server.model.play(CALLING)
    last = stream(server, tools=TOOLS)[-1]["response"]
    whole = create(server, tools=TOOLS).json()
    Response.model_validate(whole)
    own = ("id", "created_at", "completed_at", "output")
    assert {k: v for k, v in whole.items() if k not in own} == {k: v for k, v in last.items() if k not in own}
    assert without_ids(whole["output"]) == without_ids(last["output"])


def test_the_sdk_reads_streams_and_whole_responses_alike(server: Served) -> None:
    server.model.play(CALLING)
    client = server.openai().responses
    whole = client.create(model="k2", input="hi", tools=TOOLS)
    assert whole.output_text == "One moment."
    plain = list(client.create(model="k2", input="hi", tools=TOOLS, stream=True))
    assert plain[-1].type == "response.completed"
    with client.stream(model="k2", input="hi", tools=TOOLS) as streamed:
        texts = [event.delta for event in streamed if event.type == "response.output_text.delta"]
        final = streamed.get_final_response()
    assert "".join(texts) == final.output_text == "One moment."
    assert [item.type for item in final.output] == [item.type for item in whole.output]
    assert final.output[2].arguments == whole.output[2].arguments


def test_the_sdk_parses_structured_output(server: Served) -> None:
    class City(pydantic.BaseModel):
        name: str

    play(server, Content('{"name":'), Content('"Paris"}'))
    client = server.openai().responses
    parsed = client.parse(model="k2", input="hi", text_format=City)
    assert parsed.output_parsed == City(name="Paris")
    with client.stream(model="k2", input="hi", text_format=City) as streamed:
        assert streamed.get_final_response().output_parsed == City(name="Paris")
    assert server.model.requests[0].json_schema["properties"]["name"]["type"] == "string"


def test_text_after_more_reasoning_is_another_item(server: Served) -> None:
    play(server, Content("a"), Reasoning("b"), Content("c"))
    output = stream(server)[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["message", "reasoning", "message"]


def test_what_the_model_garbled_is_told(server: Served) -> None:
    play(server, Content("a"), Malformed("<|x|>", "no call", "invalid_tool_call"), Content("b"))
    expected = {"malformed": [{"text": "<|x|>", "reason": "no call", "code": "invalid_tool_call"}]}
    response = stream(server)[-1]["response"]
    assert response["k2hybrid"] == expected
    assert len(response["output"]) == 1
    assert create(server).json()["k2hybrid"] == expected


def test_log_probabilities_are_of_the_text(server: Served) -> None:
    def step(token: int, *happened: Event) -> Step:
        return Step(happened, TokenLogprob(token, -0.5, ((token, -0.5), (66, float("-inf")))))

    server.model.play(
        Script(
            [
                step(65, Reasoning("A")),
                step(257),
                step(0xC3),
                step(0xA9, Content("é")),
                step(67, Content("C")),
            ]
        )
    )
    happened = stream(server, top_logprobs=2)
    deltas = [event["logprobs"] for event in happened if event["type"] == "response.output_text.delta"]
    assert [[entry["bytes"] for entry in entries] for entries in deltas] == [[[0xC3], [0xA9]], [[67]]]
    assert deltas[1][0]["top_logprobs"][1] == {"token": "B", "logprob": -9999.0, "bytes": [66]}
    (done,) = (event for event in happened if event["type"] == "response.output_text.done")
    (part,) = happened[-1]["response"]["output"][1]["content"]
    assert done["logprobs"] == part["logprobs"] == deltas[0] + deltas[1]


# --- how it ends ----------------------------------------------------------------------------------


def test_a_cut_text_is_incomplete(server: Served) -> None:
    play(server, Reasoning("a"), Content("b"), finish="length")
    happened = stream(server, max_output_tokens=2)
    assert happened[-1]["type"] == "response.incomplete"
    response = happened[-1]["response"]
    assert (response["status"], response["incomplete_details"]) == (
        "incomplete",
        {"reason": "max_output_tokens"},
    )
    assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]
    assert response["usage"]["output_tokens"] == 2
    assert create(server).json()["status"] == "incomplete"


@pytest.mark.parametrize("name", ["get_weather", "apply_patch"])
def test_half_a_call_is_never_done(server: Served, name: str) -> None:
    play(server, ToolCallStart(0, "x", name), ToolCallArguments(0, '{"inp'), finish="length")
    happened = stream(server, tools=TOOLS)
    assert not any(event["type"].endswith(".done") for event in happened)
    assert happened[-1]["response"]["output"][0]["status"] == "incomplete"


@pytest.mark.parametrize("name", ["get_weather", "apply_patch"])
@pytest.mark.parametrize("finish", ["length", "stop"])
def test_a_call_cut_off_is_not_done_when_it_ends(server: Served, name: str, finish: str) -> None:
    reason = "the answer ended inside a tool call"
    happened = (
        ToolCallStart(0, "x", name),
        ToolCallArguments(0, '{"inp'),
        ToolCallEnd(0, cut=True),
        Malformed("", reason, "invalid_tool_call"),
    )
    play(server, *happened, finish=finish)
    streamed = stream(server, tools=TOOLS)
    assert not any(event["type"].endswith(".done") for event in streamed)
    response = streamed[-1]["response"]
    assert response["output"][0]["status"] == "incomplete"
    assert response["k2hybrid"]["malformed"][0]["reason"] == reason
    assert without_ids(create(server, tools=TOOLS).json()["output"]) == without_ids(response["output"])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineError("stopped"), "server_error"),
        (CapacityError("full"), "rate_limit_exceeded"),
        (ContextLengthError("long"), "context_length_exceeded"),
        (ZeroDivisionError("secret"), "server_error"),
    ],
)
def test_a_failure_on_the_way_is_an_event(server: Served, error: Exception, code: str) -> None:
    server.model.play(Script([Step((Content("a"),)), Step(error=error)]))
    happened = stream(server)
    assert happened[-1]["type"] == "response.failed"
    response = happened[-1]["response"]
    assert (response["status"], response["error"]["code"]) == ("failed", code)
    assert response["error"]["message"]
    assert "secret" not in response["error"]["message"]
    assert response["output"][0]["status"] == "incomplete"


def test_a_failure_before_anything_is_an_error_body(server: Served) -> None:
    for more in ({}, {"stream": True}):
        response = create(server, input="x" * 9999, **more)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai().responses.create(model="k2", input="hi", previous_response_id="resp_x")
    assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")


def test_long_silences_are_filled_with_events(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.02)
    server.model.play(Script([Step((Content("a"),), delay_s=0.2), Step((Content("b"),))]))
    happened = stream(server)
    kinds = [event["type"] for event in happened]
    assert kinds.count("response.in_progress") > 2
    assert kinds[-1] == "response.completed"
    server.model.play(Script([Step((Content("a"),), delay_s=0.2)]))
    with server.openai().responses.stream(model="k2", input="hi") as streamed:
        assert streamed.get_final_response().output_text == "a"
    server.model.play(Script([Step((Content("a"),), delay_s=0.2)]))
    assert server.openai().responses.create(model="k2", input="hi").output_text == "a"


def test_what_may_come_often_is_small(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.02)
    progress = [Step(progress=PromptProgress(9, 1, n, 2.5)) for n in range(2, 9)]
    server.model.play(Script([*progress, Step((Content("a"),), delay_s=0.2)]))
    large = {"type": "function", "name": "f", "description": "d" * 5000, "parameters": {"type": "object"}}
    fields = {"tools": [large], "instructions": "i" * 1000, "metadata": {"a": "b" * 5000}}
    happened = stream(server, return_progress=True, **fields)
    sizes = [len(orjson.dumps(event)) for event in happened if event["type"] == "response.in_progress"]
    assert sizes[0] > 10_000
    assert len(sizes) > 9
    assert max(sizes[1:]) < 500
    assert happened[-1]["response"]["tools"][0]["description"] == large["description"]


def test_the_prefill_is_told_to_who_asks(server: Served) -> None:
    server.model.play(Script([Step(progress=PromptProgress(9, 1, 4, 2.5)), Step((Content("a"),))]))
    told = [e["prompt_progress"] for e in stream(server, return_progress=True) if "prompt_progress" in e]
    assert told == [{"total": 9, "cache": 1, "processed": 4, "time_ms": 2}]
    assert server.model.requests[0].progress


# --- what comes next ------------------------------------------------------------------------------


def test_an_agent_without_state_gets_its_reasoning_back(server: Served) -> None:
    """As Codex goes about it: it keeps what came in `output_item.done`, but ids and plain reasoning."""
    server.model.play(CALLING)
    codex: dict[str, Any] = {
        "model": "k2",
        "instructions": "You are a coding agent.",
        "tools": TOOLS,
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0199",
        "client_metadata": {"x-codex-installation-id": "0199"},
        "text": {"verbosity": "low"},
    }
    given = [
        {
            "type": "message",
            "role": "developer",
            "content": [{"type": "input_text", "text": "<permissions>"}],
        },
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Do it."}]},
    ]
    happened = stream(server, **codex, input=given)
    done = [dict(event["item"]) for event in happened if event["type"] == "response.output_item.done"]
    assert Unsealing().text(done[0]["encrypted_content"]) == "I must look."
    for item in done:
        del item["id"]
        if item["type"] == "reasoning":
            del item["content"]
    results = [
        {"type": "function_call_output", "call_id": done[2]["call_id"], "output": "12 °C"},
        {"type": "custom_tool_call_output", "call_id": done[3]["call_id"], "output": "Done."},
        {
            "type": "function_call_output",
            "call_id": done[4]["call_id"],
            "output": [{"type": "input_text", "text": "5"}],
        },
    ]
    stream(server, **codex, input=[*given, *done, *results])
    request = server.model.requests[1]
    assert not request.store
    assert not request.parallel_tool_calls
    assert [tool["function"]["name"] for tool in request.tools] == ["get_weather", "apply_patch", "get_time"]
    assert [message.role for message in request.messages] == [
        "system",
        "system",
        "user",
        "assistant",
        *["tool"] * 3,
    ]
    ids = [item["call_id"] for item in done[2:]]
    assert request.messages[3] == Message(
        "assistant",
        "One moment.",
        reasoning="I must look.",
        tool_calls=(
            ToolCall(ids[0], "get_weather", '{"city":"Beijing"}'),
            ToolCall(ids[1], "apply_patch", '{"input":"a\\nb"}'),
            ToolCall(ids[2], "get_time", "{}"),
        ),
        response_id=happened[-1]["response"]["id"],
    )
    assert [message.tool_call_id for message in request.messages[4:]] == ids
    # And nothing of it is kept.
    assert server.post(f"/v1/responses/{happened[-1]['response']['id']}/cancel", json={}).status_code == 404


def test_a_client_that_gives_whole_items_back_is_understood(server: Served) -> None:
    server.model.play(CALLING)
    client = server.openai().responses
    first = client.create(model="k2", input="hi", tools=TOOLS)
    history = [{"role": "user", "content": "hi"}, *(item.to_dict() for item in first.output)]
    history.append({"type": "function_call_output", "call_id": first.output[2].call_id, "output": "12 °C"})
    client.create(model="k2", input=history, tools=TOOLS)
    said = server.model.requests[1].messages[1]
    assert (said.reasoning, said.content, len(said.tool_calls)) == ("I must look.", "One moment.", 3)
    assert said.response_id == first.id


def test_a_response_is_gone_on_from(server: Served) -> None:
    client = server.openai().responses
    first = client.create(model="k2", input="hi", instructions="Old.", metadata={"a": "b"})
    assert first.metadata == {"a": "b"}
    server.model.play_next(CALLING)
    with client.stream(model="k2", input="And?", previous_response_id=first.id, tools=TOOLS) as streamed:
        second = streamed.get_final_response()
    server.model.play_next(HI)
    result = {"type": "function_call_output", "call_id": second.output[2].call_id, "output": "12 °C"}
    third = client.create(model="k2", input=[result], previous_response_id=second.id, instructions="New.")
    messages = server.model.requests[2].messages
    assert [message.role for message in messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
        "tool",
    ]
    assert messages[0].content == "New."
    assert messages[4].reasoning == "I must look."
    assert [messages[2].response_id, messages[4].response_id] == [first.id, second.id]
    assert third.previous_response_id == second.id
    # Kept as it went out.
    assert client.retrieve(third.id).to_dict() == third.to_dict()
    listed = client.input_items.list(third.id, order="asc")
    assert [item.type for item in listed.data][:3] == ["message", "message", "message"]
    page = client.input_items.list(third.id, limit=2, after=listed.data[-1].id)
    assert [item.id for item in page.data] == [item.id for item in listed.data[-3:-1]][::-1]
    assert page.has_more
    client.delete(third.id)
    with pytest.raises(openai.NotFoundError):
        client.retrieve(third.id)


def test_what_is_not_to_be_stored_is_not(server: Served) -> None:
    client = server.openai().responses
    response = client.create(model="k2", input="hi", store=False)
    assert not server.model.requests[0].store
    for call in (client.retrieve, client.delete, client.input_items.list, client.cancel):
        with pytest.raises(openai.NotFoundError) as caught:
            call(response.id)
        assert caught.value.code == "response_not_found"


def test_only_background_responses_can_be_cancelled(server: Served) -> None:
    client = server.openai().responses
    response = client.create(model="k2", input="hi")
    with pytest.raises(openai.BadRequestError):
        client.cancel(response.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.create(model="k2", input="hi", background=True)
    assert caught.value.param == "background"


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "after=msg_x"])
def test_a_wrong_page_is_refused(server: Served, query: str) -> None:
    identity = create(server).json()["id"]
    response = httpx.get(f"{server.url}/v1/responses/{identity}/input_items?{query}", timeout=20)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == query.partition("=")[0]


def test_keys_do_not_see_each_others_responses() -> None:
    with serving(ScriptedModel(HI), Settings(api_keys=("one", "two"))) as served:
        one, two = (served.openai(api_key=key) for key in ("one", "two"))
        response = one.responses.create(model="k2", input="hi")
        assert one.responses.retrieve(response.id).id == response.id
        with pytest.raises(openai.NotFoundError):
            two.responses.retrieve(response.id)
        with pytest.raises(openai.BadRequestError):
            two.responses.create(model="k2", input="hi", previous_response_id=response.id)


def test_input_tokens_are_counted(server: Served) -> None:
    counted = server.openai().responses.input_tokens.count(
        model="k2", input="hi", instructions="x", tools=TOOLS
    )
    assert counted.object == "response.input_tokens"
    server.openai().responses.create(model="k2", input="hi", instructions="x", tools=TOOLS)
    assert counted.input_tokens == server.model.runs[0].prompt_tokens
    assert len(server.model.runs) == 1


def test_a_retry_gets_the_whole_answer_and_costs_the_rest(server: Served) -> None:
    steps = [Step((Content("a"),)), Step((Content("b"),), delay_s=3600)]
    server.model.play(Script(steps))
    body = {"input": "hi", "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/responses", json=body, timeout=20) as response:
        assert any("output_text.delta" in line for line in response.iter_lines())
    assert server.model.runs[0].cancelled.wait(10)
    steps[1].delay_s = 0
    (item,) = events(server.post("/v1/responses", json=body))[-1]["response"]["output"]
    assert item["content"][0]["text"] == "ab"
    assert [run.generated for run in server.model.runs] == [1, 1]
