"""What a template is given: checked, bounded, cleaned, with canonical ids, as plain JSON values."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from k2hybrid.chat.growing import Held
from k2hybrid.chat.tokenizer import replace_surrogates
from k2hybrid.chat.toolcall import CallHistory, is_result
from k2hybrid.errors import RequestError
from k2hybrid.types import Message

MAX_MESSAGES = 16_384  # a run of 300 tool calls has about 600
MAX_TOOLS = 2_048
MAX_CHARS = 64 << 20  # of all texts together; the longest context holds a few million
MAX_DEPTH = 64  # nesting of tool declarations and content parts
_CALL_CHARS = 40  # that a tool call counts for beside its texts
_MAX_INT_BITS = 4_096  # Python refuses to print integers of more than 4,300 digits


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as the dictionaries that chat templates know, without a last `partial` one, which is
    `partial`.

    `tools` has its keys sorted at every depth. `calls` counts the tool calls in `messages`, and
    results whose call is not shown.
    """

    messages: list[dict[str, Any]]
    tools: list[Any]
    partial: dict[str, Any] | None
    calls: int


@dataclass(slots=True)
class _Prepared:
    """Messages and what became of them. `calls` goes on from there; None: another history has it now."""

    given: list[Any]  # `exact`
    dictionaries: list[dict[str, Any]]
    chars: int
    count: int
    calls: CallHistory | None


class Preparation:
    """Checks and converts conversations; of one that grew, what is new. Thread-safe.

    The dictionaries of one conversation are those of the next: not to be changed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._held: Held[_Prepared] = Held()

    def prepare(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> Conversation:
        """Check and convert. Raises RequestError where counts, sizes, nesting or types are out of bounds."""
        if len(messages) > MAX_MESSAGES:
            raise RequestError(
                f"{len(messages)} messages; at most {MAX_MESSAGES} are accepted", param="messages"
            )
        if len(tools) > MAX_TOOLS:
            raise RequestError(f"{len(tools)} tools; at most {MAX_TOOLS} are accepted", param="tools")
        budget = _Budget(MAX_CHARS)
        cleaned_tools = [budget.clean(tool, "tools", 1) for tool in tools]
        prepared = self._prepared(messages, budget)
        dictionaries = prepared.dictionaries
        if not messages or not messages[-1].partial:
            return Conversation(dictionaries, cleaned_tools, None, prepared.count)
        if messages[-1].role != "assistant" or messages[-1].tool_calls:
            raise RequestError(
                "only an assistant message without tool calls can be partial", param="messages"
            )
        return Conversation(dictionaries[:-1], cleaned_tools, dictionaries[-1], prepared.count)

    def _prepared(self, messages: Sequence[Message], budget: _Budget) -> _Prepared:
        given = [exact(message) for message in messages]
        with self._lock:
            number, base, known = self._held.longest(given, lambda prepared: prepared.given)
            calls = None
            # Only what goes on from all of a history goes on from its calls.
            if base is not None and known == len(base.given):
                if known == len(given):
                    budget.spend(base.chars, "messages")
                    return base
                if _parts(messages, known):
                    calls, base.calls = base.calls, None
        if base is None or calls is None:
            number, base, calls = None, _Prepared([], [], 0, 0, None), CallHistory()
        before = budget.left
        budget.spend(base.chars, "messages")
        new = calls.renamed(messages[len(base.given) :])
        dictionaries = base.dictionaries + [_as_dict(message, budget) for message in new]
        prepared = _Prepared(given, dictionaries, before - budget.left, calls.count, calls)
        with self._lock:
            self._held.put(next(self._numbers), prepared, prepared.chars, number)
        return prepared


def _parts(messages: Sequence[Message], at: int) -> bool:
    """Whether results in a row do not lie on both sides of `at`: they find their calls together."""
    return not (0 < at < len(messages) and is_result(messages[at - 1]) and is_result(messages[at]))


def exact(message: Message) -> Any:
    """What is equal only where the message is the same: parts may hold numbers, and 1 == True."""
    content = message.content
    return message if content is None or isinstance(content, str) else (message, repr(content))


def text_of(content: Any) -> str:
    """The text of a content that may be a string, parts or nothing; RequestError where a part holds none."""
    if isinstance(content, str):
        return content
    return "".join(part_text(part) for part in content or ())


def part_text(part: Any) -> str:
    """The text of one content part."""
    text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise RequestError(f"content part of type {str(kind)[:40]!r} holds no text", param="messages")
    return text


def is_image(part: Any) -> bool:
    """Whether a content part is an image, in any of the spellings that clients use."""
    return isinstance(part, Mapping) and (
        part.get("type") in ("image", "image_url") or "image" in part or "image_url" in part
    )


def _as_dict(message: Message, budget: _Budget) -> dict[str, Any]:
    """The message under the names that chat templates use. Missing content is the empty string."""

    text, content = budget.text, message.content or ""
    result: dict[str, Any] = {
        "role": text(message.role),
        "content": text(content) if isinstance(content, str) else budget.clean(content, "messages", 0),
    }
    if message.name:
        result["name"] = text(message.name)
    if message.reasoning is not None:
        result["reasoning_content"] = text(message.reasoning)
    if message.tool_call_id is not None:
        result["tool_call_id"] = text(message.tool_call_id)
    if message.tool_calls:
        budget.spend(_CALL_CHARS * len(message.tool_calls), "messages")
        result["tool_calls"] = [
            {
                "function": {"arguments": text(call.arguments), "name": text(call.name)},
                "id": text(call.id),
                "type": "function",
            }
            for call in message.tool_calls
        ]
    return result


class _Budget:
    """Copies JSON values with surrogates replaced and keys sorted, and counts characters down to zero."""

    def __init__(self, chars: int) -> None:
        self.left = chars

    def text(self, value: str) -> str:
        """A text of a message, as `clean`."""
        self.left -= len(value)
        if self.left < 0:
            self.spend(0, "messages")
        return value if value.isascii() else replace_surrogates(value)

    def clean(self, value: Any, param: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise RequestError(f"nested more than {MAX_DEPTH} levels deep", param=param)
        if isinstance(value, str):
            self.spend(len(value), param)
            return replace_surrogates(value)
        self.spend(1, param)
        if value is None or isinstance(value, bool | float):
            return value
        if isinstance(value, int):
            if value.bit_length() > _MAX_INT_BITS:
                raise RequestError("an integer of more than a thousand digits", param=param)
            return value
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str):
                    raise RequestError(f"key {key!r} is not a string", param=param)
                self.spend(len(key), param)
            return {
                replace_surrogates(key): self.clean(value[key], param, depth + 1) for key in sorted(value)
            }
        if isinstance(value, list | tuple):
            return [self.clean(item, param, depth + 1) for item in value]
        raise RequestError(f"a value of type {type(value).__name__} is not JSON", param=param)

    def spend(self, chars: int, param: str) -> None:
        """Count so many. Raises RequestError where they are more than are left."""
        self.left -= chars
        if self.left < 0:
            raise RequestError(f"the conversation holds more than {MAX_CHARS} characters", param=param)
