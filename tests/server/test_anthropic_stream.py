"""Messages as `anthropic` reads them and as they are on the wire."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import orjson
import pytest

from k2hybrid.errors import CapacityError, ContextLengthError, EngineError, ExpertReadError
from k2hybrid.server import sse
from k2hybrid.server.app import Settings
from k2hybrid.server.body import MAX_BODY_BYTES
from k2hybrid.server.failures import ShuttingDownError
from k2hybrid.server.live import LiveRuns
from k2hybrid.types import (
    Content,
    Malformed,
    Message,
    Reasoning,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from tests.server.conftest import Served, serving
from tests.server.scripted import Script, ScriptedModel, Step

HI = {"role": "user", "content": "hi"}
JSON = {"content-type": "application/json"}
THINKING = {"type": "adaptive"}
OMITTED = {"type": "adaptive", "display": "omitted"}
CALLING = Script(
    [
        Step((Reasoning("I must "),)),
        Step(()),
        Step((Reasoning("look."),)),
        Step((Content("One "),)),
        Step((Content("moment."),)),
        Step((ToolCallStart(0, "functions.get_weather:3", "get_weather"),)),
        Step((ToolCallArguments(0, '{"city"'),)),
        Step((ToolCallArguments(0, ':"Rome"}'), ToolCallEnd(0))),
        Step((ToolCallStart(1, "functions.now:4", "now"), ToolCallArguments(1, "{}"), ToolCallEnd(1))),
    ],
    finish="tool_calls",
    cached_tokens=3,
    reasoning_tokens=3,
)


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    """What the SDK warns of while it reads is wrong on the wire."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def client_of(served: Served, **options: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(
        **{"base_url": served.url, "api_key": "any", "max_retries": 0, "timeout": 20.0, **options}
    )


@pytest.fixture
def client(server: Served) -> Iterator[anthropic.Anthropic]:
    with client_of(server) as client:
        yield client


def create(client: anthropic.Anthropic, **fields: Any) -> Any:
    return client.messages.create(**{"model": "m", "max_tokens": 64, "messages": [HI], **fields})


def streamed(client: anthropic.Anthropic, **fields: Any) -> Any:
    """The message that the SDK adds up from a stream."""
    with client.messages.stream(**{"model": "m", "max_tokens": 64, "messages": [HI], **fields}) as stream:
        for _ in stream:
            pass
        return stream.get_final_message()


def post(server: Served, **fields: Any) -> httpx.Response:
    return server.post(
        "/v1/messages?beta=true", json={"model": "m", "max_tokens": 64, "messages": [HI], **fields}
    )


def frames(response: httpx.Response) -> list[dict[str, Any]]:
    """The stream's frames; each has its `event:` line, and it says what the data says."""
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for frame in response.text.strip().split("\n\n"):
        event, data = frame.split("\n")
        found.append(orjson.loads(data.removeprefix("data: ")))
        assert event == f"event: {found[-1]['type']}"
    return found


def without_ids(message: Any) -> dict[str, Any]:
    """What streaming or not must not change; what the SDK itself adds to a stream's sum aside."""
    said = message.to_dict()
    assert said.pop("stop_details", None) is None
    assert said.pop("id").startswith("msg_")
    for block in said["content"]:
        block.pop("parsed_output", None)
        if block["type"] == "tool_use":
            assert re.fullmatch("toolu_[A-Za-z0-9_-]+", block.pop("id"))
    return said


# --- streams --------------------------------------------------------------------------------------


