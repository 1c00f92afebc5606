"""A rendered conversation: pieces of plain text and control tokens, then ids."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from k2hybrid.chat.growing import Held
from k2hybrid.chat.tokenizer import Tokenizer

# What a renderer yields: plain text, or the id of a control token. Text never becomes a control token later
# on.
Piece = str | int


@dataclass(frozen=True, slots=True)
class Prompt:
    """`ids` to run, and the same as `text` (control tokens by their spelling).

    `first_call_index` tool calls lie in the history: the next one is `functions.{name}:{first_call_index}`.
    `in_reasoning`: the prompt ends inside an open `<think>`. Both go to `ChatStream`.
    """

    ids: list[int]
    text: str
    first_call_index: int = 0
    in_reasoning: bool = False


def merged(pieces: Iterable[Piece]) -> list[Piece]:
    """Join neighbouring texts and drop empty ones, so that each is tokenized undivided."""
    result: list[Piece] = []
    texts: list[str] = []
    for piece in pieces:
        if isinstance(piece, str):
            texts.append(piece)
            continue
        if text := "".join(texts):
            result.append(text)
        texts = []
        result.append(piece)
    if text := "".join(texts):
        result.append(text)
    return result


class PieceCache:
    """Ids of recently seen pieces: a conversation comes back with every turn, and only its end is new.

    Thread-safe. Holds `max_chars` of text, least recently used out first.
    """

    def __init__(self, tokenizer: Tokenizer, max_chars: int = 4 << 20) -> None:
        self._tokenizer = tokenizer
        self._left = max_chars
        self._lock = threading.Lock()
        self._ids: OrderedDict[str, list[int]] = OrderedDict()

    def encode(self, text: str) -> list[int]:
        """As `Tokenizer.encode`. The list is shared: not to be changed."""
        with self._lock:
            ids = self._ids.get(text)
            if ids is not None:
                self._ids.move_to_end(text)
                return ids
        ids = self._tokenizer.encode(text)
        with self._lock:
            if text not in self._ids:
                self._ids[text] = ids
                self._left -= len(text)
                while self._left < 0:
                    dropped, _ = self._ids.popitem(last=False)
                    self._left += len(dropped)
        return ids


@dataclass(frozen=True, slots=True)
class _Assembled:
    """`ids` and `text` of pieces; behind each piece there are so many of them."""

    pieces: list[Piece]
    ids: list[int]
    text: str
    ids_behind: list[int]
    chars_behind: list[int]


_NOTHING = _Assembled([], [], "", [], [])


class Assembler:
    """Pieces → ids and text; of a conversation that grew only what is new is put together. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._names = tokenizer.special_names
        self._cache = PieceCache(tokenizer)
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._held: Held[_Assembled] = Held()

    def assemble(self, pieces: list[Piece]) -> tuple[list[int], str]:
        """Tokenize the plain pieces, `merged` before, and put the control tokens between them.

        `pieces` is kept: not to be changed.
        """
        with self._lock:
            number, found, known = self._held.longest(pieces, lambda assembled: assembled.pieces)
        base = found or _NOTHING
        n_ids, n_chars = (base.ids_behind[known - 1], base.chars_behind[known - 1]) if known else (0, 0)
        ids, texts = base.ids[:n_ids], [base.text[:n_chars]]
        ids_behind, chars_behind = base.ids_behind[:known], base.chars_behind[:known]
        for piece in pieces[known:]:
            if isinstance(piece, str):
                ids += self._cache.encode(piece)
            else:
                ids.append(piece)
                piece = self._names[piece]
            texts.append(piece)
            n_chars += len(piece)
            ids_behind.append(len(ids))
            chars_behind.append(n_chars)
        assembled = _Assembled(pieces, ids, "".join(texts), ids_behind, chars_behind)
        with self._lock:
            grown = number if known == len(base.pieces) else None
            self._held.put(next(self._numbers), assembled, n_chars, grown)
        return list(ids), assembled.text


def split_specials(text: str, tokenizer: Tokenizer) -> Iterator[Piece]:
    """Pieces of a trusted text, in which spellings of special tokens mean the tokens."""
    start = 0
    for match in tokenizer.special_pattern.finditer(text):
        yield text[start : match.start()]
        yield tokenizer.specials[match.group()]
        start = match.end()
    yield text[start:]
