"""The head of a conversation as token ids, with the places of all names that its tools declare."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tiktoken

from k2hybrid.mini_eval.conversation import DEFAULT_SYSTEM, Conversation, tools_json

DECLARE = "<|im_system|>tool_declare<|im_middle|>"

# Where a head looks that has nothing to look at: the first token.
NOTHING = 0

# Kind of guide → pairs (position that looks, position to look at), counted from the prefix on.
Guides = dict[str, list[tuple[int, int]]]


def head_text(conversation: Conversation) -> str:
    """What conversations with the same tools and system prompt share."""
    head = ""
    if conversation.tools:
        head += f"{DECLARE}{tools_json(conversation.tools)}<|im_end|>"
    system = DEFAULT_SYSTEM if conversation.system is None else conversation.system
    return head + f"<|im_system|>system<|im_middle|>{system}<|im_end|>"


def encode_head(conversation: Conversation, encoding: tiktoken.Encoding) -> list[int]:
    """Ids of `head_text`."""
    return encoding.encode(head_text(conversation), allowed_special="all")


def as_text(ids: Iterable[int]) -> str:
    """One character a token: `str.find` looks for sequences of tokens."""
    return "".join(map(chr, ids))


class Declared:
    """The head of a conversation (None: nothing) with the places of its tools' and parameters' names."""

    def __init__(self, encoding: tiktoken.Encoding, conversation: Conversation | None = None) -> None:
        self.encoding = encoding
        self.ids = encode_head(conversation, encoding) if conversation else []
        tools = conversation.tools if conversation else ()
        self.tools = {tool["function"]["name"]: tool["function"] for tool in tools}
        self.ranges: dict[str, tuple[int, int]] = {}
        self.names: dict[str, int] = {}
        self.parameters: dict[str, dict[str, int]] = {}
        # Of the name of a tool (None) or of a parameter: only its last token knows it all.
        self.ends: dict[tuple[str, str | None], int] = {}
        text = as_text(self.ids)
        at = len(self._encode(DECLARE + "["))
        starts: list[int] = []
        ends = [NOTHING]
        for tool in tools:
            name = tool["function"]["name"]
            end = at + len(self._encode(tools_json((tool,))[1:-1]))
            self.ranges[name] = (at, end)
            self.names[name] = self._find(text, '"name":"', name, '"', at, end)
            starts.append(self.names[name])
            ends.append(self._end(name, None, starts[-1]))
            places = self.parameters[name] = {}
            place = self.names[name]
            for parameter in sorted(properties(tool["function"])):
                place = self._find(text, '"', parameter, '":{', place, end)
                places[parameter] = place
                starts.append(place)
                ends.append(self._end(name, parameter, place))
            at = end + 1
        self.guides: Guides = {"previous": list(zip(starts, ends[:-1], strict=True))}

    def _end(self, tool: str, parameter: str | None, start: int) -> int:
        self.ends[tool, parameter] = end = start + len(self._encode(parameter or tool)) - 1
        return end

    def inside(self, tool: str, parameter: str | None, before: str, text: str, after: str) -> int | None:
        """Where `text` stands in the declaration of a tool, behind the name of a parameter."""
        start, end = self.ranges[tool]
        if parameter is not None:
            start = self.parameters[tool][parameter]
        found = self._find(as_text(self.ids[:end]), before, text, after, start, end)
        return found if found >= 0 else None

    def _find(self, ids: str, before: str, text: str, after: str, start: int, end: int) -> int:
        led = self._encode(before)
        found = ids.find(as_text(led + self._encode(text) + self._encode(after)), start, end)
        return found + len(led) if found >= 0 else -1

    def _encode(self, text: str) -> list[int]:
        return self.encoding.encode(text, allowed_special="all")


def properties(function: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a declared function."""
    found: dict[str, Any] = function.get("parameters", {}).get("properties", {})
    return found
