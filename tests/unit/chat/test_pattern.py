"""Patterns rewritten for every engine: the same texts match, whichever reads them."""

from __future__ import annotations

import json
import random
import re

import jsonschema_rs
import pytest
from llguidance import LLMatcher, LLTokenizer

from k2hybrid.chat.pattern import MAX_CHARS, PatternError, UnsupportedPatternError, portable

TEXTS = [
    *(
        "",
        "a",
        "b",
        "ab",
        "aab",
        "a.b",
        "a-b",
        "A",
        "_",
        "5",
        "12",
        "-x",
        "{",
        "}",
        "a{,5}",
        "&",
        "/",
        "$",
        "^",
    ),
    *("\n", "\t", "\x08", "\x01", " ", "\u00a0", "\ufeff", "\u2028", "é", "١", "東", "😀", "😁", "foo bar"),
]


def in_python(pattern: str, text: str) -> bool:
    # Python's $ matches before a last line end too; ECMA-262's, without the m flag, does not.
    return re.search(pattern.replace("$", r"\Z"), text) is not None


def in_validator(pattern: str, text: str) -> bool:
    schema = {"pattern": pattern}
    return jsonschema_rs.Draft202012Validator(
        schema, pattern_options=jsonschema_rs.RegexOptions(), offline=True
    ).is_valid(text)


def in_grammar(pattern: str, text: str) -> bool:
    vocabulary = LLTokenizer("byte")
    grammar = LLMatcher.grammar_from_json_schema(json.dumps({"type": "string", "pattern": pattern}))
    matcher = LLMatcher(vocabulary, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = vocabulary.tokenize_str(json.dumps(text, ensure_ascii=False))
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


@pytest.mark.parametrize(
    ("pattern", "matching"),
    [
        (r"^\d+$", ["5", "12"]),
        (r"^\D$", [text for text in TEXTS if len(text) == 1 and text != "5"]),
        (r"^\w$", ["a", "b", "A", "_", "5"]),
        (r"^\s$", ["\n", "\t", " ", "\u00a0", "\ufeff", "\u2028"]),
        ("^.$", [text for text in TEXTS if len(text) == 1 and text not in "\n\u2028"]),
        (r"^[^\S]$", ["\n", "\t", " ", "\u00a0", "\ufeff", "\u2028"]),
        ("^[a&&b]$", ["a", "b", "&"]),
        (r"^[\w-.]$", ["a", "b", "A", "_", "5"]),
        (r"^[\b]$", ["\x08"]),
        ("^[^]$", [text for text in TEXTS if len(text) == 1]),
        ("^{$", ["{"]),
        ("^}$", ["}"]),
        ("a{,5}", ["a{,5}"]),
        (r"^\cA$", ["\x01"]),
        (r"^\x61$", ["a"]),
        (r"^\u00e9$", ["é"]),
        (r"^\ud83d\ude00$", ["😀"]),
        (r"^\u{1F600}$", ["😀"]),
        ("^[😀-😁]$", ["😀", "😁"]),
        (r"^\/$", ["/"]),
        (r"^\$$", ["$"]),
        ("^$", [""]),
        ("^(?<name>a)(?:b)$", ["ab"]),
        ("^a+?b$", ["ab", "aab"]),
        ("^(a|)b$", ["b", "ab"]),
        ("^a{0,2}b$", ["b", "ab", "aab"]),
        ("bar|^b$", ["b", "foo bar"]),
    ],
)
def test_what_matches(pattern: str, matching: list[str]) -> None:
    written = portable(pattern)
    for match in (in_python, in_validator, in_grammar):
        assert [text for text in TEXTS if match(written, text)] == matching, match.__name__


@pytest.mark.parametrize("pattern", [r"^\p{L}$", r"^\p{Lu}|\P{L}$"])
def test_categories_match_alike(pattern: str) -> None:
    written = portable(pattern)
    assert [in_validator(written, text) for text in TEXTS] == [in_grammar(written, text) for text in TEXTS]


def test_random_patterns_match_alike() -> None:
    rng = random.Random(6)
    atoms = ["a", "b", ".", r"\d", r"\w", r"\S", "[ab-]", "[^a]", r"\.", "-", "{", "é", "(?:a|b)", "(x|ab)"]
    repeats = ["", "", "", "*", "+", "?", "{2}", "{1,3}", "{0,}", "*?"]
    for _ in range(300):
        branches = [
            rng.choice(["^", ""])
            + "".join(rng.choice(atoms) + rng.choice(repeats) for _ in range(rng.randint(0, 4)))
            + rng.choice(["$", ""])
            for _ in range(rng.randint(1, 3))
        ]
        pattern = "|".join(branches)
        written = portable(pattern)
        for text in rng.sample(TEXTS, 6):
            expected = in_python(written, text)
            assert in_validator(written, text) == expected, (pattern, text)
            assert in_grammar(written, text) == expected, (pattern, text)


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "(?=a)b",
            "(?!a)b",
            "(?<=a)b",
            r"(a)\1",
            r"\bfoo\b",
            "(?i)a",
            "(?P<n>a)",
            r"\Aa\Z",
            r"\p{Script=Greek}",
        ),
        *("[]", r"[^\s\S]", r"\01", r"\ud800", "a{1000000}", "(a{1000}){1000}", "((a{99}){99}){99}"),
    ],
)
def test_what_engines_lack(pattern: str) -> None:
    with pytest.raises(UnsupportedPatternError):
        portable(pattern)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        *(
            ("[", "']'"),
            ("(", "'\\)'"),
            (")", "'\\('"),
            ("*a", "nothing to repeat"),
            ("a**", "nothing to repeat"),
        ),
        *(("a{2}{3}", "nothing to repeat"), ("{2}", "nothing to repeat"), ("a{3,2}", "out of bounds")),
        *(
            ("a{9999999999}", "out of bounds"),
            ("[b-a]", "ends before"),
            ("a\\", "backslash"),
            (r"\xg", "digits"),
        ),
        *((r"\c1", "letter"), (r"\u{110000}", "beyond Unicode"), ("(" * 99 + ")" * 99, "levels deep")),
        ("a" * (MAX_CHARS + 1), "longer"),
    ],
)
def test_what_is_malformed(pattern: str, reason: str) -> None:
    with pytest.raises(PatternError, match=reason) as caught:
        portable(pattern)
    assert not isinstance(caught.value, UnsupportedPatternError)
