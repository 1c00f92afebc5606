"""What counts as right: calls equal as values, and results told as whole words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from k2hybrid.mini_eval.client import Said
from k2hybrid.mini_eval.conversation import Call


def same_value(one: Any, other: Any) -> bool:
    """Equality of JSON values: numbers by value, and a boolean is no number (for Python, True == 1)."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one == other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_value(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_value, one, other))
    return type(one) is type(other) and bool(one == other)


def same_calls(said: Sequence[Said], wanted: Sequence[Said]) -> bool:
    """Whether both hold the same calls, in any order."""
    return pair_up(said, [Call(w.name, w.arguments, "") for w in wanted]) is not None


def pair_up(said: Sequence[Said], wanted: Iterable[Call]) -> list[Call] | None:
    """For each call made the expected one that it equals, each used once; None unless all pair up.

    Parallel calls have no order: whichever comes first, each gets its own result.
    """
    left = list(wanted)
    if len(said) != len(left):
        return None
    paired = []
    for call in said:
        alike = (w for w in left if w.name == call.name and same_value(call.arguments, w.arguments))
        found = next(alike, None)
        if found is None:
            return None
        left.remove(found)
        paired.append(found)
    return paired


def tells(answer: str, texts: Iterable[str]) -> bool:
    """Whether every text stands in the answer by itself, not as a part of a longer word or number."""
    return all(
        re.search(rf"(?<![\w-])(?<!\d[.,]){re.escape(text)}(?![\w-])(?![.,]\d)", answer) for text in texts
    )
