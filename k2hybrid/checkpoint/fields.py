"""Strict reading of configuration fields: every problem is collected, so one error names them all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from k2hybrid.checkpoint.strict_json import show


class Fields:
    """One JSON object of a configuration. A wrong field adds to `problems` and yields a placeholder."""

    def __init__(self, values: Mapping[str, Any], problems: list[str], where: str = "") -> None:
        self.values = values
        self.problems = problems
        self.where = where

    def problem(self, name: str, text: str) -> None:
        self.problems.append(f"{self.where}{name} {text}")

    def integer(self, name: str, low: int, high: int) -> int:
        value = self.values.get(name)
        if name not in self.values:
            self.problem(name, "is missing")
        elif type(value) is not int:  # bool is an int, and refused
            self.problem(name, f"must be an integer, not {show(value)}")
        elif not low <= value <= high:
            self.problem(name, f"must lie in {low}…{high}, not {show(value)}")
        else:
            return value
        return low

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        return None if self.values.get(name) is None else self.integer(name, low, high)

    def number(self, name: str, low: float, high: float) -> float:
        """A finite number in [low, high]."""
        value = self.values.get(name)
        if name not in self.values:
            self.problem(name, "is missing")
        elif type(value) not in (int, float):
            self.problem(name, f"must be a number, not {show(value)}")
        elif not low <= value <= high:  # type: ignore[operator]  # NaN fails here as well
            self.problem(name, f"must lie in {low:g}…{high:g}, not {show(value)}")
        elif math.isfinite(value):  # type: ignore[arg-type]
            return float(value)  # type: ignore[arg-type]
        return low

    def boolean(self, name: str) -> bool:
        value = self.values.get(name)
        if type(value) is not bool:
            self.problem(
                name, "is missing" if name not in self.values else f"must be true or false, not {show(value)}"
            )
            return False
        return value

    def only(self, name: str, supported: Sequence[Any], *, required: bool = True) -> None:
        """Refuse any value but the supported ones (compared with their types: 1 is not true)."""
        if name not in self.values:
            if required:
                self.problem(name, f"is missing; supported: {_listed(supported)}")
            return
        value = self.values[name]
        if not any(_same(value, one) for one in supported):
            self.problem(name, f"= {show(value)} is not supported; supported: {_listed(supported)}")

    def child(self, name: str, *, required: bool = True) -> Fields | None:
        """The object under `name`, or None if it is absent or null."""
        value = self.values.get(name)
        if isinstance(value, Mapping):
            return Fields(value, self.problems, f"{self.where}{name}.")
        if value is not None:
            self.problem(name, f"must be an object, not {show(value)}")
        elif required:
            self.problem(name, "is missing")
        return None


def _same(value: Any, one: Any) -> bool:
    return type(value) is type(one) and bool(value == one)


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(show, values))
