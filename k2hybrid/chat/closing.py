"""How a JSON text that a grammar has begun can end soon. Found by trial on copies of the matcher."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from k2hybrid.chat.tokenizer import Tokenizer

MAX_TOKENS = 1024  # of an ending that is worth finding
BY_CHANCE = 256  # of one that is found by chance
ATTEMPTS = 4

# Where in a JSON text one stands, as far as quotes tell.
Quotes = Literal["outside", "inside", "escaped"]

_CLOSERS = ("}", "]")
_SEPARATORS = (",", ":")
_SMALL = ("null", "true", "false", *"0123456789", "[", "{")
# One value of each format that grammars hold, and of what many patterns ask for.
_SAMPLES = (
    "2000-01-01T00:00:00Z", "00:00:00Z", "2000-01-01", "P1D", "a@b.co", "a.co", "127.0.0.1", "::1",
    "00000000-0000-0000-0000-000000000000", "http://a.co", "/a", "a", "A", "0", "aa0",
)  # fmt: skip


def after(state: Quotes, data: bytes) -> Quotes:
    """Where one stands behind `data`."""
    for byte in data:
        if state == "escaped":
            state = "inside"
        elif byte == 0x22:
            state = "outside" if state == "inside" else "inside"
        elif byte == 0x5C and state == "inside":
            state = "escaped"
    return state


class Closer:
    """Finds endings over one vocabulary. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._quote = tokenizer.encode('"')[0]
        self._closers = self._single_tokens(_CLOSERS)
        self._separators = self._single_tokens(_SEPARATORS)
        self._small = self._single_tokens(_SMALL)
        self._bytes = np.array([self._byte(tokenizer, code) for code in range(256)], np.int64)
        self._samples = [tokenizer.encode(text + '"') for text in _SAMPLES]

    def shortest_end(
        self,
        matcher: LLMatcher,
        state: Quotes = "outside",
        keys: Sequence[Sequence[int]] = (),
        pieces: Sequence[Sequence[int]] = (),
        *,
        seconds: float = 0.2,
    ) -> list[int] | None:
        """Tokens that bring `matcher`, which is left alone, to an end; None if none are found in time.

        Greedy: closes what can be closed, else writes one of `keys` (quoted names with their colon, as
        tokens), else the smallest value, or in a string one of `pieces` (with its closing quote). Where that
        leads nowhere (a pattern, a multiple of seven), it is tried again with chance.
        """
        until = time.monotonic() + seconds
        for attempt in range(ATTEMPTS):
            end = self._attempt(matcher.deep_copy(), state, keys, pieces, until, attempt)
            if end is not None or time.monotonic() > until:
                return end
        return None

    def _attempt(
        self,
        matcher: LLMatcher,
        state: Quotes,
        keys: Sequence[Sequence[int]],
        pieces: Sequence[Sequence[int]],
        until: float,
        seed: int,
    ) -> list[int] | None:
        chance = random.Random(seed) if seed else None
        limit = BY_CHANCE if seed else MAX_TOKENS
        result: list[int] = []
        while len(result) <= limit and not matcher.is_error() and time.monotonic() < until:
            if matcher.is_accepting():
                return result
            chosen = (
                matcher.compute_ff_tokens()
                or (self._in_string(matcher, pieces) if state != "outside" else self._between(matcher, keys))
                or self._any(matcher, chance, small=state == "outside")
            )
            if not chosen or not matcher.consume_tokens(list(chosen)):
                return None
            result += chosen
            for token in chosen:
                state = after(state, self._tokenizer.token_bytes(token))
        return None

    def _in_string(self, matcher: LLMatcher, pieces: Sequence[Sequence[int]]) -> Sequence[int]:
        if matcher.validate_tokens([self._quote]):
            return (self._quote,)
        return self._first_valid(matcher, pieces) or self._first_valid(matcher, self._samples)

    def _between(self, matcher: LLMatcher, keys: Sequence[Sequence[int]]) -> Sequence[int]:
        for token in self._closers:
            if matcher.validate_tokens([token]):
                return (token,)
        if key := self._first_valid(matcher, keys):
            return key
        for token in self._separators:  # the value before it is complete
            if matcher.validate_tokens([token]):
                return (token,)
        return (self._quote,) if matcher.validate_tokens([self._quote]) else ()

    @staticmethod
    def _first_valid(matcher: LLMatcher, sequences: Sequence[Sequence[int]]) -> Sequence[int]:
        for tokens in sequences:
            if matcher.validate_tokens(list(tokens)) == len(tokens):
                return tokens
        return ()

    def _any(self, matcher: LLMatcher, chance: random.Random | None, *, small: bool) -> Sequence[int]:
        """Something small that may come next, white space last."""
        allowed = self._allowed(matcher)
        values = [token for token in self._small if allowed[token]] if small else []
        if values and (chance is None or chance.random() < 0.7):
            return (values[0] if chance is None else chance.choice(values),)
        bytes_ = self._bytes[allowed[self._bytes] != 0]
        if len(bytes_):  # in the order of their codes: white space comes first
            return (int(bytes_[-1] if chance is None else bytes_[chance.randrange(len(bytes_))]),)
        ids = np.flatnonzero(allowed)
        return (int(ids[0]),) if len(ids) else ()

    def _allowed(self, matcher: LLMatcher) -> npt.NDArray[np.uint8]:
        """One byte per plain token: whether it may come next."""
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        return bits[: self._tokenizer.num_ranks]

    @staticmethod
    def _byte(tokenizer: Tokenizer, code: int) -> int:
        return tokenizer.encoding.encode_single_token(bytes([code]))

    def _single_tokens(self, texts: Sequence[str]) -> list[int]:
        return [ids[0] for text in texts if len(ids := self._tokenizer.encode(text)) == 1]
