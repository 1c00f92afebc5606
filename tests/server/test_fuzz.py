"""Whatever JSON comes: it parses, or is a RequestError that names a field; never anything else."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2hybrid.errors import RequestError
from k2hybrid.server.app import create_app
from k2hybrid.server.body import parse_object
from k2hybrid.server.chat_request import parse_chat
from k2hybrid.server.openapi import description
from k2hybrid.types import Content
from tests.server.scripted import Script, ScriptedModel, Step

KEYS = (
    "messages role content name reasoning_content reasoning tool_calls tool_call_id partial id type "
    "function arguments text parameters description tools tool_choice temperature top_p top_k min_p seed "
    "stop max_tokens n stream max_completion_tokens presence_penalty frequency_penalty repetition_penalty "
    "logit_bias logprobs top_logprobs stream_options include_usage response_format prompt tokens "
    "return_token_strs add_generation_prompt model functions function_call thinking budget_tokens reasoning "
    "effort chat_template_kwargs input instructions call_id output previous_response_id include system "
    "max_output_tokens stop_sequences input_schema tool_use_id signature source echo best_of special suffix"
).split()
WORDS = [
    "user",
    "assistant",
    "tool",
    "system",
    "text",
    "function",
    "auto",
    "required",
    "none",
    "json_object",
    "5",
    "",
]

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
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(WORDS[:4])}, optional={"content": values, "tool_calls": values}
    ),
    min_size=1,
    max_size=3,
)
bodies = st.dictionaries(st.sampled_from(KEYS), values, max_size=6) | st.fixed_dictionaries(
    {"messages": messages}, optional={key: values for key in KEYS if key != "messages"}
)


@given(bodies)
@settings(max_examples=100, deadline=None)
def test_any_body_parses_or_is_refused_by_name(body: dict[str, Any]) -> None:
    with contextlib.suppress(RequestError):
        call = parse_chat(body)
        assert call.request.messages
        assert 1 <= call.choices <= 8


@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_an_object_or_refused(data: bytes) -> None:
    with contextlib.suppress(RequestError):
        assert isinstance(parse_object(data), dict)


JSON = {"content-type": "application/json"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
USER = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
HISTORY = [
    {"role": "developer", "content": "x", "tools": [TOOL]},
    USER,
    {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": [{"type": "image_url"}]},
]
SAMPLED = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 1, "stop": ["x"], "logit_bias": {"5": 1}}
CHAT = {
    **SAMPLED,
    "messages": HISTORY,
    "tools": [TOOL],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
    "reasoning": {"effort": "low", "exclude": True},
    "max_tokens": 5,
    "n": 2,
    "logprobs": True,
    "top_logprobs": 2,
    "stream": True,
    "stream_options": {"include_usage": True},
}
BLOCKS = [
    {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}},
    {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "y"}], "is_error": True},
]
ANTHROPIC = {
    **SAMPLED,
    "max_tokens": 5,
    "system": [{"type": "text", "text": "s"}],
    "messages": [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
            ],
        },
        {"role": "user", "content": BLOCKS},
    ],
    "tools": [{"name": "f", "input_schema": {"type": "object"}}],
    "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 5},
    "output_config": {"effort": "low"},
    "stop_sequences": ["x"],
}
RESPONSES = {
    **SAMPLED,
    "instructions": "be brief",
    "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}], "encrypted_content": "x"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "y"},
    ],
    "tools": [{"type": "function", "name": "f", "parameters": {}}, {"type": "web_search"}],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
    "reasoning": {"effort": "low", "summary": "auto"},
    "text": {"format": {"type": "json_schema", "schema": {"type": "object"}}},
    "include": ["reasoning.encrypted_content"],
    "max_output_tokens": 5,
    "metadata": {"a": "b"},
}
COMPLETION = {**SAMPLED, "prompt": ["x", [5, 6]], "max_tokens": 5, "n": 2, "logprobs": 2, "stream": True}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/messages": ANTHROPIC,
    "/v1/messages/count_tokens": ANTHROPIC,
    "/v1/responses": RESPONSES,
    "/v1/responses/input_tokens": RESPONSES,
    "/tokenize": {"messages": HISTORY, "tools": [TOOL], "return_token_strs": True},
    "/detokenize": {"tokens": [5, 6]},
}


def mutated(value: Any) -> st.SearchStrategy[Any]:
    """`value` with something somewhere in it replaced, left out or added."""
    options = [values]
    if isinstance(value, dict) and value:
        keys = st.sampled_from(sorted(value))
        options += [
            keys.flatmap(lambda key: mutated(value[key]).map(lambda new: {**value, key: new})),
            keys.map(lambda key: {name: value[name] for name in value if name != key}),
            st.tuples(st.sampled_from(KEYS), values).map(lambda new: {**value, new[0]: new[1]}),
        ]
    elif isinstance(value, list) and value:
        places = st.integers(0, len(value) - 1)
        options += [
            places.flatmap(lambda i: mutated(value[i]).map(lambda new: [*value[:i], new, *value[i + 1 :]])),
            places.map(lambda i: value[:i] + value[i + 1 :]),
            places.map(lambda i: [*value, value[i]]),
        ]
    return st.one_of(options[::-1])


def test_the_bodies_that_are_mutated_are_right_themselves() -> None:
    assert set(asyncio.run(post_all(list(BODIES.items())))) == {200}


def test_no_endpoint_with_a_body_is_left_out() -> None:
    posts = {
        path for path, methods in description()["paths"].items() if "requestBody" in methods.get("post", {})
    }
    assert posts == set(BODIES)


async def post_all(requests: list[tuple[str, Any]]) -> list[int]:
    """All at once, beside an answer that was begun before them and must end as if it were alone."""
    app = create_app(ScriptedModel(Script([Step((Content("ok"),))])))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        beside = asyncio.ensure_future(client.post("/v1/chat/completions", json={"messages": [USER]}))
        answers = await asyncio.gather(
            *(client.post(path, content=json.dumps(body), headers=JSON) for path, body in requests)
        )
        assert (await beside).json()["choices"][0]["message"]["content"] == "ok"
    return [answer.status_code for answer in answers]


@pytest.mark.parametrize("path", BODIES)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_no_mutation_makes_a_500(path: str, data: st.DataObject) -> None:
    bodies = data.draw(st.lists(mutated(BODIES[path]), min_size=1, max_size=4))
    assert set(asyncio.run(post_all([(path, body) for body in bodies]))) <= {200, 400}


@given(st.lists(st.tuples(st.sampled_from(sorted(BODIES)), bodies), max_size=5))
@settings(max_examples=20, deadline=None)
def test_no_body_makes_a_500(requests: list[tuple[str, dict[str, Any]]]) -> None:
    assert set(asyncio.run(post_all(requests))) <= {200, 400}


@given(
    st.lists(st.tuples(st.sampled_from(sorted(BODIES)), bodies), max_size=3),
    st.sampled_from(["", "text/plain", "application/json", "application/json; charset=latin-1"]),
    st.binary(max_size=40),
)
@settings(max_examples=20, deadline=None)
def test_no_bytes_make_a_500(requests: list[tuple[str, Any]], kind: str, data: bytes) -> None:
    app = create_app(ScriptedModel(Script([Step((Content("ok"),))])))

    async def post_raw() -> set[int]:
        transport = httpx.ASGITransport(app)
        headers = {"content-type": kind} if kind else {}
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return {
                (await client.post(path, content=data, headers=headers)).status_code for path, _ in requests
            }

    assert asyncio.run(post_raw()) <= {400, 415}