def test_events_come_in_the_order_clients_rely_on(server: Served) -> None:
    server.model.play(CALLING)
    start, *middle, ending, stop = frames(post(server, stream=True, thinking=THINKING))
    message = start["message"]
    assert message.pop("id").startswith("msg_")
    assert message == {
        "type": "message",
        "role": "assistant",
        "model": "k2",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {
            "input_tokens": 18,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 0,
        },
    }
    ids = [block["content_block"].pop("id") for block in middle if "id" in block.get("content_block", {})]
    assert len(set(ids)) == 2
    signature = middle[4]["delta"].pop("signature")
    assert signature

    def started(index: int, **block: Any) -> dict[str, Any]:
        return {"type": "content_block_start", "index": index, "content_block": block}

    def delta(index: int, kind: str, **more: Any) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": index, "delta": {"type": kind, **more}}

    def stopped(index: int) -> dict[str, Any]:
        return {"type": "content_block_stop", "index": index}

    assert middle == [
        {"type": "ping"},
        started(0, type="thinking", thinking="", signature=""),
        delta(0, "thinking_delta", thinking="I must "),
        delta(0, "thinking_delta", thinking="look."),
        delta(0, "signature_delta"),
        stopped(0),
        started(1, type="text", text=""),
        delta(1, "text_delta", text="One "),
        delta(1, "text_delta", text="moment."),
        stopped(1),
        started(2, type="tool_use", name="get_weather", input={}),
        delta(2, "input_json_delta", partial_json='{"city"'),
        delta(2, "input_json_delta", partial_json=':"Rome"}'),
        stopped(2),
        started(3, type="tool_use", name="now", input={}),
        delta(3, "input_json_delta", partial_json="{}"),
        stopped(3),
    ]
    assert ending == {
        "type": "message_delta",
        "delta": {"stop_reason": "tool_use", "stop_sequence": None},
        "usage": {
            "input_tokens": 15,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 3,
            "output_tokens": 9,
            "output_tokens_details": {"thinking_tokens": 3},
        },
    }
    assert stop == {"type": "message_stop"}


@pytest.mark.parametrize("thinking", [None, THINKING, OMITTED, {"type": "disabled"}])
def test_streamed_and_whole_say_the_same(
    server: Served, client: anthropic.Anthropic, thinking: dict[str, Any] | None
) -> None:
    server.model.play(CALLING)
    fields = {"thinking": thinking} if thinking else {}
    whole, sum_of_stream = create(client, **fields), streamed(client, **fields)
    assert without_ids(whole) == without_ids(sum_of_stream)
    *_, text, weather, now = whole.content
    assert text.text == "One moment."
    assert (weather.name, weather.input) == ("get_weather", {"city": "Rome"})
    assert (now.name, now.input) == ("now", {})
    assert whole.stop_reason == "tool_use"
    assert [block.type for block in whole.content[:-3]] == (
        ["thinking"] if thinking in (THINKING, OMITTED) else []
    )
    # Not shown does not mean not thought, unless it was asked for.
    wanted = thinking != {"type": "disabled"}
    assert all(request.thinking is wanted for request in server.model.requests)


@pytest.mark.parametrize("thinking", [THINKING, OMITTED])
def test_what_comes_back_is_what_went_out(
    server: Served, client: anthropic.Anthropic, thinking: dict[str, Any]
) -> None:
    server.model.play(CALLING)
    answer = streamed(client, thinking=thinking)
    assert answer.content[0].thinking == ("I must look." if thinking is THINKING else "")
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": block.name}
        for block in answer.content
        if block.type == "tool_use"
    ]
    create(client, thinking=thinking, messages=[HI, answer.to_param(), {"role": "user", "content": results}])
    asked, said, *returned = server.model.requests[-1].messages
    assert asked == Message("user", "hi")
    assert (said.reasoning, said.content) == ("I must look.", "One moment.")
    assert [(call.name, call.arguments) for call in said.tool_calls] == [
        ("get_weather", '{"city":"Rome"}'),
        ("now", "{}"),
    ]
    assert [(m.role, m.tool_call_id, m.content) for m in returned] == [
        ("tool", call.id, call.name) for call in said.tool_calls
    ]


def test_hidden_reasoning_does_not_divide_a_text(server: Served, client: anthropic.Anthropic) -> None:
    server.model.play(Script([Step((Content("a"), Reasoning("hm"), Content("b")))]))
    assert [block.text for block in create(client).content] == ["ab"]
    kinds = [block.type for block in streamed(client, thinking=THINKING).content]
    assert kinds == ["text", "thinking", "text"]


