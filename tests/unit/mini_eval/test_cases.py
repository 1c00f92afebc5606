"""What is asked: enough of everything, of the test side alone; and the hand-written set."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from k2hybrid.errors import EvaluationError
from k2hybrid.mini_eval import decimals, frames, handwritten, words
from k2hybrid.mini_eval.cases import CELLS, KINDS, TYPES, author_of, cells_of, draw
from k2hybrid.mini_eval.domains import DOMAINS
from k2hybrid.mini_eval.split import frames_of, side_of
from k2hybrid.mini_eval.words import Lexicon

HANDWRITTEN = handwritten.load()
FRAME_LISTS: list[tuple[str, ...]] = [
    tuple(value)
    for value in [*vars(frames).values(), *(d.frames for d in DOMAINS), decimals._FRAMES]
    if isinstance(value, list | tuple) and len(set(value)) >= 5
]


def test_500_cases_fill_every_cell() -> None:
    cases = draw(author_of(None), 0, 500)
    counts = Counter(cell for case in cases for cell in cells_of(case))
    assert set(counts) == set(CELLS)
    assert {cell: n for cell, n in counts.items() if n < 30} == {}
    kinds = Counter(case.last.kind for case in cases)
    assert kinds == {"none": 100, "one": 200, "parallel": 100, "sequential": 100}
    # No cell is easy because it goes with one kind: each size has every kind that it can have.
    for size in ("2-4 tools", "5-8 tools"):
        assert {case.last.kind for case in cases if size in cells_of(case)} == set(KINDS)
    for name in TYPES:
        assert sum(f"argument {name}" in cells_of(case) for case in cases) == sum(
            name in case.types for case in cases
        )


def test_fewer_cases_are_the_first_of_more() -> None:
    author = author_of(None)
    assert draw(author, 7, 12) == draw(author, 7, 30)[:12]
    assert draw(author, 7, 12) != draw(author, 8, 12)


def test_shipped_words_and_drawn_values_are_of_the_test_side() -> None:
    shipped = words.kept_words()
    assert {side_of("word", word) for word in shipped} == {"test"}
    with pytest.raises(ValueError, match="0 words"):
        Lexicon(shipped, "train")
    lexicon = author_of(None).lexicon
    assert {side_of("word", w) for w in [*lexicon.nouns, *lexicon.cities, *lexicon.people]} == {"test"}


def test_a_fifth_of_every_list_of_frames_is_for_testing_only() -> None:
    assert len(FRAME_LISTS) > 50
    for listed in FRAME_LISTS:
        train, dev, test = (set(frames_of(side, listed)) for side in ("train", "dev", "test"))
        assert train | dev | test == set(listed)
        assert len(train) + len(dev) + len(test) == len(set(listed))
        assert len(test) >= 0.2 * len(set(listed))


def test_prompts_hold_the_words_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text(
        "Granit ladder\nlantern Straße x7 a marble pebble quarry ribbon saddle thimble velvet walnut\n"
    )
    lexicon = author_of(path).lexicon
    assert lexicon.nouns == (
        "granit ladder lantern marble pebble quarry ribbon saddle thimble velvet walnut".split()
    )
    cases = draw(author_of(path), 0, 30)
    told = " ".join(case.last.user for case in cases).lower()
    assert sum(word in told for word in lexicon.nouns) > 5


def test_words_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    few = tmp_path / "few.txt"
    few.write_text("one two 3 4 5 6 7 8 9 10 11 12")
    with pytest.raises(EvaluationError, match=r"few\.txt: .*2 words"):
        author_of(few)
    with pytest.raises(EvaluationError, match="cannot read"):
        author_of(tmp_path / "none.txt")


# ---- the hand-written set ------------------------------------------------------------------------


def test_the_hand_written_set_is_large_and_has_no_double() -> None:
    assert len(HANDWRITTEN) >= 60
    assert len({(case.last.user, str(case.tools)) for case in HANDWRITTEN}) == len(HANDWRITTEN)
    assert len({case.topic for case in HANDWRITTEN}) >= 10
    assert {case.last.kind for case in HANDWRITTEN} == {"none", "one", "parallel"}


def problem(value: Any, schema: dict[str, Any]) -> str | None:
    """Why `value` is not of `schema`, or None: types, enum, required and unknown properties, items."""
    kinds: dict[str, Any] = {
        "string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict,
    }  # fmt: skip
    kind = schema.get("type")
    if kind and (
        not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind in ("integer", "number"))
    ):
        return f"{value!r} is no {kind}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{value!r} is none of {schema['enum']}"
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        wrong = {*schema.get("required", ())} - value.keys() or value.keys() - properties.keys()
        if wrong and properties:
            return f"missing or unknown: {wrong}"
        return next(filter(None, (problem(v, properties.get(k, {})) for k, v in value.items())), None)
    if isinstance(value, list):
        return next(filter(None, (problem(v, schema.get("items", {})) for v in value)), None)
    return None


@pytest.mark.parametrize("cases", [HANDWRITTEN, draw(author_of(None), 4, 100)], ids=["hand-written", "drawn"])
def test_expected_calls_are_of_a_declared_tool_and_its_schema(cases: list[Any]) -> None:
    for case in cases:
        schemas = {t["function"]["name"]: t["function"]["parameters"] for t in case.tools}
        assert len(schemas) == len(case.tools)
        for call in case.last.calls:
            assert problem(call.arguments, schemas[call.name]) is None, case.last.user


def filled(frame: str) -> re.Pattern[str]:
    parts = re.split(r"({\w+})", frame)
    return re.compile("".join("(.+)" if part.startswith("{") else re.escape(part) for part in parts), re.I)


def test_hand_written_prompts_are_not_the_trainers_frames() -> None:
    """Ours are short everyday sentences, so one or two of other people's may be the same by chance."""
    seen = [
        frame
        for domain in DOMAINS
        for frame in frames_of("train", domain.frames)
        if len(re.findall(r"\w+", re.sub(r"{\w+}", "", frame))) >= 3  # fewer fit almost anything
    ]
    patterns = [filled(frame) for frame in seen]
    same = [case for case in HANDWRITTEN if any(p.fullmatch(case.last.user) for p in patterns)]
    assert len(same) <= len(HANDWRITTEN) // 40
