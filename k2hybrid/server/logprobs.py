"""Log-probabilities of the tokens that a text comes from, in OpenAI's words. Pure."""

from __future__ import annotations

from typing import Any

from k2hybrid.server.served import Delta, Tokenizer
from k2hybrid.types import Content, TokenLogprob


class HeldLogprobs:
    """Keeps the log-probabilities of tokens until their text comes out: a character may take several.

    What became something else than text (reasoning, a call) is forgotten.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._controls = frozenset(tokenizer.specials.values())
        self._held: list[TokenLogprob] = []

    def hold(self, delta: Delta) -> None:
        """Take note of a token, before its events are read."""
        if delta.logprob is not None and delta.logprob.token not in self._controls:
            self._held.append(delta.logprob)
        if delta.events and not any(isinstance(event, Content) for event in delta.events):
            self._held.clear()

    def taken(self) -> list[dict[str, Any]]:
        """Those of the text that comes out now."""
        held, self._held = self._held, []
        return [self._entry(entry) for entry in held]

    def _entry(self, entry: TokenLogprob) -> dict[str, Any]:
        top = [self._token(token, value) for token, value in entry.top]
        return {**self._token(entry.token, entry.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token)
        # −9999 is how OpenAI spells a probability of zero; JSON has no −inf.
        return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}
