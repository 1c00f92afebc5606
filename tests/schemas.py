"""Varied tool declarations, each with arguments that fit it: most as agents send them, some with rare words.

Everything is drawn from the seed and the declaration's number, so a longer list begins with the shorter one.
All of them are valid JSON Schema 2020-12, and closed ones can be met with declared properties alone. What a
grammar may not hold (`not`, `uniqueItems`, `contains`, …) is met by many values, so that one made at random
fits after a few tries. Steps such as 0.01 want a validator that divides decimals, not floats.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Tool = dict[str, Any]
Drawn = tuple[Any, Any]  # a schema, and a value that fits it

ODD_SHARE = 0.3

_VERBS = "get list create update delete search send read write run fetch convert plan book cancel".split()
_NOUNS = "weather file issue order user event message table page report ticket invoice branch image".split()
_WORDS = "alpha north river blue seven paper cloud Zürich 東京 café data-7 x".split()
_TEXT_NAMES = (
    "query path city name title body user_id fileName url language branch subject message unit sort_by "
    "status content-type file.name command description target_lang email date timezone"
).split()
_NUMBER_NAMES = "limit offset page count size depth timeout_ms latitude price ratio max-results year".split()
_FLAG_NAMES = "recursive dry_run verbose force include_hidden exact isPublic".split()
_LIST_NAMES = "tags ids paths columns recipients steps filters languages".split()
_OBJECT_NAMES = "options filter location range author metadata address config pagination".split()
_ODD_NAMES = (
    'größe|名前|it\'s|say "hi"|back\\slash|a/b|a~b|with space|$ref|type|properties|required|emoji🙂|%7B|{}|'
    "</tag>|line\nbreak|0|const|_|x-1.2.3"
).split("|")
_ENUMS = (
    ("celsius", "fahrenheit"),
    ("asc", "desc"),
    ("open", "closed", "all"),
    ("low", "medium", "high", "urgent"),
    ("json", "csv", "xml", "yaml", "text/plain"),
    ("GET", "POST", "PUT", "PATCH", "DELETE"),
    ("en", "de", "fr", "zh-CN", "pt_BR"),
    ("a",),
)
_PATTERNS = (
    ("^[a-z]+$", "abc"),
    ("^[A-Z]{3}$", "EUR"),
    ("^[a-zA-Z0-9_-]{1,64}$", "my_name-1"),
    ("^[0-9]{4}-[0-9]{2}-[0-9]{2}$", "2025-11-06"),
    (r"^\d{5}(-\d{4})?$", "12345-6789"),
    (r"^#[0-9a-fA-F]{6}$", "#00ffAA"),
    (r"^(https?|ftp)://[^\s/]+$", "https://example.org"),
    (r"^v?\d+\.\d+\.\d+$", "v1.20.3"),
    ("^/", "/etc"),
    ("[0-9]", "a1b"),
    (r"\.py$", "main.py"),
    ("foo|bar", "a bar"),
    ("^(yes|no)$", "no"),
    ("^[^@]+@[^@]+$", "a@b"),
)
_FORMATS = (
    ("date-time", "2025-11-06T12:30:00Z"),
    ("date", "2025-11-06"),
    ("time", "12:30:00Z"),
    ("duration", "P3DT4H"),
    ("email", "a@example.org"),
    ("uri", "https://example.org/a?b=c"),
    ("uuid", "123e4567-e89b-12d3-a456-426614174000"),
    ("ipv4", "192.0.2.1"),
    ("ipv6", "2001:db8::1"),
    ("hostname", "example.org"),
    ("unknown-format", "anything"),
)


@dataclass(frozen=True)
class ToolSchema:
    """A function declaration in OpenAI's form, and arguments that fit its parameters."""

    tool: Tool
    witness: dict[str, Any]

    @property
    def name(self) -> str:
        """The function's name."""
        name: str = self.tool["function"]["name"]
        return name

    @property
    def parameters(self) -> dict[str, Any] | None:
        """The schema of the arguments; None where none is declared."""
        parameters: dict[str, Any] | None = self.tool["function"].get("parameters")
        return parameters


