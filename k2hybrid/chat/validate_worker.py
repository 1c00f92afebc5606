"""The process in which texts are validated against schemas: standard library and jsonschema_rs only.

Started by `validation.py`; `worker_side.py` reads its requests, writes its answers and bounds it. Schemas
have been admitted (`schema.py`), but native code may still overflow its stack here, or a value take it too
long: then this process ends, not the server.
"""

from __future__ import annotations

import json
import math
import re
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import jsonschema_rs

from k2hybrid.chat.worker_side import Answer, serve

MAX_LEVELS = 128  # of a text
MAX_KEPT = 256  # compiled schemas
_MAX_PATTERN_BYTES = 32 << 20  # more than an admitted pattern takes
_MAX_SHOWN = 80  # characters of a value, or of its place, in a reason
_SURROGATE = re.compile(r"[\ud800-\udfff]|\\u[dD]")


class InvalidError(Exception):
    """Why a text is not valid."""


class Schemas:
    """Compiled schemas by their digests; those used longest ago are forgotten."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, jsonschema_rs.Draft202012Validator] = OrderedDict()

    def add(self, digest: str, schema: Any) -> None:
        """Compile `schema`, which is an admitted one."""
        self._kept[digest] = jsonschema_rs.Draft202012Validator(
            schema,
            pattern_options=jsonschema_rs.RegexOptions(size_limit=_MAX_PATTERN_BYTES),
            validate_formats=False,
            offline=True,
        )
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)

    def get(self, digest: str) -> jsonschema_rs.Draft202012Validator | None:
        """None: not known, or no more."""
        if digest in self._kept:
            self._kept.move_to_end(digest)
        return self._kept.get(digest)


def check(validator: jsonschema_rs.Draft202012Validator, text: str) -> None:
    """InvalidError unless `text` is strict JSON that fits."""
    value = parsed(text)
    try:
        if not validator.is_valid(value):
            validator.validate(value)
    except jsonschema_rs.ValidationError as error:
        raise InvalidError(_reason(error)) from None


def parsed(text: str) -> Any:
    """`text` as strict JSON: names once, numbers finite, nesting bounded."""
    try:
        value = json.loads(text, object_pairs_hook=_members, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise InvalidError(f"nested more than {MAX_LEVELS} levels deep") from None
    except ValueError as error:
        place = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise InvalidError(f"not JSON{place}") from None
    if _SURROGATE.search(text) and not _has_utf8_form(value):
        raise InvalidError("it holds half of a surrogate pair")
    level = [value]
    for _ in range(MAX_LEVELS):
        level = [child for outer in level for child in _children(outer)]
        if not level:
            return value
    raise InvalidError(f"nested more than {MAX_LEVELS} levels deep")


def _has_utf8_form(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise InvalidError("an object has a property twice")
    return result


def _no_constant(name: str) -> Any:
    raise InvalidError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise InvalidError("a number is too large")
    return value


def _reason(error: jsonschema_rs.ValidationError) -> str:
    """One line, without much of the text."""
    name, options = error.kind.name, error.kind.as_dict()
    if name in ("additionalProperties", "unevaluatedProperties"):
        shown = ", ".join(_short(json.dumps(each, ensure_ascii=False)) for each in options["unexpected"][:3])
        what = f"undeclared properties: {shown}"
    elif name == "not":
        what = "the value is what `not` excludes"
    else:
        what = error.message
        full = json.dumps(error.instance, ensure_ascii=False, separators=(",", ":"))
        if len(full) > _MAX_SHOWN and what.startswith(full[:_MAX_SHOWN]):
            what = "the value" + what[len(full) :] if what.startswith(full) else f"the value fails {name}"
    path = "".join(
        "/" + str(key)[:40].replace("~", "~0").replace("/", "~1") for key in error.instance_path[:16]
    )
    return f"at {path or 'the top'}: {what if len(what) <= 300 else _short(what)}"


def _short(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"


# --- the process ----------------------------------------------------------------------------------


def _start(request: dict[str, Any]) -> Answer:
    schemas = Schemas()

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if "schema" in request:
            schemas.add(request["digest"], request["schema"])
        validator = schemas.get(request["digest"])
        if validator is None:
            return {"unknown": True}
        try:
            check(validator, request["text"])
        except InvalidError as error:
            return {"invalid": str(error)}
        return {}

    return answer


if __name__ == "__main__":
    serve(_start)
