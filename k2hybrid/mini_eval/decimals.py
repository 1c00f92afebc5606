"""Questions on which of two decimals is bigger, worked out digit by digit."""

from __future__ import annotations

import random
from decimal import Decimal

from k2hybrid.mini_eval.conversation import Turn
from k2hybrid.mini_eval.split import Side, frames_of, side_of

_MORE = ["bigger", "larger", "greater", "higher"]
_LESS = ["smaller", "lower"]
# fmt: off
_FRAMES = [
    "which one is {w}, {a} or {b}?", "Which one is {w}, {a} or {b}?", "Which is {w}, {a} or {b}?",
    "which is {w}: {a} or {b}?", "Which number is {w}, {a} or {b}?", "What is {w}, {a} or {b}?",
    "What's {w}: {a} or {b}?", "{a} or {b}, which one is {w}?", "{a} and {b}: which is {w}?",
    "Tell me which is {w}, {a} or {b}.", "Of {a} and {b}, which is {w}?",
    "Compare {a} and {b}. Which is {w}?", "which of {a} and {b} is {w}?", "Is {a} {w} than {b}?",
    "is {a} or {b} {w}?", "Which one is {w} {a} or {b}",
]
_TAILS = [
    "", "", "", " think carefully.", " Think carefully.", " Think step by step.", " Be careful.",
    " Please think.",
]
# fmt: on


def _number(rng: random.Random, whole: int) -> str:
    places = rng.choice([0, 1, 1, 1, 2, 2, 2, 3])
    if not places:
        return str(whole)
    return f"{whole}." + "".join(rng.choice("0123456789") for _ in range(places))


def draw_pair(rng: random.Random, side: Side) -> tuple[str, str]:
    """Two decimals of one side of the split, often with the same whole part or common first digits."""
    while True:
        whole = rng.randint(0, 9) if rng.random() < 0.75 else rng.randint(10, 99)
        a = _number(rng, whole)
        draw = rng.random()
        if draw < 0.7:
            b = _number(rng, whole)
        elif draw < 0.85:
            b = _number(rng, rng.randint(0, 20))
        else:
            b = _number(rng, rng.randint(0, 99))
        if side_of("pair", " ".join(sorted((a, b)))) == side:
            return a, b


def compare(a: str, b: str, word: str, user: str = "") -> Turn:
    """The worked answer to `user`: both padded to one shape, sign beside sign up to the first difference."""
    wholes, parts = zip(*(((*x.split("."), "")[:2]) for x in (a, b)), strict=True)
    width, places = max(map(len, wholes)), max(map(len, parts))
    padded = [
        whole.zfill(width) + ("." + part.ljust(places, "0") if places else "")
        for whole, part in zip(wholes, parts, strict=True)
    ]
    steps = []
    for x, y in zip(*padded, strict=True):
        steps.append(x + y + ("=" if x == y else "<" if x < y else ">"))
        if x != y:
            break
    left, right = Decimal(a), Decimal(b)
    if left == right:
        which, verdict = "equal", "They are equal."
    else:
        which, winner = ("first", a) if (left > right) == (word in _MORE) else ("second", b)
        verdict = f"{winner} is {word}."
    think = f"{padded[0]} and {padded[1]}: {' '.join(steps)} {word} {which}. {verdict}"
    return Turn(user, verdict, think)


def question(rng: random.Random, side: Side) -> Turn:
    """One question with its worked answer."""
    a, b = draw_pair(rng, side)
    word = rng.choice(_MORE) if rng.random() < 0.75 else rng.choice(_LESS)
    user = rng.choice(frames_of(side, _FRAMES)).format(w=word, a=a, b=b) + rng.choice(_TAILS)
    return compare(a, b, word, user)