def test_calls_that_follow_one_another_unclosed_are_two_blocks(
    server: Served, client: anthropic.Anthropic
) -> None:
    server.model.play(
        Script([Step((ToolCallStart(0, "functions.f:0", "f"), ToolCallStart(1, "functions.g:1", "g")))])
    )
    assert without_ids(create(client)) == without_ids(streamed(client))
    assert [(block.name, block.input) for block in create(client).content] == [("f", {}), ("g", {})]


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_parsed_reaches_the_client(server: Served, stream: bool) -> None:
    events = (
        Content("x"),
        Malformed("<junk>", "no such tool"),
        Content("y"),
        ToolCallStart(0, "functions.f:0", "f"),
        ToolCallArguments(0, "[1]"),
        ToolCallEnd(0),
        Malformed("", "it never ended", "invalid_tool_call"),
    )
    server.model.play(Script([Step(events)]))
    response = post(server, stream=stream)
    holder = frames(response)[-2] if stream else response.json()
    assert holder["k2hybrid"] == {
        "malformed": [
            {"text": "<junk>", "reason": "no such tool", "code": "malformed"},
            {
                "text": "[1]",
                "reason": "the arguments of a call are not a JSON object",
                "code": "invalid_tool_call",
            },
            {"text": "", "reason": "it never ended", "code": "invalid_tool_call"},
        ]
    }
    if not stream:
        assert [block["type"] for block in holder["content"]] == ["text", "tool_use"]
        assert (holder["content"][0]["text"], holder["content"][1]["input"]) == ("xy", {})


@pytest.mark.parametrize(
    "arguments",
    ['{"a": 1e999}', '{"a": ' + "[" * 500 + "]" * 500 + "}", '{"a": 123456789012345678901, "b": "\\ud800"}'],
)
def test_arguments_are_the_same_to_the_letter_streamed_or_whole(server: Served, arguments: str) -> None:
    events = (ToolCallStart(0, "functions.f:0", "f"), ToolCallArguments(0, arguments), ToolCallEnd(0))
    server.model.play(Script([Step(events)], finish="tool_calls"))
    response = post(server)
    assert f'"input":{arguments}' in response.text
    assert "k2hybrid" not in response.json()
    streamed = frames(post(server, stream=True))
    deltas = [frame["delta"] for frame in streamed if frame["type"] == "content_block_delta"]
    assert deltas == [{"type": "input_json_delta", "partial_json": arguments}]
    assert "k2hybrid" not in streamed[-2]


@pytest.mark.parametrize("arguments", ['{"a": NaN}', '{"a": ' + "[" * 9999 + "]" * 9999 + "}", '{"a": 1'])
@pytest.mark.parametrize("stream", [False, True])
def test_what_no_object_can_be_made_of_is_told(server: Served, arguments: str, stream: bool) -> None:
    cut = ToolCallEnd(0, cut=True)
    server.model.play(
        Script(
            [Step((ToolCallStart(0, "functions.f:0", "f"), ToolCallArguments(0, arguments), cut))],
            finish="length",
        )
    )
    response = post(server, stream=stream)
    holder = frames(response)[-2] if stream else response.json()
    assert [entry["text"] for entry in holder["k2hybrid"]["malformed"]] == [arguments]
    assert holder.get("delta", holder)["stop_reason"] == "max_tokens"
    assert stream or holder["content"][0]["input"] == {}


def test_an_answer_may_be_empty(server: Served, client: anthropic.Anthropic) -> None:
    server.model.play(Script([Step((Malformed("<junk>", "no such tool"),))]))
    for message in (create(client), streamed(client)):
        assert message.content == []
        assert message.stop_reason == "end_turn"


@pytest.mark.parametrize(
    ("script", "reason", "sequence"),
    [
        (Script([Step((Content("a"),))]), "end_turn", None),
        (Script([Step((Content("a"),))], stop_sequence="END"), "stop_sequence", "END"),
        (Script([Step((Content("a"),))], finish="length"), "max_tokens", None),
        (
            Script([Step((Content("a"),))], finish="length", max_tokens=63),
            "model_context_window_exceeded",
            None,
        ),
        (Script([Step((Content("a"),))], finish="tool_calls"), "tool_use", None),
    ],
)
def test_stop_reasons(
    server: Served, client: anthropic.Anthropic, script: Script, reason: str, sequence: str | None
) -> None:
    server.model.play(script)
    for message in (create(client, stop_sequences=["END"]), streamed(client, stop_sequences=["END"])):
        assert (message.stop_reason, message.stop_sequence) == (reason, sequence)


