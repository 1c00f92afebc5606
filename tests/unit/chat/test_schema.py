"""Schemas of clients: what is refused and where, what sloppy clients get away with, and what comes out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from k2hybrid.chat import schema as limits
from k2hybrid.chat.schema import Schema, admit, admit_all
from k2hybrid.errors import RequestError


def admitted(schema: Any) -> Any:
    return admit(schema, "tools").value


def refusal(schema: Any) -> str:
    with pytest.raises(RequestError) as caught:
        admit(schema, "tools[0].function.parameters")
    assert caught.value.code == "invalid_schema"
    assert caught.value.param == "tools[0].function.parameters"
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def nested(levels: int, key: str = "items") -> Any:
    schema: Any = {"type": "string"}
    for _ in range(levels):
        schema = {key: [schema]} if key in ("allOf", "anyOf", "prefixItems") else {key: schema}
    return schema


def chain(count: int, way: str) -> dict[str, Any]:
    definitions: dict[str, Any] = {"d0": {"type": "string"}}
    for i in range(count):
        link = {"$ref": f"#/$defs/d{i}"}
        definitions[f"d{i + 1}"] = {
            "ref": link,
            "allOf": {"allOf": [link]},
            "properties": {"properties": {"a": link}},
            "items": {"items": link},
        }[way]
    return {"$defs": definitions, "$ref": f"#/$defs/d{count}"}


PLAIN = {
    "type": "object",
    "properties": {
        "path": {"type": "string", "minLength": 1, "maxLength": 200, "format": "uri"},
        "days": {"type": "integer", "minimum": 0, "exclusiveMaximum": 8, "multipleOf": 2},
        "unit": {"enum": ["C", "F", None]},
        "kind": {"const": None},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1, "uniqueItems": True},
        "point": {"prefixItems": [{"type": "number"}, True], "items": False},
        "any": {"anyOf": [{"type": ["string", "null"]}, {"oneOf": [{"type": "array"}]}]},
    },
    "required": ["path"],
    "additionalProperties": False,
    "patternProperties": {"^x": {"type": "string"}},
    "dependentRequired": {"path": ["days"]},
    "dependentSchemas": {"days": {"required": ["unit"]}},
    "propertyNames": {"maxLength": 20},
    "not": {"required": ["a", "b"]},
    "if": {"required": ["a"]},
    "then": True,
    "else": {"minProperties": 1},
}


def test_a_plain_schema_stays_as_it_is() -> None:
    assert admit(PLAIN, "p") == Schema(PLAIN, ())
    for schema in (True, False, {}):
        assert admit(schema, "p") == Schema(schema, ())


def test_digests_tell_schemas_apart() -> None:
    assert admit({"type": "string"}, "a").digest == admit({"type": "string", "title": "x"}, "b").digest
    assert admit({"type": "string"}, "a").digest != admit({"type": "number"}, "a").digest


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # notes, unknown words and nulls
        ({"title": "T", "description": None, "default": [1], "x-order": 3, "$comment": "c"}, {}),
        ({"type": "object", "properties": None, "required": None, "enum": None}, {"type": "object"}),
        ({"required": ["b"], "properties": {"a": {}}}, {"required": ["b"], "properties": {"a": {}}}),
        ({"properties": {"description": {"type": "string"}, "$ref": {"const": None}}}, None),
        ({"enum": [None], "const": None}, None),
        ({"format": "no-such-format"}, None),
        ({"type": ["string", "string", "null"]}, {"type": ["string", "null"]}),
        ({"required": ["a", "a"]}, {"required": ["a"]}),
        # OpenAPI
        ({"type": "string", "nullable": True}, {"type": ["string", "null"]}),
        (
            {"type": "string", "enum": ["a"], "nullable": True},
            {"type": ["string", "null"], "enum": ["a", None]},
        ),
        ({"type": "string", "nullable": False}, {"type": "string"}),
        ({"enum": ["a"], "nullable": True}, {"anyOf": [{"enum": ["a"]}, {"type": "null"}]}),
        # older drafts
        ({"minimum": 1, "exclusiveMinimum": True}, {"exclusiveMinimum": 1}),
        ({"maximum": 1, "exclusiveMaximum": False}, {"maximum": 1}),
        ({"exclusiveMaximum": True}, {}),
        ({"items": [{}, False]}, {"prefixItems": [{}, False]}),
        ({"items": [True], "additionalItems": False}, {"prefixItems": [True], "items": False}),
        (
            {"dependencies": {"a": ["b"], "c": {"required": ["d"]}}},
            {"dependentRequired": {"a": ["b"]}, "dependentSchemas": {"c": {"required": ["d"]}}},
        ),
        (
            {"properties": {"a": {"type": "string", "required": True}, "b": {"required": False}}},
            {"properties": {"a": {"type": "string"}, "b": {}}, "required": ["a"]},
        ),
        # numbers
        ({"minLength": 2.0, "maxItems": 10**30}, {"minLength": 2, "maxItems": 1 << 31}),
        # surrogates have no UTF-8 form
        ({"const": "\ud800"}, {"const": "\ufffd"}),
    ],
)
def test_what_sloppy_clients_send(given: Any, expected: Any) -> None:
    value = admitted(given)
    assert value == (given if expected is None else expected)
    Draft202012Validator.check_schema(value)
    assert admitted(value) == value


@pytest.mark.parametrize(
    ("schema", "where"),
    [
        ([], ""),
        ("string", ""),
        (None, ""),
        ({"type": 5}, "/type"),
        ({"type": "text"}, "/type"),
        ({"type": []}, "/type"),
        ({"type": ["string", "text"]}, "/type"),
        ({"type": [{}]}, "/type"),
        ({"properties": []}, "/properties"),
        ({"properties": {"a": {"properties": {"b/~": "string"}}}}, "/properties/a/properties/b~1~0"),
        ({"required": "a"}, "/required"),
        ({"required": [1]}, "/required"),
        ({"enum": {}}, "/enum"),
        ({"enum": []}, "/enum"),
        ({"minLength": -1}, "/minLength"),
        ({"minLength": "1"}, "/minLength"),
        ({"minLength": True}, "/minLength"),
        ({"maxItems": 1.5}, "/maxItems"),
        ({"minimum": "0"}, "/minimum"),
        ({"exclusiveMinimum": "0"}, "/exclusiveMinimum"),
        ({"multipleOf": 0}, "/multipleOf"),
        ({"uniqueItems": 1}, "/uniqueItems"),
        ({"format": 1}, "/format"),
        ({"pattern": 1}, "/pattern"),
        ({"pattern": "(a"}, "/pattern"),
        ({"patternProperties": {"(a": {}}}, "/patternProperties/(a"),
        ({"allOf": []}, "/allOf"),
        ({"allOf": {}}, "/allOf"),
        ({"anyOf": [{}, 5]}, "/anyOf/1"),
        ({"items": "string"}, "/items"),
        ({"items": [{"type": "x"}]}, "/prefixItems/0/type"),
        ({"additionalProperties": "no"}, "/additionalProperties"),
        ({"dependentRequired": {"a": "b"}}, "/dependentRequired/a"),
        ({"$ref": 5}, "/$ref"),
        ({"$ref": "#/$defs/a"}, "/$ref"),
        ({"$ref": "#a"}, "/$ref"),
        ({"$ref": "#/allOf/01", "allOf": [{}, {}]}, "/$ref"),
        ({"$ref": "other.json"}, "/$ref"),
        ({"$ref": "https://example.org/schema.json#/a"}, "/$ref"),
        ({"$ref": "#/$defs/a", "$defs": {"a": 5}}, "/$defs/a"),
        ({"minimum": float("nan")}, ""),
        ({"maximum": float("inf")}, ""),
        ({"const": {1, 2}}, ""),
        ({"const": 10**400}, ""),
    ],
)
def test_what_is_refused(schema: Any, where: str) -> None:
    message = refusal(schema)
    assert (f" at {where}: " in message) if where else (" at " not in message), message


def test_a_null_in_parameters_is_no_schema_but_in_keywords_is_nothing() -> None:
    assert admitted({"items": None, "type": None, "$ref": None}) == {}


# --- references -----------------------------------------------------------------------------------


def test_references_come_out_as_definitions() -> None:
    schema = {
        "$id": "https://example.org/s.json",
        "$schema": "http://json-schema.org/draft-07/schema#",
        "definitions": {
            "a<b>/c": {"type": "string", "title": "x"},
            "named": {"$anchor": "here", "type": "null"},
            "unused": {"type": "integer"},
        },
        "items": {"$ref": "#/definitions/a%3Cb%3E~1c", "description": "beside"},
        "contains": {"$ref": "#here"},
        "not": {"$ref": "https://example.org/s.json#/definitions/named"},
        "properties": {
            "self": {"$ref": "#"},
            "again": {"$ref": "#/properties/deep/allOf/0"},
            "deep": {"allOf": [True]},
        },
    }
    value = admitted(schema)
    assert value == {
        "items": {"$ref": "#/$defs/d0"},
        "contains": {"$ref": "#/$defs/d1"},
        "not": {"$ref": "#/$defs/d1"},
        "properties": {"self": {"$ref": "#"}, "again": {"$ref": "#/$defs/d2"}, "deep": {"allOf": [True]}},
        "$defs": {"d0": {"type": "string"}, "d1": {"type": "null"}, "d2": True},
    }  # fmt: skip
    assert admitted(value) == value


def test_a_definition_that_nobody_refers_to_may_be_anything() -> None:
    assert admitted({"$defs": {"a": {"type": "nonsense"}}, "definitions": 5}) == {}


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"child": {"$ref": "#"}}},
        {"items": {"$ref": "#"}, "$defs": 5},
        {"anyOf": [{"type": "null"}, {"items": {"$ref": "#"}}]},
        {
            "$ref": "#/$defs/a",
            "$defs": {
                "a": {"properties": {"b": {"$ref": "#/$defs/b"}}},
                "b": {"items": {"$ref": "#/$defs/a"}},
            },
        },
    ],
)
def test_recursion_into_parts_passes(schema: Any) -> None:
    value = admitted(schema)
    assert json.dumps(value).count("$ref") == json.dumps(schema).count("$ref")


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}]},
        {"anyOf": [{"type": "null"}, {"not": {"$ref": "#"}}]},
        {"properties": {"a": {"$ref": "#/properties/a"}}},
        {"properties": {"a": {"oneOf": [{"if": {"$ref": "#/properties/a"}}]}}},
        {"dependentSchemas": {"a": {"then": {"else": {"$ref": "#"}}}}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}}},
    ],
)
def test_recursion_in_place_is_refused(schema: Any) -> None:
    assert "leads back to itself" in refusal(schema)


# --- patterns -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [r"^(?!a)b", r"(?<=a)b", r"(a)\1", r"((a{100}){100}){100}", r"a{99999}"])
def test_patterns_without_a_linear_form_are_left_out(pattern: str) -> None:
    schema = admit({"items": {"type": "string", "pattern": pattern}}, "p")
    assert schema.value == {"items": {"type": "string"}}
    assert len(schema.dropped) == 1
    assert schema.dropped[0].startswith("/items/pattern ")


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"^[\w.-]+@[\w-]+\.[a-z]{2,}$", r"^\p{L}{1,64}$", "^a|b$"])
def test_linear_patterns_stay(pattern: str) -> None:
    schema = admit({"pattern": pattern}, "p")
    assert schema.dropped == ()
    assert isinstance(schema.value, dict)
    assert schema.value.keys() == {"pattern"}


def test_what_is_left_out_never_makes_a_value_invalid() -> None:
    lacking = {"pattern": "(?=a)"}
    schema = admit(
        {
            "not": lacking,
            "if": lacking,
            "then": False,
            "anyOf": [lacking],
            "oneOf": [lacking, {"type": "string"}],
            "contains": lacking,
            "maxContains": 2,
            "patternProperties": {"(?=a)": {}, "^b": {}},
            "additionalProperties": False,
            "unevaluatedProperties": False,
            "minLength": 1,
        },
        "p",
    )
    assert schema.value == {
        "anyOf": [{}],
        "allOf": [{"anyOf": [{}, {"type": "string"}]}],
        "contains": {},
        "patternProperties": {"^b": {}},
        "minLength": 1,
    }
    places = {line.split()[0] for line in schema.dropped}
    assert {"/not", "/if", "/then", "/maxContains", "/additionalProperties", "/anyOf/0/pattern"} <= places


def test_references_that_depend_on_the_caller_are_left_out() -> None:
    schema = admit({"items": {"$dynamicRef": "#node"}, "$dynamicAnchor": "node"}, "p")
    assert schema.value == {"items": {}}
    assert schema.dropped == ("/items/$dynamicRef is not supported",)


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": list(range(limits.MAX_ENUM + 1))},
        {"properties": {str(i): True for i in range(limits.MAX_PROPERTIES + 1)}},
        {"anyOf": [True] * (limits.MAX_BRANCHES + 1)},
        {"required": [str(i) for i in range(limits.MAX_PROPERTIES + 1)]},
        {"const": "x" * limits.MAX_CHARS},
        {"const": [0] * limits.MAX_NODES},
        {"pattern": "a" * 4097},
        nested(limits.MAX_NESTING),
        nested(limits.MAX_LEVELS),
        nested(100_000),
        {"const": nested(limits.MAX_LEVELS)},
        chain(limits.MAX_REACH, "ref"),
        chain(limits.MAX_REACH, "allOf"),
        chain(limits.MAX_REACH // 2, "properties"),
        chain(5_000, "items"),
    ],
)
def test_too_much(schema: Any) -> None:
    assert "more than" in (message := refusal(schema)) or "longer than" in message


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": list(range(limits.MAX_ENUM))},
        {"properties": {str(i): True for i in range(limits.MAX_PROPERTIES)}},
        nested(limits.MAX_NESTING - 1),
        nested(limits.MAX_NESTING - 1, "allOf"),
        chain(limits.MAX_REACH - 2, "ref"),
        chain(100, "properties"),
    ],
)
def test_just_enough(schema: Any) -> None:
    assert admit(schema, "p").dropped == ()


def test_all_schemas_of_a_request_are_counted_together() -> None:
    one = ("tools[0]", {"const": "x" * (limits.MAX_CHARS - 100)})
    assert len(admit_all([one] * 8)) == 8
    with pytest.raises(RequestError, match="together"):
        admit_all([one] * 9)
    many = ("tools[1]", {"const": [0] * (limits.MAX_NODES - 10)})
    assert len(admit_all([many] * 10)) == 10
    with pytest.raises(RequestError, match="together"):
        admit_all([many] * 11)


def test_a_refusal_names_the_schema_that_is_wrong() -> None:
    with pytest.raises(RequestError) as caught:
        admit_all([("tools[0]", {}), ("tools[1]", {"type": 1}), ("tools[2]", {})])
    assert caught.value.param == "tools[1]"
