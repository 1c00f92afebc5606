"""Whatever JSON comes: it parses, or is a RequestError that names a field; never anything else."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import httpx
from hypothesis import given, settings
from hypothesis import strategies as st

from k2hybrid.errors import RequestError
from k2hybrid.server.app import create_app
from k2hybrid.server.body import parse_object
from k2hybrid.server.chat_request import parse_chat
from k2hybrid.types import Content
from tests.server.scripted import Script, ScriptedModel, Step

KEYS = (
    "messages role content name reasoning_content reasoning tool_calls tool_call_id partial id type "
    "function arguments text parameters description tools tool_choice temperature top_p top_k min_p seed "
    "stop max_tokens n stream max_completion_tokens presence_penalty frequency_penalty repetition_penalty "
    "logit_bias logprobs top_logprobs stream_options include_usage response_format prompt tokens "
    "return_token_strs add_generation_prompt model"
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


@given(
    st.lists(
        st.tuples(st.sampled_from(["/v1/chat/completions", "/tokenize", "/detokenize"]), bodies), max_size=5
    )
)
@settings(max_examples=10, deadline=None)
def test_no_body_makes_a_500(requests: list[tuple[str, dict[str, Any]]]) -> None:
    app = create_app(ScriptedModel(Script([Step((Content("ok"),))])))

    async def post_all() -> list[int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [(await client.post(path, json=body)).status_code for path, body in requests]

    assert set(asyncio.run(post_all())) <= {200, 400}
