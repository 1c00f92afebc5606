"""What needs no model: the first tool, and for its required parameters the first literals of the prompt.

Printed beside the model's own figure, to show how little the cases give away.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from k2hybrid.mini_eval.client import Said
from k2hybrid.mini_eval.conversation import Conversation
from k2hybrid.mini_eval.marking import pair_up

_LITERAL = re.compile(
    r"\"(?P<a>[^\"]+)\"|'(?P<b>[^']+)'|“(?P<c>[^”]+)”"  # quoted
    r"|(?P<number>(?<![\w.-])\d+(?:\.\d+)?(?![\w-]|\.\d))"
    r"|(?P<code>\w*[\d@/_.-][\w@/.-]*\w)"  # codes, dates, paths, addresses
    r"|(?<!^)(?<![.?!] )(?P<name>[A-Z]\w*(?: [A-Z]\w*)*)"  # capitals that begin no sentence
)


def predict(case: Conversation) -> list[Said]:
    """One call of the first tool."""
    function = case.tools[0]["function"]
    schema = function.get("parameters") or {}
    texts, numbers = _literals(case.last.user)
    properties = schema.get("properties", {})
    required = schema.get("required", ())
    arguments = {n: _fill(properties.get(n, {}), case.last.user, texts, numbers) for n in required}
    return [Said(function["name"], arguments)]


def is_right(case: Conversation) -> bool:
    """Whether the prediction is all the calls of the case."""
    steps = case.last.steps
    return len(steps) == 1 and pair_up(predict(case), steps[0].calls) is not None


def _literals(text: str) -> tuple[Iterator[str], Iterator[float]]:
    texts: list[str] = []
    numbers: list[float] = []
    for match in _LITERAL.finditer(text):
        if match["number"]:
            numbers.append(float(match["number"]))
        else:
            texts.append(next(group for group in match.groups() if group))
    # Where nothing stands out, the last word.
    return iter(texts or re.findall(r"\w+", text)[-1:]), iter(numbers)


def _fill(schema: dict[str, Any], prompt: str, texts: Iterator[str], numbers: Iterator[float]) -> Any:
    if "enum" in schema:
        return next((choice for choice in schema["enum"] if str(choice) in prompt), schema["enum"][0])
    match schema.get("type"):
        case "integer" | "number":
            return next(numbers, 0)
        case "boolean":
            return True
        case "array":
            kind = (schema.get("items") or {}).get("type")
            return list(numbers) if kind in ("integer", "number") else list(texts)
        case "object":
            properties = schema.get("properties", {})
            return {name: _fill(inner, prompt, texts, numbers) for name, inner in properties.items()}
        case _:
            return next(texts, "")
