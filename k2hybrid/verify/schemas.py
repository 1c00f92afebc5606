"""Whether the arguments of a call are what the tool's schema asks for.

Schemas come from files that others wrote: references lead nowhere outside the schema, and patterns that need
too long fail. What is said of a misfit names places in the schema, never a value, as values hold prompts.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

import jsonschema_rs

_BACKTRACKS = 100_000
_HIDDEN = "…"
_NAMING = ("additionalProperties", "unevaluatedProperties", "propertyNames")  # they quote what was written


class UnusableSchemaError(Exception):
    """Nothing can be validated against the schema; the message says why."""


class Arguments:
    """Validates arguments against one tool's parameters; None: the tool says nothing of them."""

    def __init__(self, schema: Any) -> None:
        try:
            self._validator = jsonschema_rs.validator_for(
                {} if schema is None else schema,
                mask=_HIDDEN,
                offline=True,
                pattern_options=jsonschema_rs.FancyRegexOptions(backtrack_limit=_BACKTRACKS),
            )
        except (ValueError, TypeError, jsonschema_rs.ValidationError) as error:
            reason = str(error).partition("\n")[0]
            raise UnusableSchemaError(f"its schema cannot be used: {reason}") from error

    def misfit(self, text: str) -> str | None:
        """Why `text` is not right; None if it is."""
        try:
            value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
        except (ValueError, RecursionError):
            return "the arguments are not JSON"
        try:
            error = next(iter(self._validator.iter_errors(value)), None)
        except ValueError:  # half a surrogate pair, for example
            return "the arguments hold a value that cannot be validated"
        if error is None:
            return None
        path = [str(step) for step in error.schema_path]
        said = "" if any(step in _NAMING for step in path) else f": {error.message}"
        return f"the arguments do not fit the schema at /{'/'.join(path)}{said}"


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is beyond all bounds")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
