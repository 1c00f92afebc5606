"""Items of the Responses dialect → messages of a conversation, and items as they are kept. Pure.

What stands between two inputs is one assistant message to the model, however many items it came in:
reasoning, text and calls in a row are joined. Items that mean nothing here (searches run elsewhere,
compactions, types yet to come) are passed over; images and files, which this model cannot read, leave a word
in their place, except in the message that is to be answered.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from k2hybrid.errors import RequestError
from k2hybrid.server.fields import Fields, wrong_type, wrong_value
from k2hybrid.server.parts import omitted
from k2hybrid.server.responses_tools import Toolbox, custom_arguments
from k2hybrid.server.sealed import Unsealing
from k2hybrid.types import Message, ToolCall

Item = Mapping[str, Any]
Content = str | tuple[Mapping[str, Any], ...] | None

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Calls of tools that OpenAI's own models know; each with the field that says what was called for.
_BUILT_IN = {"local_shell_call": "action", "shell_call": "action", "apply_patch_call": "operation"}
_CALLS = frozenset({"function_call", "custom_tool_call", *_BUILT_IN})
_OUTPUTS = frozenset(f"{kind}_output" for kind in _CALLS)
_TEXT_PARTS = frozenset({"input_text", "output_text", "text", "summary_text", "reasoning_text"})
_OMITTED = {
    "input_image": "image",
    "computer_screenshot": "image",
    "input_file": "file",
    "input_audio": "audio",
}

# --- ids ------------------------------------------------------------------------------------------

# Every id of ours holds its response's. `in` marks an item that the client brought and had no id for.
_OURS = re.compile(r"[a-z]+_([0-9a-f]{32})_(in)?\d+")
_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}


def item_id(kind: str, response_id: str, index: int, *, brought: bool = False) -> str:
    """The id of a response's item: an output, or an input that was `brought`."""
    stem = response_id.removeprefix("resp_")
    return f"{_PREFIXES.get(kind, 'item')}_{stem}_{'in' if brought else ''}{index}"


def call_id(response_id: str, index: int) -> str:
    """The id by which the result of a call is brought back."""
    return f"call_{response_id.removeprefix('resp_')}_{index}"


def owner(identity: str) -> str | None:
    """The response that has an item with this id, if it can be one of ours."""
    match = _OURS.fullmatch(identity)
    return f"resp_{match[1]}" if match else None


def _origin(item: Fields) -> str | None:
    """The response that this item was an output of; some clients keep the call's id alone."""
    for key in ("id", "call_id"):
        value = item.value.get(key)
        match = _OURS.fullmatch(value) if isinstance(value, str) else None
        if match and not match[2]:
            return f"resp_{match[1]}"
    return None


# --- items as they are kept -----------------------------------------------------------------------


def kind_of(item: Fields) -> str:
    """The type of an item; without one it is a message."""
    return item.text("type") or "message"


def kept_item(item: Fields, response_id: str, index: int) -> Item:
    """`item` as the API lists it: with an id, a status, and parts for content."""
    kind = kind_of(item)
    full: dict[str, Any] = {"type": kind, "status": "completed"}
    full["id"] = item_id(kind, response_id, index, brought=True)
    full |= {key: value for key, value in item.value.items() if value is not None}
    if kind == "message" and isinstance(full.get("content", ""), str):
        text = full.get("content", "")
        if full.get("role") == "assistant":
            full["content"] = [{"type": "output_text", "text": text, "annotations": []}]
        else:
            full["content"] = [{"type": "input_text", "text": text}]
    return full


# --- items as messages ----------------------------------------------------------------------------


@dataclass(slots=True)
class _Said:
    """An assistant message as it is put together."""

    response_id: str | None
    reasoning: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)

    def message(self) -> Message:
        # Pieces of one answer of ours follow upon each other to the letter.
        between = "" if self.response_id else "\n\n"
        return Message(
            "assistant",
            between.join(self.content),
            reasoning=between.join(self.reasoning) or None,
            tool_calls=tuple(self.calls),
            response_id=self.response_id,
        )