def tool_schemas(seed: int, count: int, odd_share: float = ODD_SHARE) -> list[ToolSchema]:
    """`count` declarations; no two have the same name."""
    return [_tool(random.Random(f"{seed}/{number}"), number, odd_share) for number in range(count)]


def _tool(rng: random.Random, number: int, odd_share: float) -> ToolSchema:
    draw = _Draw(rng)
    name = f"{rng.choice(_VERBS)}_{rng.choice(_NOUNS)}"
    camel = name.title().replace("_", "")
    name = rng.choice([name, name, name.replace("_", "-"), camel, f"mcp__{name}", name.replace("_", ".")])
    name += rng.choice("_-.") + str(number) if rng.random() < 0.2 else f"_{number}"
    function: dict[str, Any] = {"name": name}
    if rng.random() < 0.9:
        function["description"] = draw.sentence()
    arguments: dict[str, Any] = {}
    if rng.random() < odd_share:
        parameters, arguments = draw.odd_parameters()
    elif rng.random() < 0.97:
        parameters, arguments = draw.object(levels=rng.choice((1, 1, 1, 2, 2, 3, 4)), widest=12)
    else:
        parameters = None  # a function without parameters
    if parameters is not None:
        if draw.definitions:
            parameters = {**parameters, rng.choice(("$defs", "$defs", "definitions")): draw.definitions}
            parameters = _repointed(parameters, "$defs" if "$defs" in parameters else "definitions")
        if rng.random() < 0.1:
            parameters = {"$schema": "https://json-schema.org/draft/2020-12/schema", **parameters}
        function["parameters"] = parameters
    if rng.random() < 0.1:
        function["strict"] = rng.random() < 0.5
    return ToolSchema({"type": "function", "function": function}, arguments)


def _repointed(value: Any, where: str) -> Any:
    """`value` with references into `#/$defs/` pointing into `#/{where}/`."""
    if isinstance(value, dict):
        return {
            key: item.replace("#/$defs/", f"#/{where}/")
            if key == "$ref" and isinstance(item, str)
            else _repointed(item, where)
            for key, item in value.items()
        }
    return [_repointed(item, where) for item in value] if isinstance(value, list) else value


