"""Deltas of a text run → OpenAI's text completion choices. Pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from k2hybrid.server.chat_reply import finish_reason
from k2hybrid.server.served import TextDelta, TextRun, Tokenizer
from k2hybrid.types import CompletionRequest, TokenLogprob

LEAST_LOGPROB = -9999.0  # how OpenAI spells a probability of zero; JSON has no −inf


def prompt_text(request: CompletionRequest, tokenizer: Tokenizer) -> str:
    """What `echo` repeats."""
    if isinstance(request.prompt, str):
        return request.prompt
    hidden = () if request.specials else frozenset(tokenizer.specials.values())
    return tokenizer.decode(token for token in request.prompt if token not in hidden)


@dataclass(slots=True)
class Logprobs:
    """The four lists of the dialect, one entry a token."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[str, float]] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def fields(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        }

    def add(self, more: Logprobs) -> None:
        """Append another piece's."""
        self.tokens += more.tokens
        self.token_logprobs += more.token_logprobs
        self.top_logprobs += more.top_logprobs
        self.text_offset += more.text_offset


class TextChoice:
    """One continuation as it grows: deltas in, pieces out, and their sum.

    Args:
        echo: what it begins with, "" for nothing.
    """

    def __init__(self, index: int, request: CompletionRequest, tokenizer: Tokenizer, echo: str) -> None:
        self.index = index
        self._tokenizer = tokenizer
        self._hidden = frozenset() if request.specials else frozenset(tokenizer.specials.values())
        self._sum = Logprobs() if request.sampling.logprobs is not None else None
        self._held: list[TokenLogprob] = []  # of tokens whose text has not come out yet
        self._text = echo

    def opening(self) -> dict[str, Any] | None:
        """The piece that echoes the prompt, if that is wanted."""
        return self._entry(self._text) if self._text else None

    def push(self, delta: TextDelta) -> dict[str, Any] | None:
        """The piece that one more token makes, if any text came out."""
        if self._sum is not None and delta.logprob is not None and delta.logprob.token not in self._hidden:
            self._held.append(delta.logprob)
        if not delta.text:
            return None
        piece = self._taken() if self._sum is not None else None
        self._text += delta.text
        return self._entry(delta.text, piece)

    def _taken(self) -> Logprobs:
        """The entries of the tokens held, the first of which begins where the text so far ends."""
        piece, raw = Logprobs(), b""
        for entry in self._held:
            piece.tokens.append(self._spelling(entry.token))
            piece.token_logprobs.append(max(entry.logprob, LEAST_LOGPROB))
            piece.top_logprobs.append(
                {self._spelling(token): max(value, LEAST_LOGPROB) for token, value in entry.top}
            )
            piece.text_offset.append(len(self._text) + len(raw.decode("utf-8", "ignore")))
            raw += self._tokenizer.token_bytes(entry.token)
        self._held = []
        if self._sum is not None:
            self._sum.add(piece)
        return piece

    def _spelling(self, token: int) -> str:
        """A token as text, or as OpenAI spells what is none by itself."""
        raw = self._tokenizer.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def closing(self, run: TextRun) -> dict[str, Any]:
        """The last piece: why it ended."""
        return self._entry("", finish=finish_reason(run))

    def completion(self, run: TextRun) -> dict[str, Any]:
        """The whole choice, after the run's end."""
        return self._entry(self._text, self._sum, finish=finish_reason(run))

    def _entry(
        self, text: str, logprobs: Logprobs | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        return {
            "text": text,
            "index": self.index,
            "logprobs": None if logprobs is None else logprobs.fields(),
            "finish_reason": finish,
        }


def summed(usages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The usage of several prompts together."""
    if len(usages) == 1:
        return usages[0]
    total: dict[str, Any] = {}
    for one in usages:
        for key, value in one.items():
            if isinstance(value, dict):
                total[key] = summed([total[key], value]) if key in total else value
            else:
                total[key] = total.get(key, 0) + value
    return total
