"""Tool-call ids: `functions.{name}:{idx}`, idx counted over the whole conversation from 0.

The model was trained on this form and starts to emit malformed calls when it reads another, while clients
rewrite ids as they like. So ids in the history are renamed before rendering, and the model's own headers are
read with tolerance.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from k2hybrid.types import Message, ToolCall

_HEADER = re.compile(r"(?P<functions>functions\.)?(?P<name>[\w.\-]*[^\W\d][\w.\-]*)(?::(?P<index>\d+))?")
_NAMELESS = re.compile(r"(?:functions[.:])?(?:call_)?:?\d+|call_\w+")
_MAX_HEADER_CHARS = 256  # tool names have at most 64
_REWRITTEN = re.compile(r"(?:functions[._:])?(?P<name>.+?)(?:[_:.\-]\d+)?")
_ORPHAN = re.compile(r"functions[._:](?P<name>[\w.\-]{1,64}?)(?:[_:.\-]\d+)?")  # an id that tells a name
_NAME = re.compile(r"[\w.\-]{1,64}")
_REPLACED = re.compile(r"[^0-9A-Za-z]+")  # what clients replace in ids


def canonical_id(name: str, index: int) -> str:
    """The id of the conversation's call number `index`."""
    return f"functions.{name}:{index}"


# --- the history ----------------------------------------------------------------------------------


def is_result(message: Message) -> bool:
    """Whether it is a call's result, and no call itself."""
    return message.role == "tool" and not message.tool_calls


@dataclass(slots=True)
class _Call:
    given_id: str
    name: str
    id: str
    answered: bool = False


class CallHistory:
    """The calls so far: `count` ids were given. Every look-up is one in a table, as histories are long."""

    def __init__(self) -> None:
        self.count = 0
        self._turn: list[_Call] = []
        self._latest: dict[tuple[str, str], deque[_Call]] = {}  # of the latest turn, the first one first
        self._older: dict[tuple[str, str], deque[_Call]] = {}  # of earlier turns, the latest first
        self._answered: dict[str, _Call] = {}

    def renamed(self, messages: Sequence[Message]) -> list[Message]:
        """The messages that come next, with the ids of calls and their results renamed.

        Results in a row are to come together. A result belongs to the unanswered call with its id, the latest
        turn first, whatever a client replaced in it (`functions_f_0` for `functions.f:0`); failing that, to a
        call with its id that has a result already; failing that, to the first unanswered call of the latest
        turn (preferring one with its name). A result without a name gets its call's.

        A result of no call at all, as where a client cut a history short, is that of a call that is not
        shown: it has a number of its own, and the name it tells or `unknown`. So the model reads no foreign
        id, and no later call is taken for its.
        """
        result = list(messages)
        position = 0
        while position < len(result):
            message = result[position]
            if message.tool_calls:
                renamed = self._calls(message.tool_calls)
                if renamed != message.tool_calls:
                    result[position] = message.with_calls(renamed)
                position += 1
            elif is_result(message):
                end = position
                while end < len(result) and is_result(result[end]):
                    end += 1
                result[position:end] = self._results(result[position:end])
                position = end
            else:
                position += 1
        return result

    def _calls(self, calls: Sequence[ToolCall]) -> tuple[ToolCall, ...]:
        """The calls of one message, renamed."""
        for call in self._turn:
            if not call.answered:
                for word in (("id", call.given_id), ("key", _key(call.given_id))):
                    self._older.setdefault(word, deque()).appendleft(call)
        self._turn = [_Call(call.id, call.name, self._next_id(call.name)) for call in calls]
        self._latest = {}
        for call in self._turn:
            words = (("id", call.given_id), ("key", _key(call.given_id)), ("name", call.name), ("any", ""))
            for word in words:
                self._latest.setdefault(word, deque()).append(call)
        return tuple(
            ToolCall(known.id, call.name, call.arguments)
            for known, call in zip(self._turn, calls, strict=True)
        )

    def _results(self, results: Sequence[Message]) -> list[Message]:
        """A run of results, each with the id of its call: by id as far as there are any, then by order."""
        chosen = [self._by_id(message.tool_call_id) for message in results]
        answer = []
        for message, call in zip(results, chosen, strict=True):
            call = call or self._by_order(message)
            if call is None:
                answer.append(message.answering(self._next_id(_orphan_name(message)), message.name))
            elif (message.tool_call_id, message.name) == (call.id, call.name):
                answer.append(message)
            else:
                answer.append(message.answering(call.id, message.name or call.name))
        return answer

    def _next_id(self, name: str) -> str:
        self.count += 1
        return canonical_id(name, self.count - 1)

    def _by_id(self, given_id: str | None) -> _Call | None:
        if not given_id:
            return None
        key = _key(given_id)
        for calls in (self._latest, self._older):
            call = self._take(calls, ("id", given_id)) or self._take(calls, ("key", key))
            if call is not None:
                return call
        return self._answered.get(key)

    def _by_order(self, message: Message) -> _Call | None:
        named = self._take(self._latest, ("name", message.name)) if message.name else None
        return named or self._take(self._latest, ("any", ""))

    def _take(self, calls: dict[tuple[str, str], deque[_Call]], word: tuple[str, str]) -> _Call | None:
        """The first unanswered call under `word`, which is then answered."""
        queue = calls.get(word)
        while queue:
            call = queue.popleft()
            if not call.answered:
                call.answered = True
                self._answered[_key(call.given_id)] = call
                return call
        return None


def _key(given_id: str) -> str:
    return _REPLACED.sub("_", given_id)


def _orphan_name(message: Message) -> str:
    told = _ORPHAN.fullmatch(message.tool_call_id or "")
    name = message.name or (told["name"] if told else "")
    return name if _NAME.fullmatch(name) else "unknown"


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
            if match["name"] in self._schemas:
                return match["name"]
            with_prefix = (match["functions"] or "") + match["name"]
            if with_prefix in self._schemas:
                return with_prefix
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