class _Draw:
    """Draws schemas and values for one declaration; `definitions` collects what they refer to."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.definitions: dict[str, Any] = {}

    # --- as agents send them ----------------------------------------------------------------------

    def sentence(self) -> str:
        words = " ".join(self.rng.choice(_WORDS) for _ in range(self.rng.randint(2, 8)))
        return words.capitalize() + self.rng.choice(
            (".", "", ", e.g. 'x' or \"y\".", " (optional)\nSee docs.")
        )

    def object(self, levels: int, widest: int = 5, closed: bool | None = None) -> Drawn:
        """An object with declared properties, of `levels` levels at most."""
        rng = self.rng
        count = rng.choice((0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 8, 10, 12))
        properties: dict[str, Any] = {}
        values: dict[str, Any] = {}
        for _ in range(min(count, widest)):
            name, (member, value) = self.member(levels)
            if name not in properties:
                properties[name], values[name] = member, value
        required = [name for name in properties if rng.random() < 0.5]
        schema: dict[str, Any] = {"type": "object", "properties": properties}
        if required or rng.random() < 0.5:
            schema["required"] = required
        if closed or (closed is None and rng.random() < 0.4):
            schema["additionalProperties"] = False
        if rng.random() < 0.1:
            schema["title"] = self.sentence()
        return schema, {name: v for name, v in values.items() if name in required or rng.random() < 0.5}

    def member(self, levels: int) -> tuple[str, Drawn]:
        rng = self.rng
        kinds = [(_TEXT_NAMES, self.text)] * 5 + [(_NUMBER_NAMES, self.number)] * 3
        kinds += [(_FLAG_NAMES, self.flag), (_LIST_NAMES, lambda: self.array(levels))]
        if rng.random() < 0.15:
            kinds = [(_TEXT_NAMES, self.optional)]
        elif levels > 1:
            kinds += [(_OBJECT_NAMES, lambda: self.object(levels - 1))] * 2
            kinds += [(_OBJECT_NAMES, lambda: self.model(levels - 1))]
        names, make = rng.choice(kinds)
        return rng.choice(names), self.noted(make())

    def optional(self) -> Drawn:
        """What Python's `X | None = None` becomes."""
        schema, value = self.rng.choice((self.text, self.number, self.flag))()
        optional: dict[str, Any] = {"anyOf": [schema, {"type": "null"}]}
        if self.rng.random() < 0.7:
            optional["default"] = None
        return optional, self.rng.choice((value, None))

    def model(self, levels: int) -> Drawn:
        """An object declared under `$defs`, as a Python class becomes; once in a while wrapped in `allOf`."""
        name = f"{self.rng.choice(_NOUNS).title()}{len(self.definitions)}"
        self.definitions[name] = {}  # the name is taken before the members draw theirs
        schema, value = self.object(levels)
        self.definitions[name] = {**schema, "title": name}
        reference: Any = {"$ref": f"#/$defs/{name}"}
        return ({"allOf": [reference]} if self.rng.random() < 0.2 else reference), value

    def noted(self, drawn: Drawn) -> Drawn:
        """With what says nothing about values."""
        schema, value = drawn
        if not isinstance(schema, dict):
            return drawn
        notes: dict[str, Any] = {}
        if self.rng.random() < 0.7:
            notes["description"] = self.sentence()
        if self.rng.random() < 0.1:
            notes["default"] = value
        if self.rng.random() < 0.05:
            notes["examples"] = [value]
        if self.rng.random() < 0.05:
            notes["title"] = self.rng.choice(_WORDS)
        return {**schema, **notes}, value

    def text(self) -> Drawn:
        rng = self.rng
        word = rng.choice(_WORDS)
        match rng.choice(("plain",) * 6 + ("enum",) * 3 + ("length", "pattern", "format", "nullable")):
            case "enum":
                options = list(rng.choice(_ENUMS))
                return rng.choice(({"type": "string", "enum": options}, {"enum": options})), options[-1]
            case "length":
                bounds = {"minLength": rng.randint(0, len(word)), "maxLength": len(word) + rng.randint(0, 20)}
                kept = rng.sample(sorted(bounds), rng.randint(1, 2))
                return {"type": "string", **{key: bounds[key] for key in kept}}, word
            case "pattern":
                pattern, value = rng.choice(_PATTERNS)
                return {"type": "string", "pattern": pattern}, value
            case "format":
                name, value = rng.choice(_FORMATS)
                return {"type": "string", "format": name}, value
            case "nullable":
                return {"type": ["string", "null"]}, rng.choice((word, None))
        return {"type": "string"}, word

    def number(self) -> Drawn:
        rng = self.rng
        low = rng.choice((0, 1, -10, -90, 1900))
        high = low + rng.choice((1, 9, 100, 180, 10_000))
        match rng.choice(("plain", "plain", "integer", "integer", "bounds", "least", "real bounds", "none")):
            case "plain":
                return {"type": "number"}, rng.choice((0, 1.5, -3e10, 42))
            case "bounds":
                return {"type": "integer", "minimum": low, "maximum": high}, rng.randint(low, high)
            case "least":
                return {"type": "integer", "minimum": low}, low
            case "real bounds":
                return {"type": "number", "minimum": low, "maximum": high}, round(rng.uniform(low, high), 3)
            case "none":
                return {"type": ["integer", "null"], "default": None}, rng.choice((None, 7))
        return {"type": "integer"}, rng.randint(-5, 500)

    def flag(self) -> Drawn:
        value = self.rng.random() < 0.5
        return {"type": "boolean"}, value

    def array(self, levels: int) -> Drawn:
        rng = self.rng
        makes: list[Callable[[], Drawn]] = [self.text, self.text, self.number]
        if levels > 1:
            makes += [lambda: self.object(levels - 1)] * 2 + [lambda: self.array(levels - 1)]
        item, value = rng.choice(makes)()
        values = [value] * rng.randint(1, 3)
        schema: dict[str, Any] = {"type": "array", "items": item}
        if rng.random() < 0.2:
            schema["minItems"] = rng.randint(0, len(values))
        if rng.random() < 0.2:
            schema["maxItems"] = len(values) + rng.randint(0, 5)
        return schema, values if "minItems" in schema or rng.random() < 0.8 else []

    # --- rare keywords ----------------------------------------------------------------------------

    def odd_parameters(self) -> Drawn:
        """Parameters that are odd as a whole, or have one or two odd properties."""
        rng = self.rng
        if rng.random() < 0.4:
            return rng.choice(self.odd_objects())()
        schema, value = self.object(levels=rng.choice((1, 2, 4)), widest=4)
        properties = dict(schema["properties"])
        for _ in range(rng.choice((1, 1, 2))):
            names = rng.choice((_ODD_NAMES, _TEXT_NAMES, _OBJECT_NAMES))
            odd, odd_value = self.noted(rng.choice(self.odd_values())())
            name = rng.choice(names)
            if name in properties:
                continue
            properties[name] = odd
            if rng.random() < 0.7:
                schema = {**schema, "required": [*schema.get("required", []), name]}
                value = {**value, name: odd_value}
        return {**schema, "properties": properties}, value

    def odd_values(self) -> list[Callable[[], Drawn]]:
        return [
            self.anything, self.constant, self.mixed_enum, self.exclusive, self.multiple, self.tuple_,
            self.unique, self.containing, self.any_of, self.tagged, self.overlapping, self.all_of,
            self.negated, self.open_map, self.patterned_map, self.sized_map, self.named_keys,
            self.several_types, self.nullable, self.null, self.referred, self.tree, self.linked,
            self.wide_enum, self.out_of_place, self.long_text, self.both_bounds, self.unique_objects,
            self.switched, self.shapeless, self.sized_list,
        ]  # fmt: skip

    def odd_objects(self) -> list[Callable[[], Drawn]]:
        return [
            self.empty, self.conditional, self.dependent, self.dependent_schema, self.odd_named,
            self.recursive_root, self.merged, self.without_type, self.requiring_undeclared,
            self.open_rest, self.root_any_of, self.open_map, self.by_pointer, self.negated_object,
            self.deep, self.needing_some, self.switched, self.crossed, self.mixed_keys, self.forest,
        ]  # fmt: skip

    def anything(self) -> Drawn:
        return self.rng.choice(({}, True)), self.rng.choice((None, 1, "x", [1, {}], {"a": [None]}))

    def constant(self) -> Drawn:
        value = self.rng.choice((1, "v1", None, True, 1.5, {"a": 1, "b": [2]}, [1, "x"], "", 'q"\\\n'))
        return {"const": value}, value

    def mixed_enum(self) -> Drawn:
        values = self.rng.sample((1, "1", None, False, 2.5, "a\nb", {"k": "v"}, [0]), self.rng.randint(1, 5))
        return {"enum": values}, self.rng.choice(values)

    def wide_enum(self) -> Drawn:
        values = [f"value-{i}" for i in range(self.rng.choice((50, 300)))]
        return {"type": "string", "enum": values}, values[17]

    def exclusive(self) -> Drawn:
        kind, value = self.rng.choice((("number", 0.5), ("integer", 5), ("number", 1)))
        schema = {"type": kind, "exclusiveMinimum": 0, "exclusiveMaximum": 10}
        schema.pop(self.rng.choice(("exclusiveMinimum", "exclusiveMaximum", "")), None)
        return schema, value

    def multiple(self) -> Drawn:
        kind, step, value = self.rng.choice(
            (
                ("integer", 5, 35),
                ("number", 0.5, 2.5),
                ("integer", 1, 3),
                ("number", 2, -8),
                ("number", 0.25, 2.75),
                ("number", 0.1, 2.5),
                ("number", 0.01, 12.5),
                ("integer", 64, 0),
            )
        )
        more = self.rng.choice(({}, {}, {"minimum": -1000, "maximum": 1000}, {"exclusiveMinimum": -100}))
        return {"type": kind, "multipleOf": step, **more}, value

    def tuple_(self) -> Drawn:
        (first, a), (second, b) = self.text(), self.number()
        schema: dict[str, Any] = {"type": "array", "prefixItems": [first, second]}
        more = self.rng.choice(({}, {"minItems": 2}, {"minItems": 2, "maxItems": 2}, {"items": False}))
        return {**schema, **more}, [a, b]

    def unique(self) -> Drawn:
        item = self.rng.choice(({"type": "string"}, {"enum": ["a", "b", "c"]}))
        return {"type": "array", "items": item, "uniqueItems": True, "maxItems": 3}, ["a", "c"]

    def unique_objects(self) -> Drawn:
        item = {"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]}
        return {"type": "array", "items": item, "uniqueItems": True}, [{"id": "a"}, {"id": "b"}]

    def sized_list(self) -> Drawn:
        item, value = self.rng.choice((self.text, self.number))()
        count = self.rng.randint(1, 6)
        return {"type": "array", "items": item, "minItems": count, "maxItems": count}, [value] * count

    def containing(self) -> Drawn:
        schema = {"type": "array", "items": {"type": ["integer", "string"]}, "contains": {"type": "integer"}}
        if self.rng.random() < 0.4:  # every item will do
            schema = {"type": "array", "items": {"type": "string"}, "contains": {"type": "string"}}
            return schema, ["b"]
        more = self.rng.choice(
            ({}, {"minContains": 2, "minItems": 3}, {"maxContains": 3}, {"minContains": 0})
        )
        return {**schema, **more}, [1, "a", 2]

    def any_of(self) -> Drawn:
        branches = [self.text(), self.number(), ({"type": "null"}, None), self.object(1)]
        chosen = self.rng.sample(branches, self.rng.randint(1, 4))
        return {"anyOf": [schema for schema, _ in chosen]}, chosen[0][1]

    def tagged(self) -> Drawn:
        """Branches told apart by a constant property."""
        branches, values = [], []
        for tag in ("circle", "square", "line"):
            extra, value = self.number()
            properties = {"kind": {"const": tag}, "size": extra}
            branches.append({"type": "object", "properties": properties, "required": ["kind", "size"]})
            values.append({"kind": tag, "size": value})
        return {self.rng.choice(("oneOf", "anyOf")): branches}, self.rng.choice(values)

    def overlapping(self) -> Drawn:
        """Branches that share some values, which are then not valid."""
        pairs: tuple[Drawn, ...] = (
            ([{"type": "integer", "minimum": 0}, {"type": "integer", "maximum": 2}], 11),
            ([{"type": "integer"}, {"type": "number", "minimum": 1000}], 2),
            ([{"type": "string", "minLength": 2}, {"type": "string", "maxLength": 2}], "river"),
            ([{"type": "string"}, {"type": ["string", "null"], "maxLength": 1}], None),
        )
        branches, value = self.rng.choice(pairs)
        return {"oneOf": branches}, value

    def all_of(self) -> Drawn:
        parts = [{"type": "string"}, {"minLength": 2}, {"maxLength": 40}, {"pattern": "^[a-z]"}]
        return {"allOf": self.rng.sample(parts, self.rng.randint(1, 4)), "type": "string"}, "river"

    def negated(self) -> Drawn:
        nots: tuple[Any, ...] = ({"const": ""}, {"enum": ["root", "admin"]}, {"type": "integer"})
        nots += ({"pattern": "^-"}, {"maxLength": 0}, {"anyOf": [{"const": "x"}, {"type": "null"}]})
        return {"type": "string", "not": self.rng.choice(nots)}, "river"

    def open_map(self) -> Drawn:
        item, value = self.rng.choice((self.text, self.number))()
        schema = {"type": "object", "additionalProperties": self.rng.choice((item, True))}
        return schema, {"some key": value, "x": value}

    def patterned_map(self) -> Drawn:
        schema: dict[str, Any] = {"type": "object", "patternProperties": {"^x-": {"type": "string"}}}
        rest = self.rng.choice((None, False, {"type": "integer"}))
        if rest is not None:
            schema["additionalProperties"] = rest
        return schema, {"x-a": "1", "n": 2} if isinstance(rest, dict) else {"x-a": "1"}

    def sized_map(self) -> Drawn:
        schema = {"type": "object", "additionalProperties": {"type": "integer"}}
        return {**schema, "minProperties": 1, "maxProperties": 4}, {"a": 1, "b": 2}

    def named_keys(self) -> Drawn:
        if self.rng.random() < 0.3:
            properties = {name: {"type": "boolean"} for name in ("a", "b", "cd")}
            schema = {"type": "object", "properties": properties, "additionalProperties": False}
            return {**schema, "propertyNames": {"enum": ["a", "b", "cd", "never"]}}, {"cd": False}
        names = self.rng.choice(({"maxLength": 40}, {"pattern": "^[^A-Z]*$"}, {"not": {"const": "id"}}))
        schema = {"type": "object", "propertyNames": names, "additionalProperties": {"type": "boolean"}}
        return schema, {"a": True, "cd": False}

    def several_types(self) -> Drawn:
        kinds = {"string": "s", "integer": 3, "boolean": True, "null": None, "array": [1], "object": {"a": 1}}
        chosen = self.rng.sample(sorted(kinds), self.rng.randint(1, 5))
        return {"type": chosen}, kinds[chosen[0]]

    def nullable(self) -> Drawn:
        schema, value = self.rng.choice((self.text, self.number, self.flag))()
        return {**schema, "nullable": True}, value

    def long_text(self) -> Drawn:
        low = self.rng.choice((0, 1, 20, 60))
        return {"type": "string", "minLength": low, "maxLength": low + 300}, "é" * (low + 1)

    def both_bounds(self) -> Drawn:
        """A pattern or a format beside lengths that it fits."""
        drawn: tuple[Drawn, ...] = (
            ({"pattern": "^[a-z]{2,8}$", "minLength": 2, "maxLength": 8}, "river"),
            ({"pattern": "[a-z]", "minLength": 1}, "9a"),
            ({"format": "date", "maxLength": 10}, "2024-02-29"),
            ({"format": "uuid", "pattern": "^[0-9a-fA-F-]+$"}, "123e4567-e89b-12d3-a456-426614174000"),
            ({"pattern": "^#[0-9a-f]{6}$", "maxLength": 7}, "#00ffaa"),
        )
        schema, value = self.rng.choice(drawn)
        return {"type": "string", **schema}, value

    def shapeless(self) -> Drawn:
        """Bounds without a type: they say something about values of one type only."""
        bounds = {"minLength": 1, "minimum": -1e6, "maxItems": 50, "maxProperties": 50}
        kept = self.rng.sample(sorted(bounds), self.rng.randint(1, 4))
        return {key: bounds[key] for key in kept}, self.rng.choice(("x", 7, [], {"a": 1}, None, False))

    def null(self) -> Drawn:
        return {"type": "null"}, None

    def out_of_place(self) -> Drawn:
        """Notes and bounds that belong to other types than the value's."""
        notes = {
            "deprecated": True,
            "readOnly": True,
            "$comment": "x",
            "contentEncoding": "base64",
            "x-own": {"a": []},
        }
        return {"type": "string", "minItems": 3, "maximum": 1, "required": ["a"], **notes}, "text"

    def referred(self) -> Drawn:
        name = self.rng.choice(("Thing", "a b", "sla/sh"))
        schema, value = self.object(1)
        if self.definitions.setdefault(name, schema) is not schema:
            return self.null()
        pointer = name.replace("/", "~1").replace(" ", "%20")
        beside = self.rng.choice(({}, {"description": "A thing."}))
        return {"$ref": f"#/$defs/{pointer}", **beside}, value

    def tree(self) -> Drawn:
        node = {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/Tree"}, "maxItems": 3},
            },
            "required": ["value"],
            "additionalProperties": False,
        }
        self.definitions["Tree"] = node
        return {"$ref": "#/$defs/Tree"}, {
            "value": 1,
            "children": [{"value": 2}, {"value": 3, "children": []}],
        }

    def linked(self) -> Drawn:
        node = {
            "type": "object",
            "properties": {
                "head": {"type": "string"},
                "next": {"anyOf": [{"$ref": "#/$defs/List"}, {"type": "null"}]},
            },
            "required": ["head", "next"],
        }
        self.definitions["List"] = node
        return {"$ref": "#/$defs/List"}, {"head": "a", "next": {"head": "b", "next": None}}

    # --- odd as a whole ---------------------------------------------------------------------------

    def empty(self) -> Drawn:
        return self.rng.choice(({}, {"type": "object"}, {"type": "object", "properties": {}})), {}

    def conditional(self) -> Drawn:
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {
                "mode": {"enum": ["file", "url"]},
                "path": {"type": "string"},
                "url": {"type": "string"},
            },
            "required": ["mode"],
            "if": {"properties": {"mode": {"const": "file"}}},
            "then": {"required": ["path"]},
        }
        if self.rng.random() < 0.5:
            schema["else"] = {"required": ["url"]}
            return schema, {"mode": "url", "url": "u"}
        return schema, self.rng.choice(({"mode": "file", "path": "p"}, {"mode": "url"}))

    def switched(self) -> Drawn:
        """A flag that asks for more, or for something else."""
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {
                "on": {"type": "boolean"},
                "level": {"type": "integer"},
                "reason": {"type": "string"},
            },
            "required": ["on"],
            "if": {"properties": {"on": {"const": True}}, "required": ["on"]},
        }
        match self.rng.choice(("then", "else", "both")):
            case "then":
                return {**schema, "then": {"required": ["level"]}}, {"on": True, "level": 3}
            case "else":
                return {**schema, "else": {"properties": {"reason": {"minLength": 1}}}}, {"on": True}
        then, other = {"required": ["level"]}, {"required": ["reason"]}
        return {**schema, "then": then, "else": other}, {"on": False, "reason": "r"}

    def crossed(self) -> Drawn:
        """One of two that are known by which property is there."""
        properties = {"id": {"type": "integer"}, "name": {"type": "string"}}
        branches = [{"required": ["id"]}, {"required": ["name"]}]
        rest = self.rng.choice(({}, {"additionalProperties": False}))
        schema = {"type": "object", "properties": properties, self.rng.choice(("oneOf", "anyOf")): branches}
        return {**schema, **rest}, self.rng.choice(({"id": 1}, {"name": "n"}))

    def needing_some(self) -> Drawn:
        names = self.rng.sample(_TEXT_NAMES, self.rng.randint(3, 6))
        schema = {"type": "object", "properties": {name: {"type": "string"} for name in names}}
        more = self.rng.choice(({}, {"maxProperties": len(names) - 1}, {"additionalProperties": False}))
        return {**schema, "minProperties": 1, **more}, {names[0]: "x", names[1]: "y"}

    def mixed_keys(self) -> Drawn:
        """Declared, patterned and other properties in one object."""
        schema, value = self.object(1, widest=3, closed=False)
        schema = {key: item for key, item in schema.items() if key != "additionalProperties"}
        rest = self.rng.choice((False, {"type": "number"}))
        kept = {"patternProperties": {"^x_[a-z]+$": {"type": "boolean"}}, "additionalProperties": rest}
        return {**schema, **kept}, {**value, "x_on": True, **({} if rest is False else {"other": 1.5})}

    def forest(self) -> Drawn:
        """Two definitions that refer to each other."""
        self.definitions["Folder"] = {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "entries": {"type": "array", "items": {"$ref": "#/$defs/Entry"}},
            },
            "required": ["name"],
            "additionalProperties": False,
        }
        self.definitions["Entry"] = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/Folder"}]}
        schema = {"type": "object", "properties": {"root": {"$ref": "#/$defs/Folder"}}, "required": ["root"]}
        inner = {"name": "b", "entries": ["c", {"name": "d"}]}
        return schema, {"root": {"name": "a", "entries": ["x", inner, {"name": "e", "entries": []}]}}

    def dependent(self) -> Drawn:
        properties = {"card": {"type": "integer"}, "address": {"type": "string"}, "note": {"type": "string"}}
        schema = {"type": "object", "properties": properties, "dependentRequired": {"card": ["address"]}}
        return schema, self.rng.choice(({"card": 1, "address": "a"}, {"note": "n"}, {}))

    def dependent_schema(self) -> Drawn:
        properties = {"a": {"type": "integer"}, "b": {"type": "string"}}
        more = {"a": {"properties": {"b": {"minLength": 2}}, "required": ["b"]}}
        schema = {"type": "object", "properties": properties, "dependentSchemas": more}
        return schema, self.rng.choice(({"a": 1, "b": "xy"}, {"b": ""}))

    def odd_named(self) -> Drawn:
        names = self.rng.sample(_ODD_NAMES, self.rng.randint(1, 10))
        drawn = {name: self.rng.choice((self.text, self.number, self.flag))() for name in names}
        required = [name for name in names if self.rng.random() < 0.5]
        schema = {"type": "object", "properties": {name: pair[0] for name, pair in drawn.items()}}
        more = self.rng.choice(({}, {"additionalProperties": False}))
        return {**schema, "required": required, **more}, {name: pair[1] for name, pair in drawn.items()}

    def recursive_root(self) -> Drawn:
        schema, value = self.object(1, widest=3)
        children = {"type": "array", "items": {"$ref": "#"}}
        return {**schema, "properties": {**schema["properties"], "children": children}}, {
            **value,
            "children": [value],
        }

    def merged(self) -> Drawn:
        properties = {"a": {"type": "string"}, "b": {"type": "integer"}}
        parts: list[Any] = [
            {"properties": {"a": {"type": "string"}}, "required": ["a"]},
            {"properties": {"b": {"type": "integer"}}, "required": ["b"]},
        ]
        with_own = self.rng.choice(({}, {"properties": properties}))
        return {"type": "object", "allOf": parts, **with_own}, {"a": "x", "b": 1}

    def without_type(self) -> Drawn:
        schema, value = self.object(2)
        return {key: item for key, item in schema.items() if key != "type"}, value

    def requiring_undeclared(self) -> Drawn:
        schema, value = self.object(1, closed=False)
        schema = {key: item for key, item in schema.items() if key != "additionalProperties"}
        return {**schema, "required": [*schema.get("required", []), "undeclared"]}, {**value, "undeclared": 1}

    def open_rest(self) -> Drawn:
        schema, value = self.object(1)
        rest = self.rng.choice((True, {"type": "integer"}, {}, {"type": ["string", "integer"]}))
        return {**schema, "additionalProperties": rest}, {**value, "rest of it": 3}

    def root_any_of(self) -> Drawn:
        (first, value), (second, _) = self.object(1, closed=True), self.object(1, closed=True)
        return {"type": "object", "anyOf": [first, second]}, value

    def by_pointer(self) -> Drawn:
        properties = {"from": {"type": "string", "minLength": 1}, "to": {"$ref": "#/properties/from"}}
        return {"type": "object", "properties": properties, "required": ["to"]}, {"from": "a", "to": "b"}

    def negated_object(self) -> Drawn:
        properties = {"id": {"type": "integer"}, "name": {"type": "string"}}
        both = {"required": ["id", "name"]}
        return {"type": "object", "properties": properties, "not": both}, self.rng.choice(({"id": 1}, {}))

    def deep(self) -> Drawn:
        schema, value = self.number()
        for _ in range(self.rng.randint(4, 8)):
            schema = {"type": "object", "properties": {"in": schema}, "required": ["in"]}
            value = {"in": value}
        return schema, value
