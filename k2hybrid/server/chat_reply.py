"""Deltas of a run → OpenAI's chat chunks and completions. Pure: no I/O, no clock.

A whole completion is the sum of the very pieces a stream would have sent, so both say the same.

What the model wrote that is neither text nor a usable call is not dropped: it reaches the client as
`"k2hybrid": {"malformed": [{"text": …, "reason": …, "code": …}]}` on the message, or on the stream's delta.

A client that declared `functions` gets its call as `function_call`, once and without an id.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from k2hybrid.errors import EngineError
from k2hybrid.server.failures import AnswerCancelledError
from k2hybrid.server.head import Head
from k2hybrid.server.logprobs import HeldLogprobs
from k2hybrid.server.progress import told_progress
from k2hybrid.server.served import ChatRun, Delta, Run, Tokenizer
from k2hybrid.types import (
    Content,
    Event,
    Malformed,
    PromptProgress,
    Reasoning,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)


@dataclass(frozen=True, slots=True)
class Piece:
    """One step of a choice: a chat delta, and the log-probabilities of the content tokens in it."""

    delta: dict[str, Any]
    logprobs: list[dict[str, Any]] | None = None


class Choice:
    """One answer as it grows: tokens in, pieces out, and their sum.

    Args:
        reasoning: whether the client wants to see it.
        legacy: whether the client knows `function_call` alone.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        *,
        logprobs: bool,
        reasoning: bool = True,
        legacy: bool = False,
    ) -> None:
        self.index = index
        self._reasoning = reasoning
        self._legacy = legacy
        self._logprobs = HeldLogprobs(tokenizer) if logprobs else None
        self._pieces: list[Piece] = []

    def push(self, delta: Delta) -> list[Piece]:
        """The pieces that one more token makes."""
        if self._logprobs is not None:
            self._logprobs.hold(delta)
        pieces = [self._piece(fields) for event in delta.events if (fields := self._fields(event))]
        self._pieces += pieces
        return pieces

    def _piece(self, fields: dict[str, Any]) -> Piece:
        if self._logprobs is None or "content" not in fields:
            return Piece(fields)
        return Piece(fields, self._logprobs.taken() or None)

    def _fields(self, event: Event) -> dict[str, Any] | None:
        if isinstance(event, Reasoning) and not self._reasoning:
            return None
        fields = _delta_fields(event)
        return _legacy_fields(fields) if fields and self._legacy else fields

    def opening(self, head: Head, **more: Any) -> dict[str, Any]:
        """The first chunk: the role, and empty content."""
        return head.chunk([self._entry({"role": "assistant", "content": ""})], **more)

    def chunk(self, head: Head, piece: Piece, **more: Any) -> dict[str, Any]:
        """The chunk of one piece."""
        return head.chunk([self._entry(piece.delta, piece.logprobs)], **more)

    def progress(self, head: Head, progress: PromptProgress, **more: Any) -> dict[str, Any]:
        """A chunk that adds nothing and says, in llama.cpp's words, how far the prompt is."""
        return head.chunk([self._entry({})], prompt_progress=told_progress(progress), **more)

    def closing(self, head: Head, run: ChatRun, **more: Any) -> dict[str, Any]:
        """The last chunk: why it ended, and the usage where the vendor's verifier looks for it."""
        entry = self._entry({}, finish=self._finish_reason(run))
        return head.chunk([{**entry, "usage": usage([run])}], **more)

    def _entry(
        self, delta: dict[str, Any], logprobs: list[dict[str, Any]] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        return {
            "index": self.index,
            "delta": delta,
            "logprobs": None if logprobs is None else {"content": logprobs, "refusal": None},
            "finish_reason": finish,
        }

    def completion(self, run: ChatRun) -> dict[str, Any]:
        """The whole choice, after the run's end."""
        logprobs = [entry for piece in self._pieces for entry in piece.logprobs or ()]
        return {
            "index": self.index,
            "message": _message(piece.delta for piece in self._pieces),
            "logprobs": {"content": logprobs, "refusal": None} if self._logprobs is not None else None,
            "finish_reason": self._finish_reason(run),
        }

    def _finish_reason(self, run: ChatRun) -> str:
        reason = finish_reason(run)
        return "function_call" if reason == "tool_calls" and self._legacy else reason


def _delta_fields(event: Event) -> dict[str, Any] | None:
    match event:
        case Reasoning(text):
            return {"reasoning_content": text}
        case Content(text):
            return {"content": text}
        case ToolCallStart(index, id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": id, "type": "function", "function": function}]}
        case ToolCallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        case ToolCallEnd():
            return None  # the dialect has no word for it
        case Malformed(text, reason, code):
            return {"k2hybrid": {"malformed": [{"text": text, "reason": reason, "code": code}]}}


def _legacy_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The first call as `function_call`; a second one, for which there is no room, stays what it is."""
    calls = fields.get("tool_calls", ())
    return {"function_call": calls[0]["function"]} if calls and calls[0]["index"] == 0 else fields


def _message(deltas: Iterable[dict[str, Any]]) -> dict[str, Any]:
    content: list[str] = []
    reasoning: list[str] = []
    calls: dict[int, dict[str, Any]] = {}
    malformed: list[dict[str, str]] = []
    function_call: dict[str, str] = {}
    for delta in deltas:
        content.append(delta.get("content", ""))
        reasoning.append(delta.get("reasoning_content", ""))
        malformed += delta.get("k2hybrid", {}).get("malformed", ())
        for key, text in delta.get("function_call", {}).items():
            function_call[key] = function_call.get(key, "") + text
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                calls[part["index"]] = {
                    "id": part["id"],
                    "type": "function",
                    "function": dict(part["function"]),
                }
            else:
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    text = "".join(content)
    message: dict[str, Any] = {
        "role": "assistant",
        "content": text if text or not (calls or function_call) else None,
        "reasoning_content": "".join(reasoning) or None,
    }
    if function_call:
        message["function_call"] = function_call
    if calls:
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
    if malformed:
        message["k2hybrid"] = {"malformed": malformed}
    return message


def finish_reason(run: Run) -> str:
    """OpenAI's word for why the run ended; AnswerCancelledError or EngineError if not by itself."""
    if run.finish_reason == "cancelled":
        raise AnswerCancelledError("the server is shutting down; the answer was cut off")
    if run.finish_reason not in ("stop", "length", "tool_calls"):
        raise EngineError(f"generation ended early: {run.finish_reason}")
    return run.finish_reason


def usage(runs: Sequence[Run]) -> dict[str, Any]:
    """Token counts of finished runs over one prompt; the prompt counts once."""
    first = runs[0].usage
    completion = sum(run.usage.completion_tokens for run in runs)
    return {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": first.prompt_tokens + completion,
        "cached_tokens": first.cached_tokens,  # the vendor's place for it
        "prompt_tokens_details": {"cached_tokens": first.cached_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": sum(run.usage.reasoning_tokens for run in runs),
        },
    }