def test_a_silent_prefill_is_bridged_by_pings(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.05)
    server.model.play(Script([Step((Content("a"),), delay_s=0.3)]))
    kinds = [frame["type"] for frame in frames(post(server, stream=True))]
    assert kinds[:3] == ["message_start", "ping", "ping"]
    assert [kind for kind, _ in itertools.groupby(kinds)][:3] == [
        "message_start",
        "ping",
        "content_block_start",
    ]
    with client_of(server) as client:
        assert streamed(client).content[0].text == "a"


def test_a_silent_whole_answer_is_bridged_by_white_space(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.05)
    server.model.play(Script([Step((Content("a"),), delay_s=0.3)]))
    response = post(server)
    assert response.text.startswith("  ")
    assert response.json()["content"] == [{"type": "text", "text": "a"}]
    server.model.play(Script([Step(delay_s=0.3, error=EngineError("the step failed"))]))
    response = post(server)
    assert response.status_code == 200
    assert response.json() == {
        "type": "error",
        "error": {"type": "api_error", "message": "the step failed"},
        "request_id": response.headers["request-id"],
    }


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "expected", "status", "kind"),
    [
        (ContextLengthError("too long"), anthropic.BadRequestError, 400, "invalid_request_error"),
        (CapacityError("full"), anthropic.RateLimitError, 429, "rate_limit_error"),
        (ShuttingDownError("ending"), anthropic.InternalServerError, 503, "overloaded_error"),
        (EngineError("stopped"), anthropic.InternalServerError, 500, "api_error"),
        (ExpertReadError("disk"), anthropic.InternalServerError, 500, "api_error"),
        (ZeroDivisionError("secret"), anthropic.InternalServerError, 500, "api_error"),
    ],
)
def test_errors_are_typed(
    server: Served,
    client: anthropic.Anthropic,
    error: Exception,
    expected: type[anthropic.APIStatusError],
    status: int,
    kind: str,
) -> None:
    server.model.play(error)
    for attempt in (create, streamed):
        with pytest.raises(expected) as caught:
            attempt(client)
        failure = caught.value
        assert failure.status_code == status
        assert failure.body == {
            "type": "error",
            "error": {"type": kind, "message": failure.body["error"]["message"]},
            "request_id": failure.response.headers["x-request-id"],
        }
        assert failure.request_id == failure.body["request_id"]
        assert "secret" not in str(failure)
        retries = isinstance(error, CapacityError | ShuttingDownError | ExpertReadError)
        assert failure.response.headers.get("x-should-retry") == (None if retries else "false")


def test_an_error_in_the_middle_is_an_event(server: Served, client: anthropic.Anthropic) -> None:
    server.model.play(Script([Step((Content("a"),)), Step(error=EngineError("the step failed"))]))
    response = post(server, stream=True)
    *_, delta, error = frames(response)
    assert delta["delta"] == {"type": "text_delta", "text": "a"}
    assert error == {
        "type": "error",
        "error": {"type": "api_error", "message": "the step failed"},
        "request_id": response.headers["request-id"],
    }
    with pytest.raises(anthropic.APIStatusError, match="the step failed"):
        streamed(client)


def test_a_wrong_field_is_a_bad_request(server: Served, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\]\.role") as caught:
        create(client, messages=[{"role": "nobody", "content": "hi"}])
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    response = server.post("/v1/messages", content=b"{", headers=JSON)
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")
    assert not server.model.requests


