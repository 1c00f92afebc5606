"""Anthropic's messages request → ChatRequest. Pure: no model, no I/O.

Accepted as agents send them: system messages within `messages` (see `messages_history`), `cache_control`,
betas and other fields that mean nothing here, tools that run at Anthropic's (dropped: nothing here could run
them), `max_tokens` beyond any context (the runtime clamps it).

A request that does not speak of `thinking` gets none sent, but the model thinks all the same: it answers
better, and the runtime finds the reasoning again when the answer comes back. `disabled` switches it off.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from k2hybrid.errors import RequestError
from k2hybrid.server.chat_tools import MAX_TOOLS, TOOL_NAME
from k2hybrid.server.fields import Fields, wrong_type, wrong_value
from k2hybrid.server.messages_history import parse_history
from k2hybrid.server.sampling import parse_sampling, parse_stop
from k2hybrid.server.thinking import Thinking, of_effort, of_object
from k2hybrid.types import ChatRequest, ToolChoice

# How the reasoning goes out: not at all, as text, or sealed in a signature beside an empty text.
Display = Literal["none", "text", "sealed"]

_TOOL_NAME = re.compile(TOOL_NAME, re.ASCII)


@dataclass(frozen=True, slots=True)
class MessagesCall:
    """A parsed request: what to generate, and how the client wants it sent."""

    request: ChatRequest
    stream: bool = False
    display: Display = "none"


def parse_messages(body: Mapping[str, Any], *, counting: bool = False) -> MessagesCall:
    """Parse a `/v1/messages` body; RequestError names the field that is wrong.

    With `counting` it is one of `/v1/messages/count_tokens`, which has no max_tokens.
    """
    fields = Fields(body)
    limit = fields.integer("max_tokens", 1)
    if limit is None and not counting:
        raise RequestError("max_tokens is missing", param="max_tokens", code="missing_required")
    tools = _tools(fields)
    choice, tool_name = _tool_choice(fields, tools)
    thinking, display = _thinking(fields)
    request = ChatRequest(
        messages=parse_history(fields),
        tools=tools,
        tool_choice=choice,
        tool_name=tool_name,
        parallel_tool_calls=not fields.child("tool_choice").flag("disable_parallel_tool_use"),
        json_schema=_json_schema(fields),
        thinking=thinking.enabled,
        thinking_budget=thinking.budget,
        sampling=parse_sampling(fields, None),
        max_tokens=limit,
        stop=parse_stop(body.get("stop_sequences"), "stop_sequences"),
        store=fields.flag("store", default=True),
        reuse=fields.flag("cache_prompt", default=True),
    )
    return MessagesCall(request, fields.flag("stream"), display)


# --- tools ----------------------------------------------------------------------------------------


def _tools(fields: Fields) -> tuple[Mapping[str, Any], ...]:
    """The client's own tools, in the form in which the template declares them."""
    entries = fields.objects("tools")
    if len(entries) > MAX_TOOLS:
        raise wrong_value("tools", f"has {len(entries)} entries; at most {MAX_TOOLS}")
    return tuple({"type": "function", "function": _function(tool)} for tool in entries if _is_own(tool))


def _is_own(tool: Fields) -> bool:
    """Whether the client runs it. A type such as `web_search_20250305` says that Anthropic declares it."""
    return tool.text("type", "custom") == "custom" or "input_schema" in tool.value


def _function(tool: Fields) -> dict[str, Any]:
    name = tool.required_text("name")
    if not _TOOL_NAME.fullmatch(name):
        raise wrong_value(tool.name("name"), "may hold letters, digits, '_', '.' and '-' only, at most 256")
    schema = tool.value.get("input_schema")
    if not isinstance(schema, dict):
        raise wrong_type(tool.name("input_schema"), "an object (a JSON schema)", schema)
    description = tool.text("description")
    described = {} if description is None else {"description": description}
    return {"name": name, **described, "parameters": schema}


def _tool_choice(fields: Fields, tools: tuple[Mapping[str, Any], ...]) -> tuple[ToolChoice, str | None]:
    """auto, none or required; and with it the name of the one tool to call, if one is named.

    A tool that was dropped cannot be required; the model then answers as it can.
    """
    choice = fields.child("tool_choice")
    kind = choice.text("type", "auto")
    if kind == "auto":
        return "auto", None
    if kind == "none":
        return "none", None
    sent = [tool.value.get("name") for tool in fields.objects("tools")]
    if kind == "any":
        if not sent:
            raise wrong_value("tool_choice", "is 'any' but there are no tools")
        return ("required", None) if tools else ("auto", None)
    if kind != "tool":
        raise wrong_value(choice.name("type"), f"{str(kind)[:40]!r} is unknown; one of auto, any, tool, none")
    name = choice.required_text("name")
    if name in {tool["function"]["name"] for tool in tools}:
        return "required", name
    if name not in sent:
        raise wrong_value(choice.name("name"), f"{name[:40]!r} is not among the tools")
    return "auto", None


# --- the answer -----------------------------------------------------------------------------------


def _thinking(fields: Fields) -> tuple[Thinking, Display]:
    """How much to think, and how it is sent. An own `thinking_budget` counts first, then `thinking`'s."""
    asked = of_object(fields)
    effort = of_effort(fields.child("output_config"), "effort")
    display: Display = "none"
    if asked is not None and asked.enabled:
        said = fields.value["thinking"]
        display = "sealed" if isinstance(said, dict) and said.get("display") == "omitted" else "text"
    budget = fields.integer("thinking_budget", 0)
    if budget is not None:
        return Thinking(budget != 0, budget or None), display
    if asked is not None and (not asked.enabled or asked.budget is not None):
        return asked, display
    return effort or asked or Thinking(), display


def _json_schema(fields: Fields) -> Mapping[str, Any] | None:
    """The schema that the text must fit, if one is asked for; `output_format` is the former spelling."""
    wanted = fields.child("output_config").child("format")
    if not wanted.value:
        wanted = fields.child("output_format")
    if not wanted.value:
        return None
    kind = wanted.text("type")
    if kind != "json_schema":
        raise wrong_value(wanted.name("type"), f"{str(kind)[:40]!r} is unknown; it must be json_schema")
    schema = wanted.value.get("schema")
    if not isinstance(schema, dict):
        raise wrong_type(wanted.name("schema"), "an object (a JSON schema)", schema)
    return schema
