"""What of a message stays the same whatever a client does to it on the way: its meaning, as one text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from k2hybrid.chat.conversation import text_of
from k2hybrid.types import Message


def meaning(message: Message) -> str:
    """What of a message a client keeps: role, words, calls by name and value. No reasoning, no ids.

    One text for one meaning. As Python values, true and 1 would be equal.
    """
    calls = [[call.name, _value(call.arguments)] for call in message.tool_calls]
    meant = [message.role, _words(plain_text(message.content)), calls]
    return json.dumps(meant, sort_keys=True, separators=(",", ":"))


def plain_text(content: Any) -> str:
    """A content's text; of parts that are not all text, their JSON."""
    if content is None or isinstance(content, str):
        return content or ""
    if all(isinstance(part, str) or (isinstance(part, Mapping) and "text" in part) for part in content):
        return text_of(content)
    return json.dumps(list(content), sort_keys=True, default=str)


def same_words(one: str, other: str) -> bool:
    """Whether two texts are the same but for white space that clients trim."""
    return one == other or _words(one) == _words(other)


def _words(text: str) -> str:
    """Without what clients trim: white space around the whole and at the ends of lines."""
    return "\n".join(line.rstrip() for line in text.splitlines()).strip()


def _value(arguments: str) -> Any:
    if not arguments.strip():
        return {}
    try:
        return json.loads(arguments, parse_int=_number, parse_float=_number, parse_constant=_number)
    except (ValueError, RecursionError):
        return arguments.strip()


def _number(text: str) -> int | float | None:
    """A number as it comes back from JavaScript, whose numbers are doubles.

    Whole ones lose point and exponent there, zero its sign, and what is not finite becomes null.
    """
    value = float(text)
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() else value
