"""Every way a request can be wrong: the status, the field named, and a server that lives on."""

from __future__ import annotations

import http.client
import logging

import httpx
import openai
import orjson
import pytest

from k2hybrid.errors import (
    CapacityError,
    ConfigError,
    EngineError,
    ExpertReadError,
    RequestError,
    TemplateError,
    WeightReadError,
)
from k2hybrid.server.body import MAX_BODY_BYTES, MAX_DEPTH
from k2hybrid.types import Content
from tests.server.conftest import Served
from tests.server.scripted import Script, Step

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": 1, "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "narrator", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [USER, {"role": "user", "content": 5}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}
                ]
            },
            "messages[0].content[1].type",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "hologram"}]}]}, "messages[0].content[0].type"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
            "messages[0].tool_calls[0].function.name",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 3}}]}
                ]
            },
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"messages": [{"role": "user", "content": "x", "partial": True}]}, "messages[0].partial"),
        ({"messages": [{"role": "assistant", "reasoning_content": []}]}, "messages[0].reasoning_content"),
        ({"tools": {}}, "tools"),
        ({"tools": [3]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": [TOOL] * 1025}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tool_choice": "maybe", "tools": [TOOL]}, "tool_choice"),
        ({"tool_choice": 1}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]}, "tool_choice"),
        ({"temperature": "warm"}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"seed": "x"}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_completion_tokens": -5}, "max_completion_tokens"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": []}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logprobs": 3}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", 5]}, "stop[1]"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ["a" * 1001]}, "stop[0]"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "grammar"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": []}}, "response_format.json_schema"),
        ({"parallel_tool_calls": "odd"}, "parallel_tool_calls"),
        ({"functions": [{"name": "a b"}]}, "functions[0].name"),
        ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call"),
        ({"functions": [{"name": "f"}], "function_call": "maybe"}, "function_call"),
        ({"messages": [{**USER, "tools": [{"type": "function"}]}]}, "messages[0].tools[0].function.name"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"reasoning": "high"}, "reasoning"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"reasoning": {"max_tokens": -1}}, "reasoning.max_tokens"),
        ({"reasoning": {"exclude": 1}}, "reasoning.exclude"),
        ({"chat_template_kwargs": {"thinking": "no"}}, "chat_template_kwargs.thinking"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type"),
        ({"thinking_budget": -1}, "thinking_budget"),
        ({"return_progress": "x"}, "return_progress"),
    ],
)
def test_a_wrong_field_is_named(server: Served, fields: dict[str, object], param: str) -> None:
    response = server.chat(**fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert param.partition("[")[0].partition(".")[0] in error["message"]
    assert not server.model.requests


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"   ",
        b"{",
        b"[]",
        b"3",
        b'"x"',
        b"null",
        b'{"messages": NaN}',
        b'{"messages": "\xff\xfe"}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b"[" * 100_000,
        b'{"messages":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}",
        b'{"a":' * 900 + b"1" + b"}" * 900,
        b"\x00" * 10,
    ],
)
def test_a_body_that_is_no_json_object_is_400(server: Served, body: bytes) -> None:
    response = server.post("/v1/chat/completions", content=body, headers=JSON)
    assert response.status_code == 400
    assert response.json()["error"]["code"] in ("invalid_json", "invalid_type")
    assert server.chat().status_code == 200


@pytest.mark.parametrize(
    "kind", ["application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"]
)
def test_json_is_json_however_it_is_spelled(server: Served, kind: str) -> None:
    body = orjson.dumps({"messages": [USER]})
    assert server.post("/v1/chat/completions", content=body, headers={"content-type": kind}).is_success


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "text/plain;application/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonp",
        "x" * 500,
        "",
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
def test_what_a_page_may_send_unasked_is_415(server: Served, path: str, kind: str) -> None:
    body = orjson.dumps({"messages": [USER], "prompt": "x", "tokens": []})
    response = server.post(path, content=body, headers={"content-type": kind} if kind else {})
    assert response.status_code == 415
    assert response.json()["error"]["code"] == "unsupported_media_type"
    assert "Content-Type: application/json" in response.json()["error"]["message"]
    assert response.headers["x-should-retry"] == "false"
    assert not server.model.requests


def test_a_body_over_the_limit_is_413(server: Served) -> None:
    response = server.post("/v1/chat/completions", content=b" " * (MAX_BODY_BYTES + 1), headers=JSON)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert response.headers["x-should-retry"] == "false"


