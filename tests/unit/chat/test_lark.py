"""Schemas as grammars: what they accept, in which order, and whether they promise too much."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from k2hybrid.chat.grammar import Grammar, Grammars
from k2hybrid.chat.lark import ANY_ORDER, MAX_RULES, UnsupportedSchemaError, lark_of
from k2hybrid.chat.tokenizer import Tokenizer
from k2hybrid.config import MINI_MODEL

TEXT = {"type": "string"}
WHOLE = {"type": "integer"}


def record(properties: dict[str, Any], *required: str, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), **more}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(Tokenizer.load(Path(MINI_MODEL)))


def accepts(grammars: Grammars, grammar: Grammar, text: str) -> bool:
    matcher = grammar.begun()
    ids = grammars.tokenizer.encode(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize("count", [1, 3, 5])
def test_properties_come_in_any_order(grammars: Grammars, count: int) -> None:
    names = [f"p{i}" for i in range(count)]
    schema = record(dict.fromkeys(names, WHOLE), names[-1])
    grammar = grammars.of_schema(schema)
    assert grammar.exact
    for chosen in itertools.chain.from_iterable(itertools.permutations(names, n) for n in range(count + 1)):
        text = json.dumps(dict.fromkeys(chosen, 1))
        assert accepts(grammars, grammar, text) == (names[-1] in chosen), text


def test_up_to_eight_properties_are_free_and_more_keep_their_order(grammars: Grammars) -> None:
    rng = random.Random(3)
    for count in (ANY_ORDER, ANY_ORDER + 1):
        names = [f"p{i:02}" for i in range(count)]
        grammar = grammars.of_schema(record(dict.fromkeys(names, WHOLE), names[2]))
        assert accepts(grammars, grammar, json.dumps(dict.fromkeys(names, 1)))
        assert accepts(grammars, grammar, json.dumps({names[2]: 1}))
        assert not accepts(grammars, grammar, json.dumps({names[1]: 1}))
        shuffled = names[::-1]
        rng.shuffle(shuffled)
        assert accepts(grammars, grammar, json.dumps(dict.fromkeys(shuffled, 1))) == (count <= ANY_ORDER)
        assert not accepts(grammars, grammar, '{"p00":1,"p00":1,"p02":1}')


def test_the_order_of_the_declaration_makes_no_other_grammar() -> None:
    one = record({"b": TEXT, "a": record({"y": TEXT, "x": WHOLE})}, "b")
    other = record({"a": record({"x": WHOLE, "y": TEXT}), "b": TEXT}, "b")
    assert lark_of(one).text == lark_of(other).text


def test_very_many_free_orders_end_in_declared_order() -> None:
    eight = record(dict.fromkeys([f"p{i}" for i in range(8)], WHOLE))
    many = record({f"o{i}": {**eight, "title": str(i)} for i in range(8)})
    assert lark_of(many).text.count("\n") < MAX_RULES * 2


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (record({}), ["{}", "{ }"], ['{"a":1}']),
        ({"type": "object"}, ["{}", '{"a":[1]}'], ["[]"]),
        (record({"a": WHOLE}, additionalProperties=True), ['{"a":1,"z":2}'], ['{"a":"x"}']),
        (record({"a": WHOLE}, additionalProperties=TEXT), ['{"a":1,"z":"x"}'], ['{"z":2}']),
        (record({"a": WHOLE}, "b"), ['{"b":[],"a":1}'], ['{"a":1}']),
        (
            record({"x": {"type": "array", "items": record({"q": WHOLE, "r": TEXT}), "minItems": 1,
                          "maxItems": 2}}),
            ['{"x":[{"r":"a","q":1}]}', '{"x": [ {}, {"q": 2} ]}', "{}"],
            ['{"x":[]}', '{"x":[{},{},{}]}', '{"x":[1]}'],
        ),
        (
            {"$defs": {"n": record({"v": WHOLE, "next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}},
                                   "v")}, "$ref": "#/$defs/n"},
            ['{"next":{"v":1,"next":null},"v":2}', '{"v":1}'],
            ['{"next":null}', '{"v":1,"next":{}}'],
        ),
        (record({"kids": {"type": "array", "items": {"$ref": "#"}}}), ['{"kids":[{"kids":[]},{}]}'],
         ['{"kids":[1]}']),
        ({"type": ["object", "null"], "properties": {"a": WHOLE, "b": WHOLE}}, ["null", '{"b":1,"a":2}'],
         ["1"]),
        (record({'we"ird': TEXT, "ключ": WHOLE, "a b": WHOLE}), ['{"ключ":1,"we\\"ird":"x"}'], ['{"ab":1}']),
        (record({"a": WHOLE, "b": False}), ['{"a":1}', "{}"], ['{"b":1}']),
        ({"allOf": [record({"b": WHOLE, "a": TEXT}, "a")]}, ['{"a":"x","b":1}', '{"b":1,"a":"x"}'], ["{}"]),
        (
            record({"s": {"oneOf": [record({"k": {"const": "x"}, "v": WHOLE}, "k"),
                                    record({"k": {"const": "y"}}, "k")]}}),
            ['{"s":{"v":1,"k":"x"}}', '{"s":{"k":"y"}}'],
            ['{"s":{"v":1,"k":"y"}}'],
        ),
        (record({"m": {"type": "object", "additionalProperties": {"$ref": "#/$defs/t"}}},
                **{"$defs": {"t": record({"u": WHOLE})}}), ['{"m":{"q":{"u":1}}}'], ['{"m":{"q":1}}']),
        (record({"t": {"type": "string", "format": "no-such"}, "d": {"type": "string", "format": "date"}}),
         ['{"t":"x","d":"2000-01-01"}'], ['{"d":"x"}']),
    ],
)  # fmt: skip
def test_what_a_schema_takes(grammars: Grammars, schema: Any, good: list[str], bad: list[str]) -> None:
    grammar = grammars.of_schema(schema)
    assert grammar.exact
    assert grammar.end is not None
    assert accepts(grammars, grammar, grammars.tokenizer.decode(grammar.end))
    for text in good:
        assert accepts(grammars, grammar, text), text
    for text in bad:
        assert not accepts(grammars, grammar, text), text


@pytest.mark.parametrize(
    "odd",
    [
        {"type": "array", "items": WHOLE, "uniqueItems": True},
        {"type": "array", "items": WHOLE, "contains": {"const": 3}},
        {"not": {"const": 1}},
        {"oneOf": [{"type": "integer", "minimum": 0}, {"type": "integer", "maximum": 10}]},
        {"type": "object", "propertyNames": {"pattern": "^a"}},
        {"if": {"type": "string"}, "then": {"minLength": 2}},
        record({"a": WHOLE, "b": WHOLE}, dependentRequired={"a": ["b"]}),
        record({"a": WHOLE}, minProperties=1),
        {"type": "number", "minimum": 1e20},
    ],
)
def test_what_a_grammar_cannot_hold_is_admitted(grammars: Grammars, odd: dict[str, Any]) -> None:
    grammar = grammars.of_schema(record({"x": odd}, "x"))
    assert not grammar.exact
    assert grammar.end is not None


def test_what_nothing_fits_is_refused() -> None:
    with pytest.raises(UnsupportedSchemaError, match="has no value"):
        lark_of(record({"a": False}, "a"))
    with pytest.raises(UnsupportedSchemaError, match="fewer items"):
        lark_of(record({"a": {"type": "array", "items": record({"b": TEXT}), "minItems": 3, "maxItems": 2}}))
    with pytest.raises(UnsupportedSchemaError, match="leads nowhere"):
        lark_of({"$ref": "#/$defs/none"})


def test_choices_are_taken_to_the_letter(grammars: Grammars) -> None:
    grammar = grammars.of_choices(("functions.a-b:3", 'functions."c:3', "functions.a-bc:3"))
    assert accepts(grammars, grammar, "functions.a-b:3")
    assert accepts(grammars, grammar, 'functions."c:3')
    assert not accepts(grammars, grammar, "functions.a-b:33")
    assert not accepts(grammars, grammar, "functions.a")


def test_grammars_are_kept_by_meaning(grammars: Grammars) -> None:
    schema = record({"b": TEXT, "a": WHOLE})
    assert grammars.of_schema(schema) is grammars.of_schema(json.loads(json.dumps(schema)))
    assert grammars.of_schema(record({"a": WHOLE, "b": TEXT})) is grammars.of_schema(schema)


@pytest.mark.parametrize(
    ("more", "exact"),
    [
        ({"additionalProperties": True}, True),
        ({"additionalProperties": TEXT}, True),
        ({"minProperties": 1}, False),
        ({"maxProperties": 3}, False),
        ({"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, False),
        ({"allOf": [record({"c": WHOLE})]}, True),
        ({"allOf": [{"$ref": "#/$defs/more"}], "$defs": {"more": record({"c": WHOLE}, "b")}}, True),
    ],
)
def test_order_is_free_whatever_else_is_said(grammars: Grammars, more: dict[str, Any], exact: bool) -> None:
    grammar = grammars.of_schema(record({"a": TEXT, "b": TEXT}, "b", **more))
    assert grammar.exact == exact
    assert accepts(grammars, grammar, '{"b":"x","a":"y"}')
    assert accepts(grammars, grammar, '{"a":"x","b":"y"}')
    assert not accepts(grammars, grammar, '{"a":1,"b":"y"}')


def test_undeclared_properties_go_anywhere_where_there_may_be_any(grammars: Grammars) -> None:
    free = grammars.of_schema(record({"a": WHOLE, "b/c": WHOLE}, "a", additionalProperties=TEXT))
    for text in ('{"z":"1","a":1,"y/":"2"}', '{"b/c":1,"z":"","a":1}', '{"a":1,"ab":"x","b/cd":"y"}'):
        assert accepts(grammars, free, text), text
    for text in ('{"z":1,"a":1}', '{"a":"x"}', '{"z":"1"}', '{"a":1,"b/c":"x"}'):
        assert not accepts(grammars, free, text), text
    many = record({f"p{i}": WHOLE for i in range(12)}, "p3", additionalProperties=TEXT)
    assert accepts(grammars, grammars.of_schema(many), '{"p3":1,"z":"x"}')


@pytest.mark.parametrize(
    "costly",
    [
        {"type": "integer", "multipleOf": 10_000_019},
        {"type": "string", "allOf": [{"pattern": f"x{i}"} for i in range(24)]},
        {"const": "x" * 100_000},
        {"type": "string", "pattern": "a$b^"},
    ],
)
def test_what_would_cost_the_library_dearly_is_left_to_validation(
    grammars: Grammars, costly: dict[str, Any]
) -> None:
    grammar = grammars.of_schema(record({"x": costly, "y": TEXT}, "x"))
    assert not grammar.exact
    assert grammar.end is not None


def test_a_required_name_that_may_not_be_there_makes_nothing_exact(grammars: Grammars) -> None:
    assert not grammars.of_schema(record({"a": WHOLE}, "b", additionalProperties=False)).exact
