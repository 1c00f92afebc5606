"""The declarations of ``tests/schemas.py``: valid, met by their arguments, alike for a seed, and varied."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.schemas import ToolSchema, tool_schemas

KEYWORDS = (
    "type enum const title description default examples nullable minLength maxLength pattern format minimum "
    "maximum exclusiveMinimum exclusiveMaximum multipleOf items prefixItems minItems maxItems uniqueItems "
    "contains minContains maxContains properties required additionalProperties patternProperties "
    "propertyNames minProperties maxProperties dependentRequired dependentSchemas anyOf oneOf allOf not if "
    "then else $ref $defs definitions"
).split()
TYPES = "string number integer boolean null array object".split()
FORMATS = "date-time date time email uuid ipv4 uri unknown-format".split()
ODD = set(
    "not if uniqueItems contains propertyNames dependentRequired dependentSchemas oneOf minProperties const "
    "multipleOf prefixItems patternProperties exclusiveMinimum exclusiveMaximum".split()
)
ONE = ("items", "contains", "additionalProperties", "propertyNames", "not", "if", "then", "else")
MANY = ("anyOf", "oneOf", "allOf", "prefixItems")
NAMED = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")


def subschemas(schema: Any) -> Iterator[Any]:
    """`schema` and every schema in it; values such as a default are not schemas."""
    yield schema
    if not isinstance(schema, dict):
        return
    for key in ONE:
        if key in schema:
            yield from subschemas(schema[key])
    for key in MANY:
        for part in schema.get(key, ()):
            yield from subschemas(part)
    for key in NAMED:
        for part in schema.get(key, {}).values():
            yield from subschemas(part)


def depth(value: Any) -> int:
    """How many objects lie in each other."""
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return max(map(depth, value), default=0) if isinstance(value, list) else 0


def keywords(drawn: ToolSchema) -> set[str]:
    parts = subschemas(drawn.parameters)
    return {key for part in parts if isinstance(part, dict) for key in part}


@pytest.fixture(scope="module")
def many() -> list[ToolSchema]:
    return tool_schemas(seed=1, count=2000)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_schemas_are_valid_and_their_arguments_fit(seed: int) -> None:
    for drawn in tool_schemas(seed, 400):
        parameters = drawn.parameters
        if parameters is None:
            assert drawn.witness == {}
            continue
        Draft202012Validator.check_schema(parameters)
        errors = [error.message for error in Draft202012Validator(parameters).iter_errors(drawn.witness)]
        assert not errors, f"{drawn.name}: {parameters} does not take {drawn.witness}: {errors}"


def test_the_seed_decides() -> None:
    assert tool_schemas(5, 60) == tool_schemas(5, 60)
    assert tool_schemas(5, 60)[:20] == tool_schemas(5, 20)
    assert tool_schemas(5, 60) != tool_schemas(6, 60)


def test_declarations_are_json_in_openais_form(many: list[ToolSchema]) -> None:
    for drawn in many:
        assert json.loads(json.dumps(drawn.tool)) == drawn.tool
        assert json.loads(json.dumps(drawn.witness)) == drawn.witness
        assert drawn.tool["type"] == "function"
        assert set(drawn.tool["function"]) <= {"name", "description", "parameters", "strict"}
        assert 0 < len(drawn.name) <= 64
    assert len({drawn.name for drawn in many}) == len(many)
    assert {mark for drawn in many for mark in "-_." if mark in drawn.name} == set("-_.")


def test_every_keyword_type_and_format_occurs(many: list[ToolSchema]) -> None:
    parts = [part for drawn in many for part in subschemas(drawn.parameters) if isinstance(part, dict)]
    counts = Counter(key for part in parts for key in part)
    assert not [key for key in KEYWORDS if counts[key] < 5], counts
    types = Counter(part["type"] for part in parts if isinstance(part.get("type"), str))
    assert not [name for name in TYPES if types[name] < 5], types
    formats = Counter(part["format"] for part in parts if "format" in part)
    assert not [name for name in FORMATS if formats[name] < 2], formats


def test_values_of_keywords_vary(many: list[ToolSchema]) -> None:
    parts = [part for drawn in many for part in subschemas(drawn.parameters) if isinstance(part, dict)]
    assert any(part.get("type") == ["string", "null"] for part in parts)
    assert any(len({type(value) for value in part.get("enum", ())}) > 2 for part in parts)
    assert any(part.get("pattern", "").startswith("^") for part in parts)
    assert any("pattern" in part and not part["pattern"].startswith("^") for part in parts)
    assert any(isinstance(part.get("multipleOf"), float) for part in parts)
    rests = [part["additionalProperties"] for part in parts if "additionalProperties" in part]
    assert any(rest is True for rest in rests)
    assert any(rest is False for rest in rests)
    assert any(isinstance(rest, dict) for rest in rests)
    widths = {len(part["properties"]) for part in parts if "properties" in part}
    assert {0, 1, 2, 3, 4, 5, 6, 8, 10} <= widths
    assert max(widths) >= 11
    names = {name for part in parts for name in part.get("properties", ())}
    assert any(not name.isascii() for name in names)
    assert any(" " in name and '"' in name for name in names)
    assert {depth(drawn.witness) for drawn in many} >= {1, 2, 3, 4}


def test_parameters_may_be_absent_or_empty(many: list[ToolSchema]) -> None:
    assert any("parameters" not in drawn.tool["function"] for drawn in many)
    assert any(drawn.parameters == {} for drawn in many)


def test_some_schemas_refer_to_themselves(many: list[ToolSchema]) -> None:
    def definitions(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        defined: Mapping[str, Any] = parameters.get("$defs", parameters.get("definitions", {}))
        return defined

    found = set()
    for drawn in many:
        if drawn.parameters is None:
            continue
        if any(isinstance(part, dict) and part.get("$ref") == "#" for part in subschemas(drawn.parameters)):
            found.add("root")
        for name, definition in definitions(drawn.parameters).items():
            if any(
                isinstance(part, dict) and str(part.get("$ref")).endswith(f"/{name}")
                for part in subschemas(definition)
            ):
                found.add(name)
    assert found >= {"root", "Tree", "List"}


def test_most_are_ordinary(many: list[ToolSchema]) -> None:
    odd = sum(bool(keywords(drawn) & ODD) for drawn in many)
    assert 0.12 < odd / len(many) < 0.35
    assert not any(keywords(drawn) & ODD for drawn in tool_schemas(seed=2, count=300, odd_share=0))
