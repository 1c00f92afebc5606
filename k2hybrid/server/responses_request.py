"""OpenAI's Responses request → ChatRequest. Pure but for what earlier responses left on the shelf.

Accepted and without effect, for clients send them as a matter of course: `truncation`, `user`,
`safety_identifier`, `prompt_cache_key`, `client_metadata`, `service_tier`, `stream_options`,
`max_tool_calls`, and fields yet unknown. Refused, because the answer would not be what was asked for:
`background`, `conversation`, `prompt`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from k2hybrid.errors import RequestError
from k2hybrid.server.fields import Fields, wrong_type, wrong_value
from k2hybrid.server.responses_items import Item, kept_item, kind_of, messages_of
from k2hybrid.server.responses_references import References
from k2hybrid.server.responses_tools import OFFERED, Toolbox, parse_choice, parse_toolbox
from k2hybrid.server.sampling import MAX_TOP_LOGPROBS, parse_limit, parse_sampling, parse_stop
from k2hybrid.server.sealed import Unsealing
from k2hybrid.server.thinking import Thinking, of_effort, of_object
from k2hybrid.types import ChatRequest, Message

_LOGPROBS = "message.output_text.logprobs"
_SEALED = "reasoning.encrypted_content"
# Items that declare tools in the middle of a conversation.
_DECLARING = frozenset({"additional_tools", "tool_search_output"})


class Shelf(Protocol):
    """What is known of earlier responses."""

    def history(self, response_id: str) -> tuple[Item, ...] | None:
        """All items up to that response's end."""

    def item(self, identity: str) -> Item | None: ...


@dataclass(frozen=True, slots=True)
class ResponsesCall:
    """A parsed request: what to generate, and how the client wants it sent and kept."""

    request: ChatRequest
    toolbox: Toolbox
    items: tuple[Item, ...]  # all that is answered: the history, and this request's input
    echo: Mapping[str, Any]  # what a response repeats of its request
    stream: bool = False
    sealed: bool = False  # reasoning goes out in an opaque string too


def parse_responses(body: Mapping[str, Any], shelf: Shelf, response_id: str) -> ResponsesCall:
    """Parse a `/v1/responses` body; RequestError names the field that is wrong."""
    fields = Fields(body)
    _refuse(fields)
    history = _history(fields, shelf)
    brought = _input(fields, shelf, optional=history is not None)
    items = [Fields(item, "previous_response_id") for item in history or ()] + brought
    declared = fields.objects("tools")
    for item in items:
        declared += item.objects("tools") if kind_of(item) in _DECLARING else []
    box = parse_toolbox(declared)
    allowed, choice, tool_name = parse_choice(body.get("tool_choice"), box)
    unsealing = Unsealing()
    messages = list(messages_of(items, box, unsealing))
    if not messages:
        raise RequestError(
            "input holds nothing that could be answered", param="input", code="missing_required"
        )
    instructions = _instructions(fields, unsealing)
    include = fields.array("include")
    thinking = _thinking(fields)
    stream = fields.flag("stream")
    request = ChatRequest(
        messages=(*instructions, *messages),
        tools=allowed.functions,
        tool_choice=choice,
        tool_name=tool_name,
        parallel_tool_calls=fields.flag("parallel_tool_calls", default=True),
        json_schema=_json_schema(fields),
        thinking=thinking.enabled,
        thinking_budget=thinking.budget,
        sampling=parse_sampling(fields, _logprobs(fields, wanted=_LOGPROBS in include)),
        max_tokens=parse_limit(fields, "max_output_tokens"),
        stop=parse_stop(body.get("stop")),  # no part of the API, as the last two
        store=fields.flag("store", default=True),
        reuse=fields.flag("cache_prompt", default=True),
        progress=fields.flag("return_progress") and stream,
    )
    return ResponsesCall(
        request=request,
        toolbox=box,
        items=(
            *(history or ()),
            *(kept_item(item, response_id, i) for i, item in enumerate(brought)),
        ),
        echo=_echo(fields, request),
        stream=stream,
        sealed=_SEALED in include,
    )


def _refuse(fields: Fields) -> None:
    if fields.flag("background"):
        raise _unsupported("background", "answers are not generated in the background here; stream instead")
    for key, instead in (
        ("conversation", "use previous_response_id, or send the whole history as input"),
        ("prompt", "there are no stored prompts here; send instructions and input"),
    ):
        if fields.value.get(key) is not None:
            raise _unsupported(key, instead)


