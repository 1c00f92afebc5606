"""Draws the cases: every kind, number of tools and type of argument often enough to be judged by itself."""

from __future__ import annotations

import random
import re
from pathlib import Path

from k2hybrid.errors import EvaluationError
from k2hybrid.mini_eval.author import Author
from k2hybrid.mini_eval.conversation import Conversation, Kind
from k2hybrid.mini_eval.words import Lexicon, kept_words

SIZES: dict[str, tuple[int, int]] = {"1 tool": (1, 1), "2-4 tools": (2, 4), "5-8 tools": (5, 8)}
KINDS: dict[Kind, str] = {
    "none": "no call",
    "one": "one call",
    "parallel": "parallel calls",
    "sequential": "sequential calls",
}
TYPES = ("string", "number", "boolean", "enum", "array", "object")
# In the order of the report.
CELLS = (*SIZES, *KINDS.values(), *(f"argument {name}" for name in TYPES))

_DEALT: tuple[Kind, ...] = ("one", "parallel", "one", "none", "sequential")
# Left to chance these types are too rare to judge: of seven single calls four are drawn until they have them.
_WANTED = ("array", None, "boolean", None, "object", None, "enum")


def author_of(words_file: Path | None) -> Author:
    """Writes on the test side: with the test words as shipped, or with all those of a file."""
    if words_file is None:
        return Author(Lexicon(kept_words(), "test"))
    try:
        given = words_file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"cannot read the words in {words_file}: {error}") from error
    # Words become names of tools and parameters, which the API holds to ASCII.
    words = [word for word in dict.fromkeys(w.lower() for w in given) if re.fullmatch(r"[a-z]{2,}", word)]
    try:
        return Author(Lexicon(words, "test", whole=True))
    except ValueError as error:
        raise EvaluationError(f"{words_file}: {error} (of ASCII letters only, two at least)") from error


def draw(author: Author, seed: int, count: int) -> list[Conversation]:
    """The first `count` cases of a seed: a fifth each none, parallel and sequential, two fifths one call."""
    return [_case(author, random.Random(f"case {seed} {i}"), i) for i in range(count)]


def _case(author: Author, rng: random.Random, i: int) -> Conversation:
    turn, place = divmod(i, len(_DEALT))
    kind = _DEALT[place]
    # How many cases of this kind came before: what is dealt in rotation must not go with the kind.
    nth = 2 * turn + (place > 0) if kind == "one" else turn
    sizes = list(SIZES.values())
    least, most = sizes[1 + nth % 2] if kind == "sequential" else sizes[nth % 3]
    wanted = _WANTED[nth % len(_WANTED)] if kind == "one" else None
    while True:
        toolset = author.toolset(rng, rng.randint(least, most))
        if kind == "sequential" and toolset.chain is None:
            continue
        case = author.with_tools(rng, toolset, author.system(rng), kind)
        if case.last.kind == kind and (wanted is None or wanted in case.types):
            return case


def cells_of(case: Conversation) -> list[str]:
    """The cells of the report that a case belongs to."""
    size = next(name for name, (least, most) in SIZES.items() if least <= len(case.tools) <= most)
    return [size, KINDS[case.last.kind], *(f"argument {t}" for t in TYPES if t in case.types)]
