"""Text in pieces that know where they come from, put together to token ids with guides for heads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from tools.mini.declared import NOTHING, Declared, Guides, as_text

# Of each word of a name: where it ends, and how the user said it, if they did.
Words = tuple[tuple[int, str | None], ...]


@dataclass
class Example:
    """Token ids; for each, whether predicting it is part of the loss; and where heads are to look."""

    ids: list[int]
    learn: list[bool]
    guides: Guides = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where to look: for `text`, or the piece itself, between `before` and `after` in one of `regions`."""

    regions: tuple[str, ...]
    before: str = ""
    after: str = ""
    text: str | None = None


@dataclass(frozen=True)
class Piece:
    """Text that the assistant says or reads. `copied`: its source. `current`: what it comes after, in the
    declaration. `evidence`: what decides it. `words`: where each of its words ends, and how the user said it.
    `gathers`: which word of the last name decides. `begins`: a verdict found its first token.
    """

    text: str
    learn: bool = False
    copied: Place | int | None = None
    current: int | None = None
    evidence: Place | int | None = None
    words: Words = ()
    gathers: int | None = None
    begins: bool = False
    opens: str | None = None


def assemble(pieces: Iterable[Piece], declared: Declared) -> Example:
    """Pieces behind a head: their ids, and the guides of those that say where they come from."""
    return _Assembly(declared).add_all(pieces)


class _Assembly:
    def __init__(self, declared: Declared) -> None:
        self.declared = declared
        self.example = Example([], [])
        self.text = as_text(declared.ids)
        self.word_ends: list[int] = []
        self.verdict = NOTHING
        self.regions: dict[str, int] = {"all": len(declared.ids)}

    def add_all(self, pieces: Iterable[Piece]) -> Example:
        for piece in pieces:
            self._add(piece)
        return self.example

    def _add(self, piece: Piece) -> None:
        if piece.opens == "user":
            self.regions = {"all": self.regions["all"]}
        if piece.opens is not None:
            self.regions[piece.opens] = len(self.text)
        ids = self.declared.encoding.encode(piece.text, allowed_special="all")
        first = len(self.text) - 1
        if (source := self._look(piece.copied, ids)) is not None:
            pairs = [(first + i, source + i) for i in range(len(ids))]
            self._guide("value", [(first, self.verdict)] if piece.begins else [])
            self._guide("copy", pairs[1:] if piece.begins else pairs)
        elif piece.learn and piece.copied is None:
            self._guide("free", [(first + i, NOTHING) for i in range(len(ids))])
        if piece.current is not None:
            self._guide("current", [(first, piece.current)])
        if (decides := self._look(piece.evidence, ids)) is not None:
            self._guide("evidence", [(first, decides)])
            self.verdict = first
        if piece.gathers is not None:
            self._guide("gather", [(first, self.word_ends[piece.gathers])])
        if piece.words:
            self.word_ends = []
        for end, said in piece.words:
            last = first + len(self.declared.encoding.encode_ordinary(piece.text[:end]))
            self.word_ends.append(last)
            at: int | None = NOTHING
            if said is not None and (at := self._look(Place(("user",), text=said), [])) is not None:
                at += len(self.declared.encoding.encode_ordinary(said)) - 1
            if at is not None:
                self._guide("word", [(last, at)])
        self.text += as_text(ids)
        self.example.ids += ids
        self.example.learn += [piece.learn] * len(ids)

    def _guide(self, kind: str, pairs: list[tuple[int, int]]) -> None:
        if pairs:
            self.example.guides.setdefault(kind, []).extend(pairs)

    def _look(self, place: Place | int | None, ids: list[int]) -> int | None:
        if not isinstance(place, Place):
            return place
        if place.text is not None:
            ids = self.declared.encoding.encode_ordinary(place.text)
        before, after = (self.declared.encoding.encode_ordinary(t) for t in (place.before, place.after))
        wanted = as_text([*before, *ids, *after])
        for region in place.regions:
            if region in self.regions:
                start = self.regions[region]
                while (found := self.text.find(wanted, start)) >= 0:
                    at = found + len(before)
                    if self._whole(at, at + len(ids)):
                        return at
                    start = found + 1
        return None

    def _whole(self, start: int, end: int) -> bool:
        """Whether the tokens are not a part of a longer word or number."""
        decode = self.declared.encoding.decode_single_token_bytes
        left, first = decode(ord(self.text[start - 1]))[-1:], decode(ord(self.text[start]))[:1]
        last = decode(ord(self.text[end - 1]))[-1:]
        right = decode(ord(self.text[end]))[:1] if end < len(self.text) else b""
        return not (left.isalnum() and first.isalnum()) and not (last.isalnum() and right.isalnum())
