"""Typed reading of JSON fields. A wrong type or value is a RequestError that names the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from k2hybrid.errors import RequestError
from k2hybrid.server.body import json_type


class Fields:
    """One JSON object under the name clients know it by (`messages[2].tool_calls[0]`).

    Every reader treats null as absent: clients send both. Unknown fields are never looked at.
    """

    def __init__(self, value: Mapping[str, Any], path: str = "") -> None:
        self.value = value
        self.path = path

    @classmethod
    def of(cls, value: Any, path: str) -> Fields:
        """`value` as an object, or an error naming `path`."""
        if not isinstance(value, dict):
            raise wrong_type(path, "an object", value)
        return cls(value, path)

    def name(self, key: str) -> str:
        """The full name of field `key`."""
        return f"{self.path}.{key}" if self.path else key

    def text(self, key: str, default: str | None = None) -> str | None:
        """A string."""
        value = self.value.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise wrong_type(self.name(key), "a string", value)
        return value

    def required_text(self, key: str) -> str:
        """A string that must be there and not be empty."""
        value = self.text(key)
        if not value:
            raise RequestError(
                f"{self.name(key)} is missing or empty", param=self.name(key), code="missing_required"
            )
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """A boolean."""
        value = self.value.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise wrong_type(self.name(key), "a boolean", value)
        return value

    def number(self, key: str, default: float, low: float, high: float, *, above: bool = False) -> float:
        """A finite number in [low, high], or in (low, high] with `above`."""
        value = self.value.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise wrong_type(self.name(key), "a number", value)
        if not low <= value <= high or (above and value == low):
            span = f"above {low:g} and at most {high:g}" if above else f"between {low:g} and {high:g}"
            raise wrong_value(self.name(key), f"must be {span}, not {value:g}")
        return float(value)

    def integer(self, key: str, low: int | None = None, high: int | None = None) -> int | None:
        """An integer (`5.0` counts as one) within the bounds given."""
        value = self.value.get(key)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():  # JSON integers beyond 64 bits arrive as floats
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong_type(self.name(key), "an integer", value)
        if low is not None and value < low:
            raise wrong_value(self.name(key), f"must be at least {low}, not {value}")
        if high is not None and value > high:
            raise wrong_value(self.name(key), f"must be at most {high}, not {value}")
        return value

    def array(self, key: str) -> list[Any]:
        """An array; empty when absent."""
        value = self.value.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise wrong_type(self.name(key), "an array", value)
        return value

    def objects(self, key: str) -> list[Fields]:
        """An array of objects; empty when absent."""
        return [Fields.of(item, f"{self.name(key)}[{i}]") for i, item in enumerate(self.array(key))]

    def child(self, key: str) -> Fields:
        """An object; empty when absent."""
        value = self.value.get(key)
        return Fields.of({} if value is None else value, self.name(key))


def wrong_type(param: str, wanted: str, value: Any) -> RequestError:
    """The error for a value of another JSON type than `wanted`."""
    return RequestError(f"{param} must be {wanted}, not {json_type(value)}", param=param, code="invalid_type")


def wrong_value(param: str, problem: str) -> RequestError:
    """The error for a value of the right type that cannot be used."""
    return RequestError(f"{param} {problem}", param=param, code="invalid_value")
