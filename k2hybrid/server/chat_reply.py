"""Deltas of a run → OpenAI's chat chunks and completions. Pure: no I/O, no clock.

A whole completion is the sum of the very pieces a stream would have sent, so both say the same.

What the model wrote that is neither text nor a usable call is not dropped: it reaches the client as
`"k2hybrid": {"malformed": [{"text": …, "reason": …}]}` on the message, or on the stream's delta.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from k2hybrid.errors import EngineError
from k2hybrid.server.failures import AnswerCancelledError
from k2hybrid.server.served import ChatRun, Delta, Tokenizer
from k2hybrid.types import (
    Content,
    Event,
    Malformed,
    Reasoning,
    TokenLogprob,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)


@dataclass(frozen=True, slots=True)
class Head:
    """What every chunk and completion of one response starts with."""

    id: str
    created: int  # seconds since 1970
    model: str
    fingerprint: str

    def fields(self, kind: str) -> dict[str, Any]:
        """The common fields, for object type `kind`."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def chunk(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """One stream chunk."""
        return {**self.fields("chat.completion.chunk"), "choices": list(choices), **more}


@dataclass(frozen=True, slots=True)
class Piece:
    """One step of a choice: a chat delta, and the log-probabilities of the content tokens in it."""

    delta: dict[str, Any]
    logprobs: list[dict[str, Any]] | None = None


class Choice:
    """One answer as it grows: tokens in, pieces out, and their sum."""

    def __init__(self, index: int, tokenizer: Tokenizer, *, logprobs: bool) -> None:
        self.index = index
        self._tokenizer = tokenizer
        self._controls = frozenset(tokenizer.specials.values())
        self._want_logprobs = logprobs
        self._held: list[TokenLogprob] = []  # of tokens whose text has not come out yet
        self._pieces: list[Piece] = []

    def push(self, delta: Delta) -> list[Piece]:
        """The pieces that one more token makes."""
        pieces = [Piece(fields) for event in delta.events if (fields := _delta_fields(event))]
        if self._want_logprobs:
            pieces = self._with_logprobs(pieces, delta)
        self._pieces += pieces
        return pieces

    def _with_logprobs(self, pieces: list[Piece], delta: Delta) -> list[Piece]:
        """Give the tokens held back to the first content piece; forget those that became something else."""
        if delta.logprob is not None and delta.logprob.token not in self._controls:
            self._held.append(delta.logprob)
        if not delta.events:
            return pieces
        held, self._held = self._held, []
        out = []
        for piece in pieces:
            if "content" in piece.delta and held:
                piece = Piece(piece.delta, [self._logprob(entry) for entry in held])
                held = []
            out.append(piece)
        return out

    def _logprob(self, entry: TokenLogprob) -> dict[str, Any]:
        top = [self._token_logprob(token, value) for token, value in entry.top]
        return {**self._token_logprob(entry.token, entry.logprob), "top_logprobs": top}

    def _token_logprob(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token)
        # −9999 is how OpenAI spells a probability of zero; JSON has no −inf.
        return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}

    def opening(self, head: Head, **more: Any) -> dict[str, Any]:
        """The first chunk: the role, and empty content."""
        return head.chunk([self._entry({"role": "assistant", "content": ""})], **more)

    def chunk(self, head: Head, piece: Piece, **more: Any) -> dict[str, Any]:
        """The chunk of one piece."""
        return head.chunk([self._entry(piece.delta, piece.logprobs)], **more)

    def closing(self, head: Head, run: ChatRun, **more: Any) -> dict[str, Any]:
        """The last chunk: why it ended, and the usage where the vendor's verifier looks for it."""
        entry = self._entry({}, finish=finish_reason(run))
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
            "logprobs": {"content": logprobs, "refusal": None} if self._want_logprobs else None,
            "finish_reason": finish_reason(run),
        }


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
        case Malformed(text, reason):
            return {"k2hybrid": {"malformed": [{"text": text, "reason": reason}]}}


def _message(deltas: Iterable[dict[str, Any]]) -> dict[str, Any]:
    content: list[str] = []
    reasoning: list[str] = []
    calls: dict[int, dict[str, Any]] = {}
    malformed: list[dict[str, str]] = []
    for delta in deltas:
        content.append(delta.get("content", ""))
        reasoning.append(delta.get("reasoning_content", ""))
        malformed += delta.get("k2hybrid", {}).get("malformed", ())
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
        "content": text if text or not calls else None,
        "reasoning_content": "".join(reasoning) or None,
    }
    if calls:
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
    if malformed:
        message["k2hybrid"] = {"malformed": malformed}
    return message


def finish_reason(run: ChatRun) -> str:
    """OpenAI's word for why the run ended; AnswerCancelledError or EngineError if not by itself."""
    if run.finish_reason == "cancelled":
        raise AnswerCancelledError("the server is shutting down; the answer was cut off")
    if run.finish_reason not in ("stop", "length", "tool_calls"):
        raise EngineError(f"generation ended early: {run.finish_reason}")
    return run.finish_reason


def usage(runs: Sequence[ChatRun]) -> dict[str, Any]:
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