def messages_of(items: Sequence[Fields], box: Toolbox, unsealing: Unsealing) -> Iterator[Message]:
    """The conversation that `items` are."""
    newest = _to_be_answered(items)
    said: _Said | None = None
    for i, item in enumerate(items):
        kind = kind_of(item)
        assistant = kind == "reasoning" or kind in _CALLS
        assistant = assistant or (kind == "message" and _role(item) == "assistant")
        if assistant:
            origin = _origin(item)
            if said is not None and origin and said.response_id and origin != said.response_id:
                yield said.message()
                said = None
            said = said or _Said(origin)
            said.response_id = said.response_id or origin
            _say(said, item, kind, box, unsealing)
            continue
        message = _message(item, kind, strict=i == newest)
        if message is None:
            continue
        if said is not None:
            yield said.message()
            said = None
        yield message
    if said is not None:
        yield said.message()


def _to_be_answered(items: Sequence[Fields]) -> int | None:
    """Where the user's message stands that nothing of an answer follows yet."""
    for i in range(len(items) - 1, -1, -1):
        kind = kind_of(items[i])
        if kind == "message" and _role(items[i]) != "system":
            return i if _role(items[i]) == "user" else None
        if kind in _CALLS or kind in _OUTPUTS:
            return None
    return None


def _role(item: Fields) -> str:
    role = item.required_text("role")
    if role not in _ROLES:
        raise wrong_value(item.name("role"), f"{role[:40]!r} is unknown; one of {', '.join(_ROLES)}")
    return _ROLES[role]


def _message(item: Fields, kind: str, *, strict: bool) -> Message | None:
    """What is not the assistant's; None for what has no meaning here."""
    if kind == "message":
        return Message(_role(item), _content(item, "content", strict=strict))
    if kind in _OUTPUTS:
        identity = item.text("call_id") or item.text("id")
        return Message("tool", _output(item), tool_call_id=identity)
    return None


def _say(said: _Said, item: Fields, kind: str, box: Toolbox, unsealing: Unsealing) -> None:
    if kind == "message":
        said.content += filter(None, [_text(_content(item, "content"))])
    elif kind == "reasoning":
        said.reasoning += filter(None, [_reasoning(item, unsealing)])
    else:
        said.calls.append(_call(item, kind, box))


def _reasoning(item: Fields, unsealing: Unsealing) -> str:
    """What was thought: as it is told, or sealed by this server, or at least in summary."""
    told = _text(_content(item, "content"))
    sealed = item.text("encrypted_content")
    return told or unsealing.text(sealed) or _text(_content(item, "summary"), "\n\n")


def _call(item: Fields, kind: str, box: Toolbox) -> ToolCall:
    identity = item.text("call_id") or item.text("id") or ""
    if kind in _BUILT_IN:
        arguments = orjson.dumps(item.child(_BUILT_IN[kind]).value).decode()
        return ToolCall(identity, kind.removesuffix("_call"), arguments)
    name = item.required_text("name")
    called = box.find(name, item.text("namespace")) or name
    if kind == "custom_tool_call":
        return ToolCall(identity, called, custom_arguments(item.text("input") or ""))
    value = item.value.get("arguments")
    if isinstance(value, dict):
        return ToolCall(identity, called, orjson.dumps(value).decode())
    return ToolCall(identity, called, item.text("arguments") or "{}")


def _output(item: Fields) -> Content:
    """A result. Some tools' are objects or lists of them, which the model reads as JSON."""
    value = item.value.get("output")
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) and "type" in part for part in value):
        return _content(item, "output")
    return orjson.dumps(value).decode()


def _content(item: Fields, key: str, *, strict: bool = False) -> Content:
    value = item.value.get(key)
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong_type(item.name(key), "a string or an array of parts", value)
    return tuple(_part(part, f"{item.name(key)}[{i}]", strict=strict) for i, part in enumerate(value))


def _part(value: Any, path: str, *, strict: bool) -> Mapping[str, Any]:
    if isinstance(value, str):
        return {"type": "text", "text": value}
    part = Fields.of(value, path)
    kind = part.required_text("type")
    text = part.text("refusal" if kind == "refusal" else "text")
    if text is None and (kind in _TEXT_PARTS or kind == "refusal"):
        raise RequestError(f"{path}.text is missing", param=f"{path}.text", code="missing_required")
    if text is None and strict:
        raise RequestError(
            f"{path}.type {kind[:40]!r} cannot be read: this model takes text only",
            param=f"{path}.type",
            code="unsupported_content",
        )
    if text is None:
        text = omitted(_OMITTED.get(kind, "part"))
    return {"type": "text", "text": text}


def _text(content: Content, between: str = "") -> str:
    return content if isinstance(content, str) else between.join(part["text"] for part in content or ())
