"""A JSON schema as a Lark grammar for llguidance.

llguidance has JSON schemas of its own (`%json`), but fixes the order of an object's properties: with an
optional `a` and a required `b`, whoever writes `b` first can no longer write `a`. So objects are written out
here, up to `ANY_ORDER` properties with a rule for every set of properties already there; larger ones keep
their declared (sorted) order. Everything below them, strings, numbers, enums, is left to `%json`.

Where a schema leaves open whether undeclared properties may appear, they may not: a subset of what the schema
allows, and what a function's arguments mean. Keywords that llguidance lacks are left out, and the result says
so (`exact`): then a text of the grammar must still be validated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

ANY_ORDER = 8  # properties of an object whose order is free
MAX_RULES = 1536  # for free orders in one schema; beyond, the declared order
WHITE_SPACE = r"[ \t\n\r]{1,32}"

# What `%json` holds to the letter. `oneOf` only where its branches exclude each other.
_HELD = frozenset(
    "type enum const anyOf allOf properties required additionalProperties patternProperties items "
    "prefixItems minItems maxItems minLength maxLength pattern format minimum maximum "
    "exclusiveMinimum exclusiveMaximum multipleOf minProperties maxProperties $ref".split()
)
# What says nothing about which values are valid.
_NOTES = frozenset(
    "title description default examples example deprecated readOnly writeOnly $comment $schema $id id "
    "$anchor $defs definitions contentEncoding contentMediaType contentSchema".split()
)
_FORMATS = frozenset("date-time time date duration email hostname ipv4 ipv6 uuid uri uri-reference".split())
_OF_OBJECTS = frozenset("type properties required additionalProperties".split())
# Which properties go together, and how many.
_NARROWING = frozenset("minProperties maxProperties".split())
_OF_ARRAYS = frozenset("type items minItems maxItems".split())
_MAX_REPEATS = 1000
_MAX_STEP = 10_000  # larger divisors take the library seconds
_MAX_CONSTANT = 1 << 16  # characters of constants that a grammar holds
_MAX_IN_ORDER = 256  # properties; each may be followed by any later one
# What the library refuses in some of its forms, and what a grammar may therefore do without.
_DELICATE = frozenset(
    "pattern patternProperties format minLength maxLength minimum maximum exclusiveMinimum exclusiveMaximum "
    "multipleOf".split()
)
_PATTERN_SYNTAX = re.compile(
    r"\\x(?P<code>[0-9a-fA-F]{2})|\\(?P<escaped>[^\w\s])|\[(?:\\.|[^\]\\])*\]|\{[^}]*\}|\(\?:|[(){}|?*+^$.]|\\."
)

Schema = Mapping[str, Any] | bool


@dataclass(frozen=True, slots=True)
class Lark:
    """`text` of the grammar, whose rule is `start`.

    `exact`: every text of it is valid under the schema. `keys`: property names that some object requires.
    `pieces`: what patterns spell out, for whoever has to write something that matches.
    """

    text: str
    exact: bool
    keys: tuple[str, ...] = ()
    pieces: tuple[str, ...] = ()


class UnsupportedSchemaError(Exception):
    """The schema cannot be written as a grammar of ours; `%json` may still take it."""


def lark_of(schema: Schema, *, coarse: bool = False) -> Lark:
    """The grammar of `schema`, whose references are all inside it and lead somewhere.

    Args:
        coarse: leave out what the library may refuse: patterns, formats, bounds.

    Raises:
        UnsupportedSchemaError: nothing fits it, or it needs what cannot be written.
    """
    writer = _Writer(schema, _HELD - _DELICATE if coarse else _HELD)
    start = writer.node(schema)
    lines = [f"start: {start}", *writer.rules, *writer.terminals, f"WS: /{WHITE_SPACE}/"]
    text = "\n".join(lines) + "\n"
    return Lark(text, writer.exact, tuple(sorted(writer.keys)), tuple(sorted(writer.pieces)))


def loose_lark(schema: Schema) -> Lark:
    """`schema` by `%json` alone, in declared order, and whatever that lacks left out. Never `exact`."""
    writer = _Writer(schema)
    value = writer.held(schema)
    options = {"lenient": True, "coerce_one_of": True, "whitespace_pattern": WHITE_SPACE}
    whole = {**value, "x-guidance": options} if isinstance(value, dict) else value
    text = f"start: %json {json.dumps(writer.with_definitions(whole))}\n"
    return Lark(text, exact=False, pieces=tuple(sorted(writer.pieces)))


class _Writer:
    def __init__(self, root: Schema, held: frozenset[str] = _HELD) -> None:
        self._root = root
        self._held = held
        self.rules: list[str] = []
        self.exact = True
        self.keys: set[str] = set()
        self.pieces: set[str] = set()
        self._left = MAX_RULES
        self._named: dict[str, str] = {}  # reference → rule
        self._leaves: dict[str, str] = {}  # JSON → rule
        self._targets: dict[str, str] = {}  # reference → its name among definitions
        self.terminals: list[str] = []
        self._count = 0

    # --- rules of our own -------------------------------------------------------------------------

    def node(self, schema: Schema) -> str:
        """The name of a rule for `schema`."""
        if isinstance(schema, bool) or not _has_structure(schema):
            return self._leaf(schema)
        said = {key for key in schema if key not in _NOTES}
        if said == {"$ref"}:
            return self._reference(schema["$ref"])
        if said == {"allOf"} and len(schema["allOf"]) == 1:
            return self.node(schema["allOf"][0])
        if "allOf" in said and (merged := self._merged(schema)) is not None:
            return self.node(merged)
        if said in ({"anyOf"}, {"oneOf"}):
            (key,) = said
            self._note_one_of(schema)
            return self._rule(" | ".join(self.node(branch) for branch in schema[key]))
        kind = schema.get("type")
        if isinstance(kind, list) and len(kind) > 1:
            if said - {"type"} <= (_OF_OBJECTS | _OF_ARRAYS):
                return self._rule(" | ".join(self.node({**schema, "type": one}) for one in kind))
            return self._leaf(schema)
        kind = kind[0] if isinstance(kind, list) and kind else kind
        dropped = said - self._held
        if kind in ("object", None) and "properties" in schema:
            # What only narrows the choice of properties is left to validation, rather than their order.
            dropped |= said & _NARROWING | {key for key in ("anyOf", "oneOf") if _only_requires(schema, key)}
            if said - dropped <= _OF_OBJECTS:
                self.exact &= not dropped
                return self._object(schema)
        elif kind == "array" and isinstance(schema.get("items"), dict) and said - dropped <= _OF_ARRAYS:
            self.exact &= not dropped
            return self._array(schema)
        return self._leaf(schema)

    def _merged(self, schema: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """An object and all parts of its `allOf` in one; None if they are not plain objects."""
        parts: list[Any] = [{key: value for key, value in schema.items() if key != "allOf"}]
        for part in schema["allOf"]:
            while isinstance(part, dict) and {key for key in part if key not in _NOTES} == {"$ref"}:
                part = resolved(self._root, part["$ref"])
            parts.append(part)
        properties: dict[str, Any] = {}
        required: list[str] = []
        for part in parts:
            if not isinstance(part, dict) or part.get("type", "object") != "object":
                return None
            if {key for key in part if key not in _NOTES} - (_OF_OBJECTS - {"additionalProperties"}):
                return None
            for name, value in (part.get("properties") or {}).items():
                properties[name] = {"allOf": [properties[name], value]} if name in properties else value
            required += [name for name in part.get("required") or () if name not in required]
        return {"type": "object", "properties": properties, "required": required} if properties else None

    def _reference(self, reference: str) -> str:
        if reference not in self._named:
            # Named before it is written: it may contain itself.
            self._named[reference] = name = self._name()
            self.rules.append(f"{name}: {self.node(resolved(self._root, reference))}")
        return self._named[reference]

    def _object(self, schema: Mapping[str, Any]) -> str:
        properties = dict(sorted(schema["properties"].items()))
        required = set(schema.get("required") or ())
        others = schema.get("additionalProperties")
        for name in sorted(required - set(properties)):
            if others is False:
                raise UnsupportedSchemaError(f"property {name!r} is required and may not be there")
            properties[name] = {} if others is None else others
        self.keys |= required
        members = {}
        for name, value in properties.items():
            if value is False:
                if name in required:
                    raise UnsupportedSchemaError(f"property {name!r} is required and has no value")
                continue
            key = _literal(json.dumps(name, ensure_ascii=False))
            members[name] = self._rule(f'{key} WS? ":" WS? {self.node(value)} WS?')
        other = None
        if others is not None and others is not False:
            other = self._rule(f'{self._other_name(properties)} WS? ":" WS? {self.node(others)} WS?')
        count = len(members)
        if count <= ANY_ORDER and (1 << count) <= self._left:
            self._left -= 1 << count
            rest = self._any_order(members, required, other)
        elif count <= _MAX_IN_ORDER:
            rest = self._in_order(members, required, other)
        else:
            raise UnsupportedSchemaError(f"an object with {count} properties")
        return self._rule(f'"{{" WS? {rest}')

    def _other_name(self, properties: Mapping[str, Any]) -> str:
        """A terminal for names that are not among `properties`, spelled without escapes."""
        name = f"NAME{len(self.terminals)}"
        known = "|".join(re.escape(key).replace("/", r"\/") for key in sorted(properties))
        but = f' & ~/"({known})"/' if properties else ""
        self.terminals.append(f'{name}: /"[^"\\\\\\x00-\\x1f]{{0,64}}"/{but}')
        return name

    def _any_order(self, members: Mapping[str, str], required: set[str], other: str | None) -> str:
        """What may follow an object's opening: a rule for every set of properties that are there.

        `other` is the rule of members that are not declared, if there may be any.
        """
        names = list(members)
        needed = sum(1 << i for i, name in enumerate(names) if name in required)
        prefix = self._name()

        def ways(there: int, comma: str) -> str:
            result = [
                f"{comma}{members[name]} {prefix}_{there | 1 << i}"
                for i, name in enumerate(names)
                if not there >> i & 1
            ]
            if other is not None:
                result.append(f"{comma}{other} {prefix}_{there}")
            if there & needed == needed:
                result.append('"}"')
            return " | ".join(result)

        for there in range(0 if other is not None else 1, 1 << len(names)):
            self.rules.append(f"{prefix}_{there}: {ways(there, _COMMA)}")
        self.rules.append(f"{prefix}: {ways(0, '')}")
        return prefix

    def _in_order(self, members: Mapping[str, str], required: set[str], other: str | None) -> str:
        """As `_any_order`, each property before those that follow it in the declaration, others last."""
        prefix = self._name()
        for state in ("first", "more"):
            comma = _COMMA if state == "more" else ""
            for i, (name, member) in enumerate(members.items()):
                ways = [f"{comma}{member} {prefix}_more_{i + 1}"]
                if name not in required:
                    ways.append(f"{prefix}_{state}_{i + 1}")
                self.rules.append(f"{prefix}_{state}_{i}: " + " | ".join(ways))
            more = "" if other is None else f" | {comma}{other} {prefix}_more_{len(members)}"
            self.rules.append(f'{prefix}_{state}_{len(members)}: "}}"{more}')
        return f"{prefix}_first_0"

    def _array(self, schema: Mapping[str, Any]) -> str:
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if most is not None and most < least:
            raise UnsupportedSchemaError("an array with fewer items than its least number")
        if least > _MAX_REPEATS or (most or 0) > _MAX_REPEATS:
            return self._leaf(schema)
        if most == 0:
            return self._rule('"[" WS? "]"')
        item = self._rule(f"{self.node(schema['items'])} WS?")
        more = self._rule(f"{_COMMA}{item}")
        upper = "" if most is None else most - 1
        some = f"{item} {more}{{{max(least - 1, 0)},{upper}}}"
        return self._rule(f'"[" WS? {some} "]"' + ("" if least else ' | "[" WS? "]"'))

    def _leaf(self, schema: Schema) -> str:
        value = self.with_definitions(self.held(schema))
        if isinstance(value, dict):
            value = {**value, "x-guidance": {"whitespace_pattern": WHITE_SPACE}}
        text = json.dumps(value)
        if text not in self._leaves:
            self._leaves[text] = self._rule(f"%json {text}")
        return self._leaves[text]

    def _rule(self, body: str) -> str:
        name = self._name()
        self.rules.append(f"{name}: {body}")
        return name

    def _name(self) -> str:
        self._count += 1
        return f"r{self._count}"

    # --- what `%json` gets ------------------------------------------------------------------------

    def held(self, schema: Schema) -> Schema:
        """`schema` with what `%json` holds; references point into definitions of our own."""
        if isinstance(schema, bool):
            return schema
        result: dict[str, Any] = {}
        for key, value in schema.items():
            if key in _NOTES:
                continue
            if key == "oneOf":
                self._note_one_of(schema)
                result["anyOf"] = [self.held(branch) for branch in value]
            elif key not in self._held:
                self.exact = False
            elif key == "$ref":
                result[key] = "#/$defs/" + self._target(value)
            elif key == "format":
                if value in _FORMATS:
                    result[key] = value
            elif key == "pattern":
                self.pieces.update(_spelled(value))
                result[key] = value
            elif (key == "multipleOf" and value > _MAX_STEP) or (
                key in ("enum", "const") and len(json.dumps(value)) > _MAX_CONSTANT
            ):
                self.exact = False
            elif key == "allOf" and _patterns(value) + ("pattern" in schema) > 1:
                self.exact = False  # their intersection may take the library minutes
                result[key] = [self.held(_without_pattern(branch)) for branch in value]
            elif key in ("anyOf", "allOf", "prefixItems"):
                result[key] = [self.held(branch) for branch in value]
            elif key in ("properties", "patternProperties"):
                result[key] = {name: self.held(sub) for name, sub in sorted(value.items())}
            elif key in ("items", "additionalProperties"):
                result[key] = self.held(value)
            else:
                result[key] = value
        if "oneOf" in schema and "anyOf" in schema:  # two in one place: the other is left to validation
            self.exact = False
        return result

    def with_definitions(self, value: Schema) -> Schema:
        """`value` beside all that it refers to, if it refers to anything."""
        if not isinstance(value, dict) or not self._targets:
            return value
        definitions: dict[str, Schema] = {}
        while missing := [ref for ref, name in self._targets.items() if name not in definitions]:
            for reference in missing:
                definitions[self._targets[reference]] = self.held(resolved(self._root, reference))
        return {**value, "$defs": definitions}

    def _target(self, reference: str) -> str:
        return self._targets.setdefault(reference, f"d{len(self._targets)}")

    def _note_one_of(self, schema: Mapping[str, Any]) -> None:
        branches = schema.get("oneOf")
        if branches and not _exclusive(branches):
            self.exact = False


_COMMA = '"," WS? '


def resolved(root: Schema, reference: str) -> Schema:
    """What a reference inside the document points to. UnsupportedSchemaError if nowhere."""
    value: Any = root
    if reference not in ("", "#"):
        if not reference.startswith("#/"):
            raise UnsupportedSchemaError(f"the reference {reference!r} is not a pointer into the document")
        for part in reference[2:].split("/"):
            part = unquote(part).replace("~1", "/").replace("~0", "~")
            try:
                value = value[int(part)] if isinstance(value, list) else value[part]
            except (KeyError, IndexError, ValueError, TypeError):
                raise UnsupportedSchemaError(f"the reference {reference!r} leads nowhere") from None
    if not isinstance(value, dict | bool):
        raise UnsupportedSchemaError(f"the reference {reference!r} leads to no schema")
    return value


def _only_requires(schema: Mapping[str, Any], key: str) -> bool:
    """Whether the branches under `key` do no more than require properties."""
    branches = schema.get(key) or ()
    return bool(branches) and all(
        isinstance(branch, dict) and {name for name in branch if name not in _NOTES} <= {"required", "type"}
        for branch in branches
    )


def _patterns(branches: list[Any]) -> int:
    return sum(isinstance(branch, dict) and "pattern" in branch for branch in branches)


def _without_pattern(branch: Any) -> Any:
    return {k: v for k, v in branch.items() if k != "pattern"} if isinstance(branch, dict) else branch


def _has_structure(schema: Any) -> bool:
    """Whether an object with declared properties, or a reference to what may be one, lies in it."""
    return _any_below(schema, lambda node: "properties" in node or "$ref" in node)


def _any_below(value: Any, wanted: Callable[[Mapping[str, Any]], bool]) -> bool:
    if isinstance(value, dict):
        return wanted(value) or any(_any_below(child, wanted) for child in value.values())
    return isinstance(value, list) and any(_any_below(child, wanted) for child in value)


def _exclusive(branches: list[Any]) -> bool:
    """Whether no value fits two of the branches, as far as their types, or one constant property, tell."""
    if not all(isinstance(branch, dict) for branch in branches):
        return False
    kinds = [branch.get("type") for branch in branches]
    plain = [kind for kind in kinds if isinstance(kind, str)]
    if len(plain) == len(kinds) == len(set(plain)) and not {"integer", "number"} <= set(plain):
        return True
    constants: list[dict[str, str]] = []
    for branch in branches:
        required = branch.get("required") or ()
        properties = branch.get("properties") or {}
        constants.append(
            {
                name: json.dumps(value["const"])
                for name, value in properties.items()
                if name in required and isinstance(value, dict) and isinstance(value.get("const"), str)
            }
        )
    shared = set.intersection(*map(set, constants)) if constants else set()
    return any(len({entry[name] for entry in constants}) == len(branches) for name in shared)


def _spelled(pattern: str) -> list[str]:
    """The stretches of a pattern that stand for themselves, and all of them in one."""
    pieces = [piece for piece in _PATTERN_SYNTAX.sub(_spelled_out, pattern).split("\0") if piece]
    return [*pieces, "".join(pieces)] if pieces else []


def _spelled_out(part: re.Match[str]) -> str:
    if part["code"]:
        return chr(int(part["code"], 16))
    return part["escaped"] or "\0"


def _literal(text: str) -> str:
    """`text` as a Lark string."""
    return json.dumps(text, ensure_ascii=False)
