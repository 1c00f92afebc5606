"""JSON schemas of clients, checked and brought into one form (draft 2020-12) before anything works with them.

Grammars and validators recurse through schemas in native code, so what would overflow a stack or multiply
without end is refused here. Real clients are sloppy: older drafts, OpenAPI's `nullable`, nulls and unknown
keywords pass. In an admitted schema only keywords that say which values are valid are left, and every
reference is `#` or `#/$defs/…`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any
from urllib.parse import unquote

from k2hybrid.chat.pattern import PatternError, UnsupportedPatternError, portable
from k2hybrid.chat.recursion import TooDeepError, heaviest, in_place_work
from k2hybrid.chat.tokenizer import replace_surrogates
from k2hybrid.errors import RequestError

MAX_CHARS = 1 << 20  # of one schema as JSON
MAX_ALL_CHARS = 8 << 20
MAX_NODES = 20_000  # JSON values of one schema; what is referred to counts again
MAX_ALL_NODES = 200_000
MAX_LEVELS = 64  # of JSON
MAX_NESTING = 32  # schemas in each other
MAX_REACH = 256  # the same through references; llguidance overflows its stack at about 1,500
MAX_WORK = 10_000  # schemas that apply to one and the same value
MAX_ENUM = 10_000
MAX_PROPERTIES = 2_000
MAX_BRANCHES = 256
_MAX_BITS = 1_024  # of an integer
_MAX_COUNT = 1 << 31  # no text is longer
# What a pattern costs, in nodes: at first, and for each character.
_PATTERN_NODES, _PATTERN_CHAR_NODES = 50, 1
_MAX_KEPT_CHARS = 16_384

_TYPES = ("string", "number", "integer", "boolean", "object", "array", "null")
_COUNTS = frozenset(
    "minLength maxLength minItems maxItems minProperties maxProperties minContains maxContains".split()
)
_LIMITS = frozenset("minimum maximum exclusiveMinimum exclusiveMaximum multipleOf".split())
# Schemas for the same value, and for parts of it.
_SAME = frozenset("not if then else".split())
_PARTS = frozenset(
    "items contains additionalProperties propertyNames unevaluatedItems unevaluatedProperties".split()
)
_BRANCHES = frozenset("allOf anyOf oneOf".split())
_LACKING = frozenset("$dynamicRef $recursiveRef".split())
# Where something is dropped, a value may match more than it should. Under these that could turn a valid value
# into an invalid one, so they are dropped as well.
_NOT_MONOTONE = frozenset("not if then else maxContains unevaluatedItems unevaluatedProperties".split())
# `nullable` beside these alone is one more type; beside others, one more alternative.
_TYPED = _COUNTS | _LIMITS | _PARTS
_TYPED |= frozenset("type enum format pattern properties patternProperties required prefixItems".split())

_INDEX = re.compile("0|[1-9][0-9]{0,5}")

_Place = tuple[Any, str | int] | None  # (place of the parent, key)


@dataclass(frozen=True)
class Schema:
    """An admitted schema. `dropped` says what was left out because it cannot be checked in bounded time."""

    value: dict[str, Any] | bool
    dropped: tuple[str, ...] = ()

    @cached_property
    def text(self) -> str:
        """The schema as JSON."""
        return json.dumps(self.value, separators=(",", ":"))

    @cached_property
    def digest(self) -> str:
        """Equal for equal texts."""
        return hashlib.blake2b(self.text.encode(), digest_size=16).hexdigest()


def admit(schema: Any, param: str) -> Schema:
    """Check and normalise one schema of a client.

    Raises:
        RequestError: it is malformed, too large, or would cost too much; names the place in it.
    """
    return admit_all([(param, schema)])[0]


def admit_all(schemas: Sequence[tuple[str, Any]]) -> list[Schema]:
    """As `admit`, for all schemas of a request, each with its field; some limits count them together."""
    chars = nodes = 0
    result: list[Schema] = []
    for param, raw in schemas:
        try:
            text = _serialised(raw)
            chars += len(text)
            if chars > MAX_ALL_CHARS:
                raise _RefusedError(None, f"all schemas together are longer than {MAX_ALL_CHARS} characters")
            schema, cost = (_kept if len(text) <= _MAX_KEPT_CHARS else _admitted)(text)
            nodes += cost
            if nodes > MAX_ALL_NODES:
                raise _RefusedError(None, f"all schemas together hold more than {MAX_ALL_NODES} values")
        except _RefusedError as error:
            where = f" at {_pointer(error.place)}" if error.place else ""
            message = f"{param}: the JSON schema cannot be used{where}: {error}"
            raise RequestError(message, param=param, code="invalid_schema") from None
        result.append(schema)
    return result


class _RefusedError(Exception):
    def __init__(self, place: _Place, why: str) -> None:
        super().__init__(why)
        self.place = place


def _serialised(raw: Any) -> str:
    try:
        text = replace_surrogates(json.dumps(raw, ensure_ascii=False, allow_nan=False))
    except RecursionError:
        raise _RefusedError(None, f"it is nested more than {MAX_LEVELS} levels deep") from None
    except (TypeError, ValueError):
        raise _RefusedError(None, "it holds what is not JSON, or an endless number") from None
    if len(text) > MAX_CHARS:
        raise _RefusedError(None, f"it is longer than {MAX_CHARS} characters")
    return text


def _admitted(text: str) -> tuple[Schema, int]:
    """The admitted schema, and what it cost in nodes."""
    root = json.loads(text)
    nodes, anchors = _surveyed(root)
    cleaner = _Cleaner(root, anchors, weak=False)
    schema = cleaner.admitted()
    if cleaner.dropped:
        cleaner = _Cleaner(root, anchors, weak=True)
        schema = cleaner.admitted()
    if len(schema.text) > 2 * MAX_CHARS:
        raise _RefusedError(None, "its references repeat too much; refer to less, or to smaller parts")
    return schema, nodes + cleaner.cost


# Agents send the same tools with every request.
_kept = lru_cache(512)(_admitted)
_portable = lru_cache(1024)(portable)


def _surveyed(root: Any) -> tuple[int, dict[str, Any]]:
    """How many values there are, and the named ones."""
    nodes = 0
    anchors: dict[str, Any] = {}
    level = [root]
    for _ in range(MAX_LEVELS):
        nodes += len(level)
        if nodes > MAX_NODES:
            raise _RefusedError(None, f"it holds more than {MAX_NODES} values")
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value.values()
                for key in ("$anchor", "$dynamicAnchor", "$id", "id"):
                    name = value.get(key)
                    if isinstance(name, str) and (key.endswith("nchor") or name[:1] == "#"):
                        anchors.setdefault(name.removeprefix("#"), value)
            elif isinstance(value, list):
                below += value
            elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
                raise _RefusedError(None, "it holds an integer of more than three hundred digits")
        level = below
        if not level:
            return nodes, anchors
    raise _RefusedError(None, f"it is nested more than {MAX_LEVELS} levels deep")


@dataclass(slots=True)
class _Spot:
    """Schemas that apply to the same value: how many, and which references among them."""

    work: int = 0
    references: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Part:
    """The root, or what a reference points to."""

    spot: _Spot
    depth: int = 0
    references: set[str] = field(default_factory=set)


class _Cleaner:
    """Cleans one document. `weak`: something is dropped, so what is not monotone goes too."""

    def __init__(self, root: Any, anchors: dict[str, Any], *, weak: bool) -> None:
        self._root = root
        self._anchors = anchors
        self._weak = weak
        self.dropped: list[str] = []
        self.cost = 0
        self._names: dict[int, str] = {id(root): "#"}  # of what is referred to, by its identity
        self._waiting: list[tuple[str, Any, _Place]] = []
        self._parts: dict[str, _Part] = {}
        self._spots: list[_Spot] = []
        self._part = _Part(_Spot())

    def admitted(self) -> Schema:
        """The document, with all that it refers to."""
        value = self._cleaned("#", self._root, None)
        definitions: dict[str, Any] = {}
        while self._waiting:
            name, raw, place = self._waiting.pop()
            definitions[name.removeprefix("#/$defs/")] = self._cleaned(name, raw, place)
        self._check_recursion()
        if definitions and isinstance(value, dict):
            value["$defs"] = definitions
        return Schema(value, tuple(self.dropped))

    def _cleaned(self, name: str, raw: Any, place: _Place) -> dict[str, Any] | bool:
        self._part = self._parts[name] = _Part(_Spot())
        return self._schema(raw, place, 1, self._part.spot)

    def _check_recursion(self) -> None:
        try:
            work = in_place_work(
                {name: (part.spot.work, part.spot.references) for name, part in self._parts.items()}
            )
        except TooDeepError:
            raise _RefusedError(
                None, "a reference leads back to itself without going into a property or an item"
            ) from None
        spots = (spot.work + sum(work[name] for name in spot.references) for spot in self._spots)
        if max([*work.values(), *spots]) > MAX_WORK:
            raise _RefusedError(
                None, f"allOf, anyOf, oneOf and $ref multiply to more than {MAX_WORK} schemas for one value"
            )
        reach = heaviest({name: (part.depth, part.references) for name, part in self._parts.items()})
        if reach > MAX_REACH:
            raise _RefusedError(
                None, f"through its references it is nested more than {MAX_REACH} schemas deep"
            )

    # --- one schema -------------------------------------------------------------------------------

    def _schema(self, raw: Any, place: _Place, depth: int, spot: _Spot | None) -> dict[str, Any] | bool:
        """`spot`: of the value that it applies to, if other schemas apply to it too."""
        if depth > MAX_NESTING:
            raise _RefusedError(place, f"more than {MAX_NESTING} schemas are nested")
        if spot is None:
            spot = _Spot()
            self._spots.append(spot)
        spot.work += 1
        self._part.depth = max(self._part.depth, depth)
        self._spend(1, place)
        if isinstance(raw, bool):
            return raw
        if not isinstance(raw, dict):
            raise _RefusedError(place, "a schema must be an object or a boolean")
        said = _modern({key: value for key, value in raw.items() if value is not None or key == "const"})
        result: dict[str, Any] = {}
        for key, value in said.items():
            here = (place, key)
            if self._weak and key in _NOT_MONOTONE:
                self._drop(here, "is left out, as something it may depend on is")
            elif key in _SAME:
                result[key] = self._schema(value, here, depth + 1, spot)
            elif key in _PARTS:
                result[key] = self._schema(value, here, depth + 1, None)
            elif key in _BRANCHES:
                result[key] = self._list(value, here, depth, spot)
            elif key == "prefixItems":
                result[key] = self._list(value, here, depth, None)
            elif key in ("properties", "patternProperties"):
                result[key] = self._map(value, here, depth, None)
            elif key == "dependentSchemas":
                result[key] = self._map(value, here, depth, spot)
            elif key == "$ref":
                result[key] = self._reference(value, here, spot)
            elif key == "pattern":
                if (pattern := self._pattern(value, here)) is not None:
                    result[key] = pattern
            elif key in _LACKING:
                self._drop(here, "is not supported")
            elif key in _PLAIN:
                result[key] = _PLAIN[key](value, here)
        if "patternProperties" in result:
            self._patterns(result, place)
        if self._weak and "oneOf" in result:
            result.setdefault("allOf", []).append({"anyOf": result.pop("oneOf")})
        return _nullable(result) if raw.get("nullable") is True else result

    def _list(self, value: Any, place: _Place, depth: int, spot: _Spot | None) -> list[Any]:
        if not isinstance(value, list):
            raise _RefusedError(place, "must be an array of schemas")
        if not value and spot is not None:
            raise _RefusedError(place, "must not be empty")
        if len(value) > MAX_BRANCHES:
            raise _RefusedError(place, f"holds more than {MAX_BRANCHES} schemas")
        return [self._schema(item, (place, i), depth + 1, spot) for i, item in enumerate(value)]

    def _map(self, value: Any, place: _Place, depth: int, spot: _Spot | None) -> dict[str, Any]:
        members = _object_of(value, place).items()
        return {name: self._schema(sub, (place, name), depth + 1, spot) for name, sub in members}

    def _patterns(self, result: dict[str, Any], place: _Place) -> None:
        """Leave out names that cannot be matched; then what is said about all others does not hold either."""
        here = (place, "patternProperties")
        kept: dict[str, Any] = {}
        for name, sub in result["patternProperties"].items():
            pattern = self._pattern(name, (here, name))
            if pattern in kept:  # two spellings of one pattern
                kept[pattern] = {"allOf": [kept[pattern], sub]}
            elif pattern is not None:
                kept[pattern] = sub
            elif result.pop("additionalProperties", True) is not True:
                self._drop((place, "additionalProperties"), "is left out, as a pattern beside it is")
        result["patternProperties"] = kept

    def _pattern(self, pattern: Any, place: _Place) -> str | None:
        """`pattern` as every engine reads it; None where it has to be dropped."""
        text = _text(pattern, place)
        self._spend(_PATTERN_NODES + _PATTERN_CHAR_NODES * len(text), place)
        try:
            return _portable(text)
        except UnsupportedPatternError as error:
            self._drop(place, f"is left out: the pattern {error}")
            return None
        except PatternError as error:
            raise _RefusedError(place, f"the regular expression {error}") from None

    def _drop(self, place: _Place, why: str) -> None:
        self.dropped.append(f"{_pointer(place)} {why}")

    def _spend(self, nodes: int, place: _Place) -> None:
        self.cost += nodes
        if self.cost > 2 * MAX_NODES:
            raise _RefusedError(place, f"with all that is referred to, it holds more than {MAX_NODES} values")

    # --- references -------------------------------------------------------------------------------

    def _reference(self, reference: Any, place: _Place, spot: _Spot) -> str:
        target, where = self._resolved(reference, place)
        name = self._names.get(id(target))
        if name is None:
            name = self._names[id(target)] = f"#/$defs/d{len(self._names) - 1}"
            self._waiting.append((name, target, where))
        self._part.references.add(name)
        spot.references.append(name)
        return name

    def _resolved(self, reference: Any, place: _Place) -> tuple[Any, _Place]:
        """What a reference points to, and where that is."""
        if not isinstance(reference, str):
            raise _RefusedError(place, "must be a text")
        root_id = self._root.get("$id", self._root.get("id"))
        base, _, fragment = reference.partition("#")
        if base and base != str(root_id).rstrip("#"):
            raise _RefusedError(place, "leads out of the schema; put what it means under $defs")
        fragment = unquote(fragment)
        if fragment and fragment[0] != "/":
            if fragment not in self._anchors:
                raise _RefusedError(place, f"leads nowhere: no $anchor is called {fragment[:80]!r}")
            return self._anchors[fragment], (None, f"#{fragment}")
        value: Any = self._root
        where: _Place = None
        for part in fragment.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(value, dict) and key in value:
                value = value[key]
            elif isinstance(value, list) and _INDEX.fullmatch(key) and int(key) < len(value):
                value = value[int(key)]
            else:
                raise _RefusedError(place, f"leads nowhere: the schema has no {reference[:80]!r}")
            where = (where, key)
        return value, where


def _modern(said: dict[str, Any]) -> dict[str, Any]:
    """Keywords of older drafts in their present form."""
    if isinstance(said.get("items"), list):
        said["prefixItems"] = said.pop("items")
        if "additionalItems" in said:
            said["items"] = said["additionalItems"]
    for limit in ("Minimum", "Maximum"):
        exclusive = said.get(f"exclusive{limit}")
        if isinstance(exclusive, bool):
            del said[f"exclusive{limit}"]
            if exclusive and limit.lower() in said:
                said[f"exclusive{limit}"] = said.pop(limit.lower())
    if isinstance(dependencies := said.pop("dependencies", None), dict):
        for key, wanted in (("dependentRequired", list), ("dependentSchemas", dict | bool)):
            chosen = {name: value for name, value in dependencies.items() if isinstance(value, wanted)}
            if chosen and key not in said:
                said[key] = chosen
    properties = said.get("properties")
    if isinstance(said.get("required"), bool):  # draft 3: meant for the property around it
        del said["required"]
    if isinstance(properties, dict):
        flagged = [
            name for name, sub in properties.items() if isinstance(sub, dict) and sub.get("required") is True
        ]
        if flagged and isinstance(required := said.get("required", []), list):
            said["required"] = required + flagged
    return said


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    """`schema`, or null."""
    if "type" not in schema or not schema.keys() <= _TYPED:
        return {"anyOf": [schema, {"type": "null"}]}
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    result = {**schema, "type": kinds if "null" in kinds else [*kinds, "null"]}
    if "enum" in result and None not in result["enum"]:
        result["enum"] = [*result["enum"], None]
    return result


# --- keywords that hold no schemas ----------------------------------------------------------------


def _object_of(value: Any, place: _Place) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _RefusedError(place, "must be an object")
    if len(value) > MAX_PROPERTIES:
        raise _RefusedError(place, f"holds more than {MAX_PROPERTIES} entries")
    return value


def _type(value: Any, place: _Place) -> Any:
    kinds = value if isinstance(value, list) else [value]
    if not kinds or any(kind not in _TYPES for kind in kinds):
        raise _RefusedError(place, f"must be one or several of {', '.join(_TYPES)}")
    # Each once: a grammar is written out for every one of them.
    return list(dict.fromkeys(kinds)) if isinstance(value, list) else value


def _enum(value: Any, place: _Place) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise _RefusedError(place, "must be an array of at least one value")
    if len(value) > MAX_ENUM:
        raise _RefusedError(place, f"holds more than {MAX_ENUM} values")
    return value


def _names_of(value: Any, place: _Place) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _RefusedError(place, "must be an array of property names")
    if len(value) > MAX_PROPERTIES:
        raise _RefusedError(place, f"holds more than {MAX_PROPERTIES} names")
    return list(dict.fromkeys(value))


def _dependent(value: Any, place: _Place) -> dict[str, list[str]]:
    return {name: _names_of(names, (place, name)) for name, names in _object_of(value, place).items()}


def _count(value: Any, place: _Place) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value % 1:
        raise _RefusedError(place, "must be a whole number, zero or more")
    return min(int(value), _MAX_COUNT)


def _number(value: Any, place: _Place) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _RefusedError(place, "must be a number")
    return value


def _divisor(value: Any, place: _Place) -> float:
    if _number(value, place) <= 0:
        raise _RefusedError(place, "must be greater than zero")
    return float(value) if isinstance(value, float) else int(value)


def _flag(value: Any, place: _Place) -> bool:
    if not isinstance(value, bool):
        raise _RefusedError(place, "must be true or false")
    return value


def _text(value: Any, place: _Place) -> str:
    if not isinstance(value, str):
        raise _RefusedError(place, "must be a text")
    return value


_PLAIN: dict[str, Callable[[Any, _Place], Any]] = {
    "type": _type,
    "enum": _enum,
    "const": lambda value, place: value,
    "required": _names_of,
    "dependentRequired": _dependent,
    "uniqueItems": _flag,
    "format": _text,
    **dict.fromkeys(_COUNTS, _count),
    **dict.fromkeys(_LIMITS, _number),
    "multipleOf": _divisor,
}


def _keys(place: _Place) -> Iterator[str | int]:
    while place is not None:
        place, key = place
        yield key


def _pointer(place: _Place) -> str:
    """A JSON pointer, each name and the whole cut to a readable length."""
    parts = [str(key)[:60].replace("~", "~0").replace("/", "~1") for key in _keys(place)]
    text = "".join(f"/{part}" for part in reversed(parts))
    return text if len(text) <= 300 else f"…{text[-300:]}"
