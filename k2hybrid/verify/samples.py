"""A file of chat requests, one JSON object a line, as the vendor's verifier reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2hybrid.errors import EvaluationError
from k2hybrid.verify.schemas import Arguments, UnusableSchemaError


@dataclass(frozen=True)
class Sample:
    """The request on line `line`, and how the arguments of each declared tool are validated."""

    line: int
    body: Mapping[str, Any]
    tools: Mapping[str, Arguments]


@dataclass(frozen=True)
class Samples:
    """All requests that can be sent. `skipped` says of which line and why one cannot be."""

    samples: tuple[Sample, ...]
    skipped: tuple[str, ...]


def read_samples(path: Path) -> Samples:
    """The requests of a file. Raises EvaluationError where a line is no request at all.

    A request with a schema that nothing can be validated against is skipped: no answer to it could be judged.
    """
    samples, skipped = [], []
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"cannot read {path}: {error}") from error
    for line, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        body = _request(text, f"{path}, line {line}")
        try:
            samples.append(Sample(line, body, {name: Arguments(schema) for name, schema in _declared(body)}))
        except UnusableSchemaError as error:
            skipped.append(f"line {line}: {error}")
    if not samples:
        raise EvaluationError(f"{path} holds no request that can be judged; each line is one, as JSON")
    return Samples(tuple(samples), tuple(skipped))


def _request(text: str, where: str) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{where}: no JSON: {error}") from error
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
        raise EvaluationError(f"{where}: a request is an object with `messages` and `tools`")
    for name, _ in _declared(body):
        if not isinstance(name, str):
            raise EvaluationError(f"{where}: each tool is an object with a `function` that has a `name`")
    return body


def _declared(body: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """Name and schema of each declared tool."""
    tools = body.get("tools") or ()
    functions = [tool.get("function") if isinstance(tool, dict) else None for tool in tools]
    return [(f.get("name"), f.get("parameters")) if isinstance(f, dict) else (None, None) for f in functions]