def test_a_chunked_body_over_the_limit_is_413(server: Served) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    chunks = (b" " * (1 << 20) for _ in range((MAX_BODY_BYTES >> 20) + 1))
    connection.request("POST", "/v1/chat/completions", body=chunks, headers=JSON, encode_chunked=True)
    response = connection.getresponse()
    assert response.status == 413
    connection.close()
    assert server.chat().status_code == 200


def test_a_body_just_under_the_limit_is_served(server: Served) -> None:
    padding = "x" * (MAX_BODY_BYTES - 100)
    assert (
        server.post("/v1/chat/completions", json={"messages": [USER], "ignored": padding}).status_code == 200
    )


def test_an_over_long_prompt_says_so_in_openais_words(server: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.openai().chat.completions.create(model="m", messages=[{"role": "user", "content": "x" * 9999}])
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("error", "status", "code", "retry"),
    [
        (RequestError("no", param="x", code="mine"), 400, "mine", "false"),
        (TemplateError("loops"), 500, "template_error", "false"),
        (CapacityError("full"), 429, "capacity_exceeded", None),
        (EngineError("stopped"), 500, "engine_error", "false"),
        (ExpertReadError("disk"), 500, "expert_read_error", None),
        (WeightReadError("disk"), 500, "weight_read_error", None),
        (ConfigError("odd"), 500, "config_error", "false"),
        (ZeroDivisionError("secret prompt"), 500, "internal_error", "false"),
    ],
)
def test_errors_of_the_model_have_their_status(
    server: Served, error: Exception, status: int, code: str, retry: str | None
) -> None:
    server.model.play(error)
    for stream in (True, False):
        response = server.chat(stream=stream)
        assert response.status_code == status
        assert response.json()["error"]["code"] == code
        assert response.headers.get("x-should-retry") == retry
    if status == 429:
        assert int(response.headers["retry-after"]) > 0


def test_an_unexpected_error_is_told_by_its_id_and_logged_without_text(
    server: Served, caplog: pytest.LogCaptureFixture
) -> None:
    server.model.play(ZeroDivisionError("secret prompt"))
    with caplog.at_level(logging.INFO):
        response = server.chat()
    identity = response.headers["x-request-id"]
    assert identity in response.json()["error"]["message"]
    assert "secret" not in response.text
    logged = [record.getMessage() for record in caplog.records if record.name.startswith("k2hybrid")]
    assert any(identity in line and "ZeroDivisionError" in line for line in logged)
    assert "secret" not in caplog.text


def test_unknown_paths_and_methods_answer_in_json(server: Served) -> None:
    response = server.post("/v1/nothing", json={})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"
    response = server.post("/v1/models", json={})
    assert response.status_code == 405
    assert response.json()["error"]["code"] == "method_not_allowed"
    assert "GET" in response.headers["allow"]


def test_prompts_are_not_logged(server: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        for messages in ([{"role": "user", "content": "my secret"}], [{"role": "my secret"}]):
            for more in ({}, {"stream": True}, {"n": "x"}, {"tool_choice": "my secret"}):
                server.chat(messages=messages, **more)
        server.post("/v1/completions", json={"prompt": "my secret"})
        server.post("/v1/completions", json={"prompt": "my secret", "stop": 5, "suffix": "my secret"})
        server.post("/tokenize", json={"prompt": "my secret", "return_token_strs": "my secret"})
        for wrong in ({}, {"top_k": "my secret"}):
            turn = {"messages": [{"role": "user", "content": "my secret"}], "max_tokens": 5}
            server.post("/v1/messages", json={**turn, **wrong})
            server.post("/v1/messages/count_tokens", json={**turn, **wrong})
            server.post("/v1/responses", json={"input": "my secret", **wrong})
        httpx.get(f"{server.url}/v1/responses/my%20secret")
        server.post("/v1/chat/completions", content=b'{"my secret', headers=JSON)
        server.post("/v1/chat/completions", content=b"my secret")
        for error in (EngineError("failed on my secret"), ValueError("my secret")):
            server.model.play(error, Script([Step((Content("my secret"),)), Step(error=error)]))
            for stream in (True, False, True):
                server.chat(stream=stream)
    assert any(record.name == "k2hybrid.server" for record in caplog.records)
    assert "my secret" not in "".join(r.getMessage() for r in caplog.records if r.name.startswith("k2hybrid"))
