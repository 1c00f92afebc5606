"""OpenAI's chat request → ChatRequest. Pure: no model, no I/O.

Accepted as real clients send them: content null, "", absent, a string or parts in every role; the developer
role (→ system); assistant tool calls without content or ids; `reasoning_content` or `reasoning` on input;
`max_tokens` beyond any context (the runtime clamps it). Unknown fields are ignored, a `chat_template` among
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from k2hybrid.errors import RequestError
from k2hybrid.server.chat_tools import parse_tool_choice, parse_tools
from k2hybrid.server.fields import Fields, wrong_type, wrong_value
from k2hybrid.server.parts import parse_content
from k2hybrid.server.sampling import (
    MAX_TOP_LOGPROBS,
    parse_choices,
    parse_limit,
    parse_sampling,
    parse_stop,
)
from k2hybrid.server.thinking import Thinking, of_effort, of_object
from k2hybrid.types import ChatRequest, Message, ToolCall

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}


@dataclass(frozen=True, slots=True)
class ChatCall:
    """A parsed request: what to generate, and how the client wants it sent."""

    request: ChatRequest
    choices: int = 1
    stream: bool = False
    include_usage: bool = False
    show_reasoning: bool = True
    legacy: bool = False  # the client knows `functions` and expects `function_call`


def parse_chat(body: Mapping[str, Any]) -> ChatCall:
    """Parse a `/v1/chat/completions` body; RequestError names the field that is wrong."""
    fields = Fields(body)
    tools = parse_tools(fields)
    choice, tool_name = parse_tool_choice(fields, tools)
    thinking = _thinking(fields)
    stream = fields.flag("stream")
    legacy = bool(fields.array("functions")) and not fields.array("tools")
    request = ChatRequest(
        messages=parse_messages(fields),
        tools=tools,
        tool_choice=choice,
        tool_name=tool_name,
        # `function_call` has room for one.
        parallel_tool_calls=fields.flag("parallel_tool_calls", default=True) and not legacy,
        json_schema=_json_schema(fields),
        constrained=fields.flag("constrain", default=True),
        thinking=thinking.enabled,
        thinking_budget=thinking.budget,
        sampling=parse_sampling(fields, _logprobs(fields)),
        max_tokens=parse_limit(fields, "max_completion_tokens", "max_tokens"),
        stop=parse_stop(body.get("stop")),
        store=fields.flag("store", default=True),
        reuse=fields.flag("cache_prompt", default=True),  # llama.cpp's word for it, as the next one
        progress=fields.flag("return_progress") and stream,
    )
    return ChatCall(
        request=request,
        choices=parse_choices(fields),
        stream=stream,
        include_usage=stream and fields.child("stream_options").flag("include_usage"),
        show_reasoning=not fields.child("reasoning").flag("exclude"),
        legacy=legacy,
    )


# --- messages -------------------------------------------------------------------------------------


def parse_messages(fields: Fields) -> tuple[Message, ...]:
    """The `messages` of a request: at least one."""
    entries = fields.objects("messages")
    if not entries:
        raise RequestError(
            "messages must hold at least one message", param="messages", code="missing_required"
        )
    last = len(entries) - 1
    asked = max((i for i, entry in enumerate(entries) if entry.value.get("role") == "user"), default=-1)
    return tuple(_message(entry, last=i == last, newest=i == asked) for i, entry in enumerate(entries))


def _message(fields: Fields, *, last: bool, newest: bool) -> Message:
    """`newest`: of the user's messages."""
    role = fields.required_text("role")
    if role not in ROLES:
        raise wrong_value(fields.name("role"), f"{role[:40]!r} is unknown; one of {', '.join(ROLES)}")
    partial = fields.flag("partial")
    if partial and role != "assistant":
        raise wrong_value(fields.name("partial"), "is for assistant messages")
    assistant = role == "assistant"
    return Message(
        role=ROLES[role],
        content=parse_content(fields, refuse_media=newest),
        name=fields.text("name"),
        response_id=_response_id(fields) if assistant else None,
        reasoning=(fields.text("reasoning_content") or fields.text("reasoning")) if assistant else None,
        tool_calls=_tool_calls(fields) if assistant else (),
        tool_call_id=fields.text("tool_call_id"),
        partial=partial and last,  # an earlier one was continued already: clients send their history back
    )


def _response_id(fields: Fields) -> str | None:
    """What some clients keep with a message. It only helps to find the answer again, so any other is none."""
    value = fields.value.get("id")
    return value if isinstance(value, str) and value else None


def _tool_calls(fields: Fields) -> tuple[ToolCall, ...]:
    calls = [_tool_call(call.child("function"), call.text("id")) for call in fields.objects("tool_calls")]
    if not calls and fields.value.get("function_call") is not None:
        calls = [_tool_call(fields.child("function_call"), None)]
    return tuple(calls)


def _tool_call(function: Fields, id: str | None) -> ToolCall:
    arguments = function.value.get("arguments")
    if arguments is None:
        arguments = "{}"
    elif isinstance(arguments, dict):
        arguments = orjson.dumps(arguments).decode()
    elif not isinstance(arguments, str):
        raise wrong_type(function.name("arguments"), "a string of JSON", arguments)
    return ToolCall(id=id or "", name=function.required_text("name"), arguments=arguments)


# --- the answer -----------------------------------------------------------------------------------


def _json_schema(fields: Fields) -> Mapping[str, Any] | None:
    """The schema that the content must fit, if one is asked for."""
    response_format = fields.child("response_format")
    kind = response_format.text("type") or "text"
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise wrong_value(
            response_format.name("type"), f"{kind[:40]!r} is unknown; one of text, json_object, json_schema"
        )
    named = response_format.child("json_schema")
    schema = named.value.get("schema")
    if not isinstance(schema, dict):
        raise wrong_type(named.name("schema"), "an object (a JSON schema)", schema)
    return schema


def _thinking(fields: Fields) -> Thinking:
    """What the request says of thinking; of several fields the first that says anything."""
    budget = fields.integer("thinking_budget", 0)
    if budget is not None:
        return Thinking(budget != 0, budget or None)
    return (
        of_object(fields)
        or of_effort(fields, "reasoning_effort")
        or _of_reasoning(fields)
        or _of_template(fields)
        or Thinking()
    )


def _of_reasoning(fields: Fields) -> Thinking | None:
    """OpenRouter's `{"enabled": …, "effort": …, "max_tokens": n}`; the limit comes before the effort."""
    reasoning = fields.child("reasoning")
    if not reasoning.flag("enabled", default=True):
        return Thinking(False)
    budget = reasoning.integer("max_tokens", 0)
    if budget is not None:
        return Thinking(budget != 0, budget or None)
    return of_effort(reasoning, "effort")


def _of_template(fields: Fields) -> Thinking | None:
    """vLLM's and SGLang's `chat_template_kwargs`, of which nothing else can mean anything here."""
    given = fields.child("chat_template_kwargs")
    for key in ("thinking", "enable_thinking"):
        if given.value.get(key) is not None:
            return Thinking(given.flag(key))
    return None


def _logprobs(fields: Fields) -> int | None:
    wanted = fields.flag("logprobs")
    top = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top and not wanted:
        raise wrong_value("top_logprobs", "needs logprobs: true")
    return (top or 0) if wanted else None
