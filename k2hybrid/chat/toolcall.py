"""Tool-call ids: `functions.{name}:{idx}`, idx counted over the whole conversation from 0.

The model was trained on this form and starts to emit malformed calls when it reads another, while clients
rewrite ids as they like. So ids in the history are renamed before rendering, and the model's own headers are
read with tolerance.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from k2hybrid.types import Message, ToolCall

_HEADER = re.compile(r"(?P<functions>functions\.)?(?P<name>[\w.\-]*[^\W\d][\w.\-]*)(?::(?P<index>\d+))?")
_NAMELESS = re.compile(r"(?:functions[.:])?(?:call_)?:?\d+|call_\w+")
_MAX_HEADER_CHARS = 256  # tool names have at most 64
_REWRITTEN = re.compile(r"(?:functions[._:])?(?P<name>.+?)(?:[_:.\-]\d+)?")


def canonical_id(name: str, index: int) -> str:
    """The id of the conversation's call number `index`."""
    return f"functions.{name}:{index}"


# --- the history ----------------------------------------------------------------------------------


@dataclass(slots=True)
class _OpenCall:
    given_id: str
    name: str
    id: str


def canonicalise(messages: Sequence[Message]) -> tuple[list[Message], int]:
    """Rename the ids of calls and their results; returns the messages and the number of calls in them.

    A result belongs to the unanswered call with its id, the latest turn first; failing that, to the first
    unanswered call of the latest turn (preferring one with its name). A result without a name gets its
    call's.
    """
    result = list(messages)
    unanswered: list[_OpenCall] = []
    turn: list[_OpenCall] = []  # the latest turn's calls; those answered are removed
    count = 0
    position = 0
    while position < len(result):
        message = result[position]
        if message.tool_calls:
            unanswered += turn
            turn = []
            calls = []
            for call in message.tool_calls:
                turn.append(_OpenCall(call.id, call.name, canonical_id(call.name, count)))
                calls.append(ToolCall(turn[-1].id, call.name, call.arguments))
                count += 1
            result[position] = replace(message, tool_calls=tuple(calls))
            position += 1
        elif message.role == "tool":
            end = position
            while end < len(result) and result[end].role == "tool" and not result[end].tool_calls:
                end += 1
            result[position:end] = _answer(result[position:end], turn, unanswered)
            position = end
        else:
            position += 1
    return result, count


def _answer(results: list[Message], turn: list[_OpenCall], older: list[_OpenCall]) -> list[Message]:
    """Give each of a run of results its call: all exact ids first, then by order."""
    chosen: list[_OpenCall | None] = [None] * len(results)
    for i, message in enumerate(results):
        if message.tool_call_id:
            chosen[i] = _take(turn, message.tool_call_id) or _take(older, message.tool_call_id, latest=True)
    for i, message in enumerate(results):
        if chosen[i] is None and turn:
            named = next((call for call in turn if message.name and call.name == message.name), turn[0])
            turn.remove(named)
            chosen[i] = named
    return [
        message if call is None else replace(message, tool_call_id=call.id, name=message.name or call.name)
        for message, call in zip(results, chosen, strict=True)
    ]


def _take(calls: list[_OpenCall], given_id: str, latest: bool = False) -> _OpenCall | None:
    order = range(len(calls) - 1, -1, -1) if latest else range(len(calls))
    for i in order:
        if calls[i].given_id == given_id:
            return calls.pop(i)
    return None


# --- the model's own headers ----------------------------------------------------------------------


class DeclaredTools:
    """The tools of one request, as far as reading call headers needs them."""

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        self._schemas: dict[str, Mapping[str, Any]] = {}
        for tool in tools:
            function = tool.get("function")
            declaration = function if isinstance(function, Mapping) else tool
            name = declaration.get("name")
            if isinstance(name, str):
                schema = declaration.get("parameters")
                self._schemas[name] = schema if isinstance(schema, Mapping) else {}

    def name_of(self, header: str) -> str | None:
        """The tool that a call header such as `functions.get_weather:0` names, or None.

        Without tools declared, and for headers in the full form, any name is taken; an incomplete header
        (`get_weather`, or `functions_get_weather_0` after a client's rewriting) must name a declared tool.
        """
        header = header.strip()
        if len(header) > _MAX_HEADER_CHARS:
            return None
        match = _HEADER.fullmatch(header)
        if match:
            with_prefix = (match["functions"] or "") + match["name"]
            if with_prefix in self._schemas:
                return with_prefix
            if match["name"] in self._schemas:
                return match["name"]
        rewritten = _REWRITTEN.fullmatch(header)
        if rewritten and rewritten["name"] in self._schemas:
            return rewritten["name"]
        if match and (match["functions"] or match["index"]) and not _NAMELESS.fullmatch(header):
            return match["name"]
        return None

    def is_nameless(self, header: str) -> bool:
        """Whether the header is a mere number or `call_…`: the tool may be inferred from the arguments."""
        return _NAMELESS.fullmatch(header.strip()) is not None

    def inferred(self, arguments: str) -> str | None:
        """The one declared tool whose schema the arguments fit, if exactly one does.

        Fitting: an object that has every required property and, where properties are listed, no other ones.
        """
        try:
            given = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            return None
        if not isinstance(given, dict):
            return None
        fitting = [name for name, schema in self._schemas.items() if _fits(given, schema)]
        return fitting[0] if len(fitting) == 1 else None


def _fits(given: Mapping[str, Any], schema: Mapping[str, Any]) -> bool:
    required = schema.get("required")
    if isinstance(required, list | tuple) and any(name not in given for name in required):
        return False
    properties = schema.get("properties")
    return not isinstance(properties, Mapping) or all(name in properties for name in given)
