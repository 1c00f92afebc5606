"""Histories come back with every turn, longer by a little: what is known of them need not be done again.

Standard library only: the process that renders templates keeps such histories, too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

MAX_HELD = 8  # histories
MAX_HELD_CHARS = 8 << 20  # of all of them together

T = TypeVar("T")


def alike(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items both begin with alike."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


def chars_of(pieces: Iterable[str | int]) -> int:
    """Characters of the texts among them."""
    return sum([len(piece) for piece in pieces if isinstance(piece, str)])


class Held(Generic[T]):
    """The newest few histories by their number. Two that are told the same hold the same."""

    def __init__(self, most: int = MAX_HELD, max_chars: int = MAX_HELD_CHARS) -> None:
        self._most, self._max_chars = most, max_chars
        self._left = max_chars
        self._kept: OrderedDict[int, tuple[T, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def newest_first(self) -> Iterable[tuple[int, T]]:
        """Numbers and histories."""
        return ((number, history) for number, (history, _) in reversed(self._kept.items()))

    def longest(
        self, items: Sequence[Any], of: Callable[[T], Sequence[Any]]
    ) -> tuple[int | None, T | None, int]:
        """The history whose items (`of`) begin like `items` for longest: number, itself, and for how many."""
        found: tuple[int | None, T | None, int] = None, None, 0
        for number, history in self.newest_first():
            if (count := alike(of(history), items)) > found[2]:
                found = number, history, count
        return found

    def get(self, number: int | None) -> T | None:
        """The history of that number, if it is held."""
        return None if number is None or number not in self._kept else self._kept[number][0]

    def put(self, number: int, history: T, chars: int, instead_of: int | None = None) -> None:
        """Hold `history`, which has so many characters, and drop the one that it goes on from.

        One of more characters than are held in all is not held.
        """
        self.drop(instead_of)
        self.drop(number)
        if chars > self._max_chars:
            return
        self._kept[number] = (history, chars)
        self._left -= chars
        while len(self._kept) > self._most or self._left < 0:
            self.drop(next(iter(self._kept)))

    def drop(self, number: int | None) -> None:
        """Hold the history of that number no longer, if it is held."""
        if number is not None and number in self._kept:
            self._left += self._kept.pop(number)[1]
