"""OpenAI's chat request → ChatRequest. Pure: no model, no I/O.

Accepted as real clients send them: content null, "", absent, a string or parts in every role; the developer
role (→ system); assistant tool calls without content or ids; `reasoning_content` or `reasoning` on input;
`max_tokens` beyond any context (the runtime clamps it). Unknown fields are ignored, a `chat_template` among
them. Tools of other types than `function` are dropped: the model cannot call what runs elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from k2hybrid.errors import RequestError
from k2hybrid.server.fields import Fields, wrong_type, wrong_value
from k2hybrid.server.thinking import Thinking, of_effort, of_object
from k2hybrid.types import ChatRequest, Message, SamplingParams, ToolCall, ToolChoice

MAX_CHOICES = 8  # each is a whole generation
MAX_STOP = 16
MAX_STOP_CHARS = 1000
MAX_TOP_LOGPROBS = 20  # OpenAI's own limit
MAX_TOOLS = 1024
MAX_PENALTY = 2.0
MAX_BIAS = 100.0
_INT64 = 1 << 63

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_TOOL_NAME = re.compile(r"[\w.\-]{1,256}", re.ASCII)


@dataclass(frozen=True, slots=True)
class ChatCall:
    """A parsed request: what to generate, and how the client wants it sent."""

    request: ChatRequest
    choices: int = 1
    stream: bool = False
    include_usage: bool = False


def parse_chat(body: Mapping[str, Any]) -> ChatCall:
    """Parse a `/v1/chat/completions` body; RequestError names the field that is wrong."""
    fields = Fields(body)
    tools = parse_tools(fields)
    choice, tool_name = _tool_choice(body.get("tool_choice"), tools)
    thinking = _thinking(fields)
    limit = fields.integer("max_completion_tokens", 1)
    if limit is None:
        limit = fields.integer("max_tokens", 1)
    request = ChatRequest(
        messages=parse_messages(fields),
        tools=tools,
        tool_choice=choice,
        tool_name=tool_name,
        parallel_tool_calls=fields.flag("parallel_tool_calls", default=True),
        json_schema=_json_schema(fields),
        thinking=thinking.enabled,
        thinking_budget=thinking.budget,
        sampling=_sampling(fields),
        max_tokens=limit,
        stop=_stop(body.get("stop")),
        store=fields.flag("store", default=True),
        reuse=fields.flag("cache_prompt", default=True),  # llama.cpp's word for it
    )
    stream = fields.flag("stream")
    return ChatCall(
        request=request,
        choices=fields.integer("n", 1, MAX_CHOICES) or 1,
        stream=stream,
        include_usage=stream and fields.child("stream_options").flag("include_usage"),
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
    return tuple(_message(entry, last=i == last) for i, entry in enumerate(entries))


def _message(fields: Fields, *, last: bool) -> Message:
    role = fields.required_text("role")
    if role not in _ROLES:
        raise wrong_value(fields.name("role"), f"{role!r} is unknown; one of {', '.join(_ROLES)}")
    partial = fields.flag("partial")
    if partial and role != "assistant":
        raise wrong_value(fields.name("partial"), "is for assistant messages")
    assistant = role == "assistant"
    return Message(
        role=_ROLES[role],
        content=_content(fields),
        name=fields.text("name"),
        response_id=_response_id(fields) if assistant else None,
        reasoning=(fields.text("reasoning_content") or fields.text("reasoning")) if assistant else None,
        tool_calls=tuple(_tool_call(call) for call in fields.objects("tool_calls")) if assistant else (),
        tool_call_id=fields.text("tool_call_id"),
        partial=partial and last,  # an earlier one was continued already: clients send their history back
    )


def _response_id(fields: Fields) -> str | None:
    """What some clients keep with a message. It only helps to find the answer again, so any other is none."""
    value = fields.value.get("id")
    return value if isinstance(value, str) and value else None


def _content(fields: Fields) -> str | tuple[Mapping[str, Any], ...] | None:
    value = fields.value.get("content")
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong_type(fields.name("content"), "a string or an array of parts", value)
    return tuple(_part(part, f"{fields.name('content')}[{i}]") for i, part in enumerate(value))


def _part(value: Any, path: str) -> Mapping[str, Any]:
    if isinstance(value, str):
        return {"type": "text", "text": value}
    part = Fields.of(value, path)
    kind = part.required_text("type")
    key = {"text": "text", "refusal": "refusal"}.get(kind)
    if key is None:
        raise RequestError(
            f"{path}.type {kind!r} cannot be read: this model takes text parts only",
            param=f"{path}.type",
            code="unsupported_content",
        )
    text = part.text(key)
    if text is None:
        raise RequestError(f"{path}.{key} is missing", param=f"{path}.{key}", code="missing_required")
    return {"type": "text", "text": text}


def _tool_call(fields: Fields) -> ToolCall:
    function = fields.child("function")
    arguments = function.value.get("arguments")
    if arguments is None:
        arguments = "{}"
    elif isinstance(arguments, dict):
        arguments = orjson.dumps(arguments).decode()
    elif not isinstance(arguments, str):
        raise wrong_type(function.name("arguments"), "a string of JSON", arguments)
    return ToolCall(id=fields.text("id") or "", name=function.required_text("name"), arguments=arguments)


# --- tools ----------------------------------------------------------------------------------------


def parse_tools(fields: Fields) -> tuple[Mapping[str, Any], ...]:
    """The `function` tools, each as it was sent: the template writes them out as JSON."""
    entries = fields.objects("tools")
    if len(entries) > MAX_TOOLS:
        raise wrong_value("tools", f"has {len(entries)} entries; at most {MAX_TOOLS}")
    return tuple(tool.value for tool in entries if _is_function(tool))


def _is_function(tool: Fields) -> bool:
    if tool.text("type", "function") != "function":
        return False
    function = tool.child("function")
    name = function.required_text("name")
    if not _TOOL_NAME.fullmatch(name):
        raise wrong_value(
            function.name("name"), "may hold letters, digits, '_', '.' and '-' only, at most 256"
        )
    function.text("description")
    parameters = function.value.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise wrong_type(function.name("parameters"), "an object (a JSON schema)", parameters)
    return True


def _tool_choice(value: Any, tools: tuple[Mapping[str, Any], ...]) -> tuple[ToolChoice, str | None]:
    """auto, none or required; and with it the name of the one function to call, if one is named."""
    if value is None:
        return "auto", None
    if value == "auto" or value == "none":
        return value, None
    if value == "required":
        if not tools:
            raise wrong_value("tool_choice", "is 'required' but there are no tools")
        return "required", None
    if isinstance(value, str):
        raise wrong_value("tool_choice", f"{value!r} is unknown; one of auto, none, required, or an object")
    if not isinstance(value, dict):
        raise wrong_type("tool_choice", "a string or an object", value)
    name = Fields(value, "tool_choice").child("function").required_text("name")
    if name not in {tool["function"]["name"] for tool in tools}:
        raise wrong_value("tool_choice", f"names {name!r}, which is not among the tools")
    return "required", name


def _json_schema(fields: Fields) -> Mapping[str, Any] | None:
    """The schema that the content must fit, if one is asked for."""
    response_format = fields.child("response_format")
    kind = response_format.text("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise wrong_value(
            response_format.name("type"), f"{kind!r} is unknown; one of text, json_object, json_schema"
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
    return of_object(fields) or of_effort(fields, "reasoning_effort") or Thinking()


# --- sampling -------------------------------------------------------------------------------------


def _sampling(fields: Fields) -> SamplingParams:
    default = SamplingParams()
    seed = fields.integer("seed")
    top_k = fields.integer("top_k", -1)
    return SamplingParams(
        temperature=fields.number("temperature", default.temperature, 0.0, 100.0),
        top_p=fields.number("top_p", default.top_p, 0.0, 1.0),
        top_k=max(top_k or 0, 0),  # -1 is another spelling of 0: all
        min_p=fields.number("min_p", default.min_p, 0.0, 1.0),
        seed=None if seed is None else seed % _INT64,
        presence_penalty=fields.number("presence_penalty", 0.0, -MAX_PENALTY, MAX_PENALTY),
        frequency_penalty=fields.number("frequency_penalty", 0.0, -MAX_PENALTY, MAX_PENALTY),
        repetition_penalty=fields.number("repetition_penalty", 1.0, 0.0, 10.0, above=True),
        logit_bias=_logit_bias(fields.child("logit_bias")),
        logprobs=_logprobs(fields),
    )


def _logit_bias(fields: Fields) -> dict[int, float]:
    bias = {}
    for key in fields.value:
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise wrong_value("logit_bias", f"has the key {key[:20]!r}; keys are token ids")
        bias[int(key)] = fields.number(key, 0.0, -MAX_BIAS, MAX_BIAS)
    return bias


def _logprobs(fields: Fields) -> int | None:
    wanted = fields.flag("logprobs")
    top = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top and not wanted:
        raise wrong_value("top_logprobs", "needs logprobs: true")
    return (top or 0) if wanted else None


def _stop(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise wrong_type("stop", "a string or an array of strings", value)
    if len(stops) > MAX_STOP:
        raise wrong_value("stop", f"has {len(stops)} entries; at most {MAX_STOP}")
    for i, stop in enumerate(stops):
        if not isinstance(stop, str):
            raise wrong_type(f"stop[{i}]", "a string", stop)
        if len(stop) > MAX_STOP_CHARS:
            raise wrong_value(f"stop[{i}]", f"has {len(stop)} characters; at most {MAX_STOP_CHARS}")
    return tuple(stop for stop in stops if stop)  # "" would stop everything at once; some clients send it