def _unsupported(param: str, instead: str) -> RequestError:
    return RequestError(f"{param} is not supported: {instead}", param=param, code="unsupported_parameter")


def _history(fields: Fields, shelf: Shelf) -> tuple[Item, ...] | None:
    previous = fields.text("previous_response_id")
    if previous is None:
        return None
    history = shelf.history(previous)
    if history is None:
        raise RequestError(
            f"Previous response with id {previous[:100]!r} not found: it is kept in memory only, and not for "
            "ever; send the whole history as input",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    return history


def _input(fields: Fields, shelf: Shelf, *, optional: bool) -> list[Fields]:
    """The items brought with this request, those brought by reference looked up."""
    value = fields.value.get("input")
    if isinstance(value, str):
        return [Fields({"type": "message", "role": "user", "content": value}, "input")]
    if value is None and not optional:
        raise RequestError("input is missing", param="input", code="missing_required")
    if value is not None and not isinstance(value, list):
        raise wrong_type("input", "a string or an array of items", value)
    references = References(shelf.item)
    return [references.looked_up(item) for item in fields.objects("input")]


def _instructions(fields: Fields, unsealing: Unsealing) -> tuple[Message, ...]:
    value = fields.value.get("instructions")
    if isinstance(value, list):  # as a response may repeat them
        return tuple(messages_of(fields.objects("instructions"), Toolbox(), unsealing))
    text = fields.text("instructions")
    return (Message("system", text),) if text else ()


def _thinking(fields: Fields) -> Thinking:
    """What the request says of thinking; of several fields the first that says anything."""
    budget = fields.integer("thinking_budget", 0)
    if budget is not None:
        return Thinking(budget != 0, budget or None)
    return of_object(fields) or of_effort(fields.child("reasoning"), "effort") or Thinking()


def _logprobs(fields: Fields, *, wanted: bool) -> int | None:
    top = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS) or 0
    return top if wanted or top else None


def _json_schema(fields: Fields) -> Mapping[str, Any] | None:
    shape = fields.child("text").child("format")
    kind = shape.text("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise wrong_value(shape.name("type"), f"{kind!r} is unknown; one of text, json_object, json_schema")
    schema = shape.value.get("schema")
    if not isinstance(schema, dict):
        raise wrong_type(shape.name("schema"), "an object (a JSON schema)", schema)
    return schema


def _echo(fields: Fields, request: ChatRequest) -> dict[str, Any]:
    reasoning, text = fields.child("reasoning"), fields.child("text")
    fields.integer("max_tool_calls")
    return {
        "background": False,
        "instructions": fields.value.get("instructions"),
        # As they came: an integer read from 1e30 could not be written again.
        "max_output_tokens": fields.value.get("max_output_tokens"),
        "max_tool_calls": fields.value.get("max_tool_calls"),
        "metadata": _metadata(fields),
        "parallel_tool_calls": request.parallel_tool_calls,
        "previous_response_id": fields.text("previous_response_id"),
        "prompt_cache_key": fields.text("prompt_cache_key"),
        "reasoning": {"effort": reasoning.text("effort"), "summary": reasoning.text("summary")},
        "safety_identifier": fields.text("safety_identifier"),
        "service_tier": "default",
        "store": request.store,
        "temperature": request.sampling.temperature,
        "text": {"verbosity": "medium", **text.value, "format": text.value.get("format") or {"type": "text"}},
        "tool_choice": fields.value.get("tool_choice") or "auto",
        "tools": [_echoed_tool(tool) for tool in fields.objects("tools")],
        "top_logprobs": fields.integer("top_logprobs") or 0,
        "top_p": request.sampling.top_p,
        "truncation": fields.text("truncation", "disabled"),
        "user": fields.text("user"),
    }


def _metadata(fields: Fields) -> Mapping[str, Any]:
    metadata = fields.child("metadata")
    for key in metadata.value:
        metadata.text(key)
    return metadata.value


def _echoed_tool(tool: Fields) -> Mapping[str, Any]:
    """A tool as it is offered; of one that is not, no more than which it is."""
    kind = tool.value.get("type")
    if kind not in OFFERED:
        return {key: value for key, value in tool.value.items() if key in ("type", "name", "server_label")}
    defaults = {"description": None, "parameters": None, "strict": False}
    return {**defaults, **tool.value} if kind == "function" else tool.value
