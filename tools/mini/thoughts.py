"""The lines that are thought before a call, as `k2hybrid.mini_eval.thinking` writes them, in pieces."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from k2hybrid.mini_eval.frames import GET_VERBS
from tools.mini.cues import cue
from tools.mini.declared import NOTHING, Declared, properties
from tools.mini.pieces import Piece, Place, Words


def walk_line(declared: Declared, name: str, serves: bool, user: str, current: int | None) -> Iterator[Piece]:
    """`name:no` or `name:yes name`."""
    place = declared.names[name]
    words = words_said(name, user)
    yield Piece(name, True, place, current, words=words)
    yield Piece(":", True)
    yield from verdict(declared.tools[name], words, user, serves=serves)
    if serves:
        yield Piece(" ", True)
        yield Piece(name, True, place)


def verdict(function: dict[str, Any], words: Words, user: str, *, serves: bool) -> Iterator[Piece]:
    """yes or no, with the words that decide it."""
    decides = deciding(function["name"], words, serves=serves)
    said = next((said for _, said in reversed(words) if said not in (None, *GET_VERBS)), None)
    if serves:
        said = said or cue(function, user)
        yield Piece("yes", True, gathers=decides, evidence=Place(("user",), text=said) if said else None)
    else:
        yield Piece("no", True, gathers=decides, evidence=None if said else NOTHING)


def deciding(name: str, words: Words, *, serves: bool) -> int | None:
    """Which word of a name decides whether the tool serves: one that the user did not say, else the last one.

    None where the words do not tell: tools are asked for in other words, too.
    """
    starts = [0, *(end for end, _ in words)]
    unsaid = [
        i for i, (end, said) in enumerate(words)
        if said is None and name[starts[i] : end].strip("_-.").lower() not in GET_VERBS
    ]  # fmt: skip
    if serves:
        return len(words) - 1 if words and not unsaid else None
    return unsaid[-1] if unsaid else None


def words_said(name: str, user: str) -> Words:
    """For each word of a name its end, and the word as the user said it, if they did."""
    said = {word.lower(): word for word in re.findall(r"[^\W_]+", user)}
    words = re.finditer(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name)
    return tuple((word.end(), said.get(word[0].lower())) for word in words) if user else ()


def call_line(
    declared: Declared, tool: str, arguments: dict[str, Any], index: int, user: str, before: int | None = None
) -> Iterator[Piece]:
    """The line that prepares a call, as `k2hybrid.mini_eval.thinking.call_line` writes it."""
    yield Piece("call ", True, current=before, opens=f"line {index}")
    yield Piece(tool, True, Place(("think", "all"), ":yes "))
    yield Piece(";", True)
    current = declared.ends[tool, None]
    schemas = properties(declared.tools[tool])
    for name in sorted(schemas):
        place = declared.parameters[tool][name]
        words = words_said(name, user)
        yield Piece(name, True, place, current, words=words)
        yield Piece(":", True)
        last_word = len(words) - 1 if words else None
        current = declared.ends[tool, name]
        if name in arguments:
            yield Piece("yes", True, gathers=last_word, evidence=_value_start(arguments[name]))
            yield Piece(" ", True)
            kind = schemas[name]["type"]
            yield Piece(kind, True, declared.inside(tool, name, '"type":"', kind, '"'))
            yield Piece(" ", True)
            yield from _value(declared, tool, name, arguments[name])
            yield Piece(" ", True)
            yield Piece(name, True, place)
        else:
            yield Piece("no", True, gathers=last_word, evidence=NOTHING)
        yield Piece(";", True)


def _value_start(value: Any) -> Place | None:
    """Where the user or a result begins to say a value."""
    while isinstance(value, list | dict):
        value = next(iter(value.values() if isinstance(value, dict) else value), True)
    if isinstance(value, bool):
        return None
    return Place(("results", "user", "all"), text=str(value))


def _value(declared: Declared, tool: str, parameter: str, value: Any, begins: bool = True) -> Iterator[Piece]:
    """A JSON value in pieces: what the user or a result said, and names from the declaration."""
    if isinstance(value, bool):
        yield Piece(json.dumps(value), True)
    elif isinstance(value, str | int | float):
        quote = '"' * isinstance(value, str)
        inner = json.dumps(value, ensure_ascii=False).removeprefix(quote).removesuffix(quote)
        yield Piece(quote, True)
        yield Piece(inner, True, Place(("results", "user", "all")), begins=begins)
        yield Piece(quote, True)
    elif isinstance(value, list):
        yield Piece("[", True)
        for at, each in enumerate(value):
            if at:
                yield Piece(", ", True)
            yield from _value(declared, tool, parameter, each, begins and at == 0)
        yield Piece("]", True)
    else:
        yield Piece("{", True)
        for at, (key, each) in enumerate(value.items()):
            yield Piece(', "' if at else '"', True)
            yield Piece(key, True, declared.inside(tool, parameter, '"', key, '":{'))
            yield Piece('": ', True)
            yield from _value(declared, tool, parameter, each, begins and at == 0)
        yield Piece("}", True)