def test_what_is_refused_before_any_handler_is_told_in_the_dialect(server: Served) -> None:
    def told(response: httpx.Response) -> tuple[int, str]:
        body = response.json()
        assert body["type"] == "error"
        assert body["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
        assert response.headers["x-should-retry"] == "false"
        return response.status_code, body["error"]["type"]

    assert told(server.post("/v1/messages/batches", json={})) == (404, "not_found_error")
    assert told(httpx.get(f"{server.url}/v1/messages")) == (405, "invalid_request_error")
    elsewhere = {"host": "evil.example"}
    assert told(server.post("/v1/messages", json={}, headers=elsewhere)) == (403, "permission_error")
    large = b" " * (MAX_BODY_BYTES + 1)
    assert told(server.post("/v1/messages", content=large, headers=JSON)) == (413, "request_too_large")
    assert "type" not in server.post("/v1/messages_of_another", json={}).json()


def test_keys_and_draining_are_told_in_the_dialect() -> None:
    live = LiveRuns()
    model = ScriptedModel(Script([Step((Content("ok"),))]))
    with serving(model, Settings(api_keys=("right",)), live) as served:
        with client_of(served) as stranger, pytest.raises(anthropic.AuthenticationError) as refused:
            create(stranger)
        assert refused.value.body["error"]["type"] == "authentication_error"
        with client_of(served, api_key="right") as client:
            assert create(client).content[0].text == "ok"
            live.drain()
            with pytest.raises(anthropic.InternalServerError) as ending:
                create(client)
        assert ending.value.body["error"]["type"] == "overloaded_error"
        assert "x-should-retry" not in ending.value.response.headers


# --- beside the messages --------------------------------------------------------------------------


def test_count_tokens(server: Served, client: anthropic.Anthropic) -> None:
    messages = [HI, {"role": "assistant", "content": "hello"}, HI]
    counted = client.messages.count_tokens(model="m", messages=messages, system="Be kind.")
    whole = create(client, messages=messages, system="Be kind.")
    assert counted.input_tokens == whole.usage.input_tokens > 0
    response = server.post("/v1/messages/count_tokens?beta=true", json={"messages": "hi"})
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


def test_models_in_the_dialect_of_whoever_asks(server: Served, client: anthropic.Anthropic) -> None:
    (only,) = client.models.list()
    assert (only.id, only.display_name, only.type, only.max_input_tokens) == ("k2", "k2", "model", 4096)
    assert only.created_at.tzinfo is not None
    assert client.models.retrieve("any/other").id == "k2"
    page = httpx.get(f"{server.url}/v1/models", headers={"anthropic-version": "2023-06-01"}).json()
    assert {key: page[key] for key in page if key != "data"} == {
        "has_more": False,
        "first_id": "k2",
        "last_id": "k2",
    }
    (entry,) = server.openai().models.list()
    assert (entry.id, entry.object, entry.owned_by) == ("k2", "model", "k2hybrid")


def test_refusals_of_models_are_told_in_the_dialect_of_whoever_asks() -> None:
    theirs = {"anthropic-version": "2023-06-01"}
    with serving(ScriptedModel(Script([])), Settings(api_keys=("right",))) as served:
        url = f"{served.url}/v1/models/k2"
        refused = httpx.get(url, headers=theirs)
        assert (refused.status_code, refused.json()["type"]) == (401, "error")
        assert refused.json()["error"]["type"] == "authentication_error"
        assert refused.json()["request_id"] == refused.headers["request-id"]
        assert httpx.get(url).json()["error"]["code"] == "invalid_api_key"
        elsewhere = httpx.get(f"{served.url}/v1/models", headers={**theirs, "host": "evil.example"})
        assert elsewhere.json()["error"]["type"] == "permission_error"
        wrong = served.post("/v1/models", json={}, headers=theirs)
        assert (wrong.status_code, wrong.json()["type"]) == (405, "error")


def test_the_request_id_comes_under_their_name_too(server: Served, client: anthropic.Anthropic) -> None:
    answer = client.messages.with_raw_response.create(model="m", max_tokens=9, messages=[HI])
    assert answer.headers["request-id"] == answer.headers["x-request-id"] == answer.parse()._request_id
    assert "request-id" not in server.chat().headers
    assert httpx.head(server.url).status_code == 200
