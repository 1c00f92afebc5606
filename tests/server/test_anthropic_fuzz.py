"""Whatever JSON comes to the messages endpoints: it is answered, or refused by the name of a field."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import httpx
from hypothesis import given, settings
from hypothesis import strategies as st

from k2hybrid.errors import RequestError
from k2hybrid.server.app import create_app
from k2hybrid.server.messages_request import parse_messages
from k2hybrid.types import Content, Reasoning, ToolCallArguments, ToolCallEnd, ToolCallStart
from tests.server.scripted import Script, ScriptedModel, Step

KEYS = (
    "messages role content system type text thinking signature data id name input tool_use_id is_error "
    "source title context tools input_schema description tool_choice disable_parallel_tool_use max_tokens "
    "stream temperature top_p top_k stop_sequences budget_tokens display output_config effort format schema "
    "thinking_budget cache_prompt store seed"
).split()
WORDS = (
    "user assistant system text thinking redacted_thinking tool_use tool_result image document search_result "
    "tool_reference server_tool_use web_search_tool_result base64 custom auto any tool none enabled omitted "
    "json_schema low"
).split()

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
blocks = st.fixed_dictionaries(
    {"type": st.sampled_from(WORDS)},
    optional=dict.fromkeys("text thinking signature data name input content source title".split(), values),
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(WORDS[:3]), "content": st.text(max_size=5) | st.lists(blocks, max_size=3)}
    ),
    min_size=1,
    max_size=3,
)
bodies = st.dictionaries(st.sampled_from(KEYS), values, max_size=6) | st.fixed_dictionaries(
    {"messages": messages, "max_tokens": st.integers(1, 99)},
    optional={key: values for key in KEYS if key not in ("messages", "max_tokens")},
)


@given(bodies)
@settings(max_examples=150, deadline=None)
def test_any_body_parses_or_is_refused_by_name(body: dict[str, Any]) -> None:
    with contextlib.suppress(RequestError):
        call = parse_messages(body)
        assert call.request.messages
        assert all(isinstance(message.content, str) for message in call.request.messages)


@given(
    st.lists(st.tuples(st.sampled_from(["/v1/messages", "/v1/messages/count_tokens"]), bodies), max_size=5)
)
@settings(max_examples=10, deadline=None)
def test_no_body_makes_a_500(requests: list[tuple[str, dict[str, Any]]]) -> None:
    calling = (ToolCallStart(0, "functions.f:0", "f"), ToolCallArguments(0, "{"), ToolCallEnd(0))
    app = create_app(ScriptedModel(Script([Step((Reasoning("hm"), Content("ok"))), Step(calling)])))

    async def post_all() -> list[int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [(await client.post(path, json=body)).status_code for path, body in requests]

    assert set(asyncio.run(post_all())) <= {200, 400}
