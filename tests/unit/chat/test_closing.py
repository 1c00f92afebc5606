"""Endings of half-written JSON: they end it, soon, and leave the matcher as it was."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from k2hybrid.chat.closing import Quotes, after
from k2hybrid.chat.grammar import Grammars
from k2hybrid.chat.tokenizer import Tokenizer
from k2hybrid.config import MINI_MODEL

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 2},
        "code": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
        "when": {"type": "string", "format": "date-time"},
        "count": {"type": "integer", "multipleOf": 7, "minimum": 50},
        "kind": {"enum": ["long one", "longer one", 3, None]},
        "items": {
            "type": "array",
            "minItems": 2,
            "items": {
                "type": "object",
                "properties": {"a": {"type": "boolean"}, "b": {"type": "number"}, "c": {"type": "string"}},
                "required": ["b", "a"],
            },
        },
    },
    "required": ["items", "code", "count"],
}
WHOLE: dict[str, Any] = {
    "kind": "longer one",
    "city": 'Ab "x\\ y} ] né',
    "items": [{"c": "{", "a": True, "b": -1.5e3}, {"b": 0, "a": False}, {"a": True, "b": 12}],
    "when": "2024-02-29T12:13:14Z",
    "code": "ABC-1234",
    "count": 77,
}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(Tokenizer.load(Path(MINI_MODEL)))


@pytest.mark.parametrize("indent", [None, 2])
def test_every_beginning_can_be_ended(grammars: Grammars, indent: int | None) -> None:
    tokenizer = grammars.tokenizer
    grammar = grammars.of_schema(SCHEMA)
    assert grammar.exact
    matcher = grammar.begun()
    state: Quotes = "outside"
    text = b""
    longest = 0
    for token in tokenizer.encode(json.dumps(WHOLE, ensure_ascii=False, indent=indent)):
        assert matcher.consume_token(token), text
        text += tokenizer.token_bytes(token)
        state = after(state, tokenizer.token_bytes(token))
        end = grammars.closer.shortest_end(matcher, state, grammar.keys)
        assert end is not None, text
        longest = max(longest, len(end))
        value = json.loads(text + b"".join(map(tokenizer.token_bytes, end)))
        jsonschema.validate(value, SCHEMA)
    assert json.loads(text) == WHOLE  # looking for endings changed nothing
    assert matcher.is_accepting()
    assert longest < 200


def test_where_quotes_put_one() -> None:
    rng = random.Random(5)
    for _ in range(200):
        value = {"".join(rng.choices('ab"\\{', k=3)): "".join(rng.choices('x"\\ \n}', k=6)) for _ in range(3)}
        data = json.dumps(value).encode()
        cut = rng.randrange(len(data))
        whole = after(after("outside", data[:cut]), data[cut:])
        assert whole == "outside"
        inside = after("outside", data[:cut]) != "outside"
        try:
            json.loads(data[:cut] + b"]" + data[cut:])
            valid = True
        except ValueError:
            valid = False
        # A bracket put in anywhere leaves JSON valid within strings only (and not within an escape).
        assert not valid or inside
