"""The validator: reasons, strict JSON, its process, and agreement with another implementation."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from k2hybrid.chat.schema import Schema, admit
from k2hybrid.chat.validate_worker import MAX_KEPT
from k2hybrid.chat.validation import MAX_TEXT_CHARS, Validator

DAYS = admit(
    {
        "type": "object",
        "properties": {
            "days": {"type": "integer", "maximum": 3},
            "a/b~": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["days"],
        "additionalProperties": False,
    },
    "p",
)


@pytest.fixture(scope="module")
def validator() -> Iterator[Validator]:
    made = Validator(timeout_s=30.0)  # two seconds may not do where other tests run beside these
    yield made
    made.close()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"days":3}', None),
        (' {"days": 3.0, "a/b~": []} ', None),
        ('{"days":50}', "at /days: 50 is greater than the maximum of 3"),
        ('{"days":1,"a/b~":["x",1]}', 'at /a~1b~0/1: 1 is not of type "string"'),
        ("{}", 'at the top: "days" is a required property'),
        ('{"days":1,"more":2}', 'at the top: undeclared properties: "more"'),
        ("[" + "1," * 500 + "1]", 'at the top: the value is not of type "object"'),
        ("", "not JSON at character 0"),
        ('{"days":1', "not JSON at character 9"),
        ('{"days":1} x', "not JSON at character 11"),
        ("{'days':1}", "not JSON at character 1"),
        ('{"days":01}', "not JSON at character 9"),
        ('{"days":1,"days":2}', "an object has a property twice"),
        ('{"days":NaN}', "NaN is not JSON"),
        ('{"days":-Infinity}', "-Infinity is not JSON"),
        ('{"days":1e999}', "a number is too large"),
        ('{"days":' + "1" * 5000 + "}", "not JSON"),
        ('{"days":1,"a/b~":["\\ud800"]}', "it holds half of a surrogate pair"),
        ('{"days":1,"a/b~":["\x00"]}', "not JSON at character 19"),
        ("[" * 129 + "]" * 129, "nested more than 128 levels deep"),
        ("[" * 100_000, "nested more than 128 levels deep"),
    ],
)
def test_reasons(validator: Validator, text: str, reason: str | None) -> None:
    assert validator.check(DAYS, text) == reason


def test_reasons_are_short_whatever_the_text(validator: Validator) -> None:
    long = "x" * 100_000
    text = json.dumps({long: 1, "days": long, "a/b~": [{long: long}]})
    assert len(validator.check(DAYS, text) or "") < 500
    for schema in (
        {"type": "string"},
        {"enum": [1]},
        {"not": True},
        {"propertyNames": {"maxLength": 1}},
        {"maxProperties": 1},
        {"properties": {"days": {"pattern": "^y"}}},
        {"additionalProperties": {"type": "null"}},
        {"anyOf": [{"type": "null"}, {"required": [f"{long}y"]}]},
        {"oneOf": [True, True]},
        {"unevaluatedProperties": False},
        {"dependentRequired": {"days": [f"{long}y"]}},
    ):
        reason = validator.check(admit(schema, "p"), text)
        assert reason is not None, schema
        assert len(reason) < 500, schema


def test_a_text_that_is_too_long(validator: Validator) -> None:
    assert validator.check(DAYS, " " * (MAX_TEXT_CHARS + 1)) == f"longer than {MAX_TEXT_CHARS} characters"
    assert validator.check(admit(True, "p"), '"' + "ü" * 1_000_000 + '"') is None


def test_booleans_are_schemas(validator: Validator) -> None:
    assert validator.check(admit(True, "p"), "null") is None
    assert validator.check(admit(False, "p"), "null") is not None


def test_formats_say_nothing(validator: Validator) -> None:
    assert validator.check(admit({"format": "email"}, "p"), '"x"') is None


def test_forgotten_schemas_are_sent_again(validator: Validator) -> None:
    schemas = [admit({"const": i}, "p") for i in range(MAX_KEPT + 20)]
    for _ in range(2):
        assert all(validator.check(schema, str(i)) is None for i, schema in enumerate(schemas))
    assert validator.check(schemas[0], "1") is not None


def test_the_process_starts_late_and_leaves_nothing_behind() -> None:
    before = set(os.listdir("/proc/self/fd"))
    validator = Validator(timeout_s=30.0)
    assert validator.pid is None
    assert validator.check(DAYS, '{"days":1}') is None
    pid = validator.pid
    assert pid is not None
    assert validator.check(DAYS, '{"days":2}') is None
    assert validator.pid == pid
    validator.close()
    validator.close()
    assert validator.pid is None
    assert not os.path.exists(f"/proc/{pid}")  # reaped
    assert set(os.listdir("/proc/self/fd")) == before
    assert "ending" in (validator.check(DAYS, '{"days":1}') or "")


# --- against another implementation ---------------------------------------------------------------

WORDS = ("", "a", "ab", "abc", "b1", "x-1", "é", "🙂")
NAMES = ("a", "b", "ab", "x-1")
PATTERNS = ("^a", "b$", "^[a-z]+$", "[0-9]", "^(a|b)*$", "^.{2,3}$")


def drawn_value(rng: random.Random, levels: int) -> Any:
    kind = rng.randrange(8 if levels else 6)
    match kind:
        case 0:
            return None
        case 1:
            return rng.random() < 0.5
        case 2 | 3:
            return rng.choice((-2, 0, 1, 2, 3, 6, 7, 1.0, 2.5, 10**20))
        case 4 | 5:
            return rng.choice(WORDS)
        case 6:
            return [drawn_value(rng, levels - 1) for _ in range(rng.randrange(4))]
    return {rng.choice(NAMES): drawn_value(rng, levels - 1) for _ in range(rng.randrange(4))}


def drawn_schema(rng: random.Random, levels: int) -> Any:
    if rng.random() < 0.08:
        return rng.random() < 0.8
    schema: dict[str, Any] = {}
    if rng.random() < 0.4:
        kinds = ("string", "number", "integer", "boolean", "object", "array", "null")
        schema["type"] = rng.sample(kinds, rng.randint(1, 4)) if rng.random() < 0.7 else rng.choice(kinds)
    for _ in range(rng.randint(0, 3)):
        schema.update(drawn_keyword(rng, levels))
    return schema


def drawn_keyword(rng: random.Random, levels: int) -> dict[str, Any]:
    small = rng.randrange(4)
    bound = rng.choice(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"))
    count = rng.choice(("min", "max")) + rng.choice(("Length", "Items", "Properties"))
    flat: list[dict[str, Any]] = [
        {"enum": [drawn_value(rng, 1) for _ in range(3)]},
        {"const": drawn_value(rng, 1)},
        {bound: rng.choice((0, 1, 2.5))},
        {"multipleOf": rng.choice((1, 2, 3, 0.5))},
        {count: small},
        {"pattern": rng.choice(PATTERNS)},
        {"required": rng.sample(NAMES, min(small, 2))},
        {"uniqueItems": rng.random() < 0.7},
        {"dependentRequired": {rng.choice(NAMES): [rng.choice(NAMES)]}},
    ]
    if not levels or rng.random() < 0.4:
        return rng.choice(flat)

    def sub() -> Any:
        return drawn_schema(rng, levels - 1)

    deep: list[Callable[[], dict[str, Any]]] = [
        lambda: {"properties": {name: sub() for name in rng.sample(NAMES, 2)}},
        lambda: {"patternProperties": {rng.choice(PATTERNS): sub()}},
        lambda: {"additionalProperties": sub()},
        lambda: {"properties": {"a": sub()}, "additionalProperties": rng.random() < 0.3},
        lambda: {"propertyNames": sub()},
        lambda: {"items": sub()},
        lambda: {"prefixItems": [sub(), sub()]},
        lambda: {"contains": sub(), rng.choice(("minContains", "maxContains")): small},
        lambda: {rng.choice(("allOf", "anyOf", "oneOf")): [sub() for _ in range(rng.randint(1, 3))]},
        lambda: {"not": sub()},
        lambda: {"if": sub(), "then": sub(), "else": sub()},
        lambda: {"dependentSchemas": {rng.choice(NAMES): sub()}},
        lambda: {rng.choice(("unevaluatedProperties", "unevaluatedItems")): sub()},
        lambda: {"$ref": rng.choice(("#/$defs/one", "#/$defs/two"))},
        lambda: {rng.choice(("items", "additionalProperties")): {"$ref": "#"}},
    ]
    return rng.choice(deep)()


@pytest.mark.parametrize("seed", range(12))
def test_it_agrees_with_another_implementation(validator: Validator, seed: int) -> None:
    rng = random.Random(seed)
    valid = 0
    for _ in range(50):
        schema = drawn_schema(rng, 3)
        if isinstance(schema, dict):
            schema["$defs"] = {"one": drawn_schema(rng, 0), "two": {"items": {"$ref": "#/$defs/two"}}}
        admitted: Schema = admit(schema, "p")
        assert admitted.dropped == ()
        oracle = Draft202012Validator(schema)
        for _ in range(6):
            value = drawn_value(rng, 3)
            expected = oracle.is_valid(value)
            valid += expected
            reason = validator.check(admitted, json.dumps(value))
            assert (reason is None) == expected, (schema, value, reason)
    assert 50 < valid < 250  # neither side answers always the same
