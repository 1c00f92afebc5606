"""A rendered conversation: pieces of plain text and control tokens, then ids."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

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


def assemble(
    pieces: list[Piece],
    tokenizer: Tokenizer,
    encode: Callable[[str], list[int]],
    first_call_index: int,
    in_reasoning: bool,
) -> Prompt:
    """Tokenize the plain pieces, `merged` before, with `encode` and put the control tokens between them."""
    ids: list[int] = []
    texts: list[str] = []
    for piece in pieces:
        if isinstance(piece, str):
            ids += encode(piece)
            texts.append(piece)
        else:
            ids.append(piece)
            texts.append(tokenizer.special_names[piece])
    return Prompt(ids, "".join(texts), first_call_index, in_reasoning)


def split_specials(text: str, tokenizer: Tokenizer) -> Iterator[Piece]:
    """Pieces of a trusted text, in which spellings of special tokens mean the tokens."""
    start = 0
    for match in tokenizer.special_pattern.finditer(text):
        yield text[start : match.start()]
        yield tokenizer.specials[match.group()]
        start = match.end()
    yield text[start:]
