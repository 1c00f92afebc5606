"""Compiled grammars over the model's vocabulary, kept by what they are made of."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Any

import tiktoken
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.tiktoken import lltokenizer_from_encoding

from k2hybrid.chat.closing import Closer
from k2hybrid.chat.lark import Lark, Schema, UnsupportedSchemaError, lark_of, loose_lark
from k2hybrid.chat.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# Of all grammars that are kept, characters of their rules: compiled they take a hundred times as much.
MAX_KEPT_CHARS = 2 << 20
ANY_OBJECT: Schema = {"type": "object"}
# Compilation takes a second or so at most, one token's mask tens of milliseconds; beyond, the grammar fails.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=5_000_000,
    step_lexer_fuel=200_000,
    step_max_items=100_000,
    max_lexer_states=100_000,
    max_grammar_size=500_000,
    verbose_errors=False,  # they would quote the client's text
)


@dataclass(frozen=True, slots=True, eq=False)
class Grammar:
    """A compiled grammar, not begun.

    `exact`: its texts need no validation. `end`: the shortest text found, as tokens; None if none was found.
    `keys` and `pieces`: hints for `Closer.shortest_end`.
    """

    matcher: LLMatcher
    exact: bool
    end: tuple[int, ...] | None
    keys: tuple[tuple[int, ...], ...]
    pieces: tuple[tuple[int, ...], ...]
    chars: int = 0  # of its rules

    def begun(self) -> LLMatcher:
        """A matcher at the beginning of a text."""
        return self.matcher.deep_copy()


class Grammars:
    """Compiles and keeps. Thread-safe; compiling takes milliseconds, building the vocabulary a second.

    The vocabulary is built by a thread of its own, begun at once.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.closer = Closer(tokenizer)
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._kept_chars = 0
        self._vocabulary: LLTokenizer | None = None
        self._building = threading.Thread(target=self._build, name="k2hybrid-grammar", daemon=True)
        self._building.start()

    def of_schema(self, schema: Schema) -> Grammar:
        """JSON that fits `schema`, or at least what of it can be written as a grammar (then not `exact`)."""
        text = json.dumps(schema, sort_keys=True, separators=(",", ":"))
        return self._get(f"schema {text}", lambda: self._schema(schema))

    def of_choices(self, texts: tuple[str, ...]) -> Grammar:
        """Exactly one of `texts`, none of which begins another."""
        lark = "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts) + "\n"
        return self._get(lark, lambda: self._compiled(Lark(lark, exact=True)) or _failed(texts))

    def _get(self, key: str, make: Any) -> Grammar:
        digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        with self._lock:
            found = self._kept.get(digest)
            if found is not None:
                self._kept.move_to_end(digest)
                return found
        made: Grammar = make()
        with self._lock:
            if digest not in self._kept:
                self._kept[digest] = made
                self._kept_chars += made.chars
            while self._kept_chars > MAX_KEPT_CHARS and len(self._kept) > 1:
                self._kept_chars -= self._kept.popitem(last=False)[1].chars
        return made

    def _schema(self, schema: Schema) -> Grammar:
        for write in (lark_of, partial(lark_of, coarse=True), loose_lark):
            try:
                made = self._compiled(write(schema))
            except (UnsupportedSchemaError, RecursionError, TypeError, ValueError) as error:
                log.debug("no grammar: %s", error)
                continue
            if made is not None:
                return made
        # What no grammar can hold is left to validation.
        value = json.dumps(ANY_OBJECT if _is_object(schema) else True)
        return self._compiled(Lark(f"start: %json {value}\n", exact=False)) or _failed(value)

    def _compiled(self, lark: Lark) -> Grammar | None:
        matcher = LLMatcher(self.vocabulary, lark.text, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            log.debug("a grammar is refused: %s", matcher.get_error())
            return None
        keys = tuple(
            tuple(self.tokenizer.encode(json.dumps(key, ensure_ascii=False) + ":")) for key in lark.keys
        )
        quoted = (json.dumps(piece, ensure_ascii=False)[1:-1] + '"' for piece in lark.pieces)
        pieces = tuple(tuple(self.tokenizer.encode(piece)) for piece in quoted)
        end = self.closer.shortest_end(matcher, keys=keys, pieces=pieces)
        known = None if end is None else tuple(end)
        return Grammar(matcher, lark.exact, known, keys, pieces, len(lark.text))

    @property
    def vocabulary(self) -> LLTokenizer:
        """The vocabulary as llguidance has it; waits for it."""
        self._building.join()
        if self._vocabulary is None:
            raise RuntimeError("the vocabulary could not be prepared for grammars; the log says why")
        return self._vocabulary

    def _build(self) -> None:
        try:
            plain = self.tokenizer.encoding
            encoding = tiktoken.Encoding(
                "k2",
                pat_str=plain._pat_str,
                mergeable_ranks=plain._mergeable_ranks,
                special_tokens=dict(self.tokenizer.specials),
            )
            self._vocabulary = lltokenizer_from_encoding(
                encoding, n_vocab=self.tokenizer.vocab_size, eos_token=min(self.tokenizer.stop_ids)
            )
        except Exception:
            log.exception("preparing the vocabulary for grammars failed")


def _is_object(schema: Schema) -> bool:
    return isinstance(schema, dict) and schema.get("type", "object") == "object"


def _failed(what: object) -> Grammar:
    raise RuntimeError(f"no grammar for {str(what)[:80]!r}")
