"""Deltas of a run → frames of Anthropic's message stream, and the whole message as their sum. Pure.

What the model wrote that is neither text nor a usable call is not dropped: it reaches the client as
`"k2hybrid": {"malformed": [{"text": …, "reason": …, "code": …}]}` on the message, or on `message_delta`. So
do arguments that are no JSON object, which a whole message, having no place for them, shows as `{}`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import orjson

from k2hybrid.server.chat_reply import finish_reason
from k2hybrid.server.messages_request import Display
from k2hybrid.server.sealed import seal
from k2hybrid.server.served import ChatRun, Delta
from k2hybrid.types import (
    Content,
    Event,
    Malformed,
    Reasoning,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)

Frame = dict[str, Any]


class Reply:
    """One answer as it grows: `opening`, then `push` for every delta, then `closing`; all of them frames.

    Args:
        identity: letters and digits that tell this answer from all others.
        model: the name under which it goes out.
    """

    def __init__(self, identity: str, model: str, display: Display) -> None:
        self._identity = identity
        self._model = model
        self._display = display
        self._blocks = 0
        self._open: str | None = None  # the type of the block that is open
        self._written: list[str] = []  # the reasoning or the arguments in it
        self._malformed: list[dict[str, str]] = []

    def opening(self, run: ChatRun) -> Frame:
        """The first frame: the message, still empty. How much of the prompt is cached shows later."""
        message: dict[str, Any] = {
            "id": f"msg_{self._identity}",
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(run.prompt_tokens, 0, 0),
        }
        return {"type": "message_start", "message": message}

    def push(self, delta: Delta) -> list[Frame]:
        """The frames that one more token makes."""
        return [frame for event in delta.events for frame in self._frames(event)]

    def closing(self, run: ChatRun, asked: int | None) -> list[Frame]:
        """The last frames, after the run's end; `asked` tokens of output were wanted at most."""
        reason = _stop_reason(run, asked)
        stopped_by = run.stop_sequence if reason == "stop_sequence" else None
        ending: Frame = {
            "type": "message_delta",
            "delta": {"stop_reason": reason, "stop_sequence": stopped_by},
            "usage": {
                **_usage(run.usage.prompt_tokens, run.usage.cached_tokens, run.usage.completion_tokens),
                "output_tokens_details": {"thinking_tokens": run.usage.reasoning_tokens},
            },
        }
        frames = self._close()
        if self._malformed:
            ending["k2hybrid"] = {"malformed": self._malformed}
        return [*frames, ending, {"type": "message_stop"}]

    def _frames(self, event: Event) -> list[Frame]:
        match event:
            case Reasoning(text):
                return self._reasoning(text)
            case Content(text):
                frames = self._begin("text", {"type": "text", "text": ""})
                return [*frames, self._delta({"type": "text_delta", "text": text})]
            case ToolCallStart(index, _, name):
                # Clients hold ids to [A-Za-z0-9_-]+; the model's own form comes back by order.
                identity = f"toolu_{self._identity}_{index}"
                block = {"type": "tool_use", "id": identity, "name": name, "input": {}}
                return [*self._close(), *self._begin("tool_use", block)]
            case ToolCallArguments(_, text):
                self._written.append(text)
                return [self._delta({"type": "input_json_delta", "partial_json": text})]
            case ToolCallEnd():
                return self._close()
            case Malformed(text, reason, code):
                self._malformed.append({"text": text, "reason": reason, "code": code})
                return []

    def _reasoning(self, text: str) -> list[Frame]:
        if self._display == "none":
            return []
        frames = self._begin("thinking", {"type": "thinking", "thinking": "", "signature": ""})
        if self._display == "text":
            return [*frames, self._delta({"type": "thinking_delta", "thinking": text})]
        self._written.append(text)
        return frames

    def _begin(self, kind: str, block: dict[str, Any]) -> list[Frame]:
        """A block of this kind is open afterwards."""
        if self._open == kind:
            return []
        frames = self._close()
        self._open = kind
        start = {"type": "content_block_start", "index": self._blocks, "content_block": block}
        return [*frames, start]

    def _close(self) -> list[Frame]:
        """No block is open afterwards."""
        if self._open is None:
            return []
        frames = []
        written = "".join(self._written)
        if self._open == "thinking":
            frames.append(self._delta({"type": "signature_delta", "signature": seal(written)}))
        elif self._open == "tool_use" and not _is_object(written or "{}"):
            reason = "the arguments of a call are not a JSON object"
            self._malformed.append({"text": written, "reason": reason, "code": "invalid_tool_call"})
        frames.append({"type": "content_block_stop", "index": self._blocks})
        self._open = None
        self._written.clear()
        self._blocks += 1
        return frames

    def _delta(self, delta: dict[str, Any]) -> Frame:
        return {"type": "content_block_delta", "index": self._blocks, "delta": delta}


def whole_message(frames: Iterable[Frame]) -> dict[str, Any]:
    """What the frames of an answer say in sum, as SDKs add them up."""
    message: dict[str, Any] = {}
    content: list[dict[str, Any]] = []
    pieces: list[list[str]] = []  # of each block's text
    for frame in frames:
        match frame["type"]:
            case "message_start":
                message = dict(frame["message"])
            case "content_block_start":
                content.append(dict(frame["content_block"]))
                pieces.append([])
            case "content_block_delta":
                match frame["delta"]:
                    case {"signature": signature}:
                        content[frame["index"]]["signature"] = signature
                    case {"text": text} | {"thinking": text} | {"partial_json": text}:
                        pieces[frame["index"]].append(text)
            case "message_delta":
                message |= {**frame["delta"], "usage": frame["usage"]}
                if "k2hybrid" in frame:
                    message["k2hybrid"] = frame["k2hybrid"]
    for block, written in zip(content, map("".join, pieces), strict=True):
        if block["type"] == "tool_use":
            # To the letter, as the stream has it: numbers read and written again may be others.
            block["input"] = orjson.Fragment(written) if written and _is_object(written) else {}
        else:
            block[block["type"]] = written  # "text" and "thinking" name their field too
    return {**message, "content": content}


def _is_object(text: str) -> bool:
    """Whether `text` spells a JSON object: 1e999 and deep nesting, which orjson refuses, are JSON too."""
    try:
        return isinstance(orjson.loads(text), dict)
    except orjson.JSONDecodeError:
        pass
    try:
        value = json.loads(text, parse_int=str, parse_float=str, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _stop_reason(run: ChatRun, asked: int | None) -> str:
    """Anthropic's word for why the run ended; raises if it did not end by itself."""
    reason = finish_reason(run)
    if reason == "tool_calls":
        return "tool_use"
    if reason == "length":
        clamped = asked is not None and run.max_tokens < asked
        return "model_context_window_exceeded" if clamped else "max_tokens"
    return "end_turn" if run.stop_sequence is None else "stop_sequence"


def _usage(prompt: int, cached: int, output: int) -> dict[str, Any]:
    """Cached tokens are not counted as input."""
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": output,
    }
