"""JSON from files nobody vouches for: bounded, no duplicate keys, no NaN, any failure a named error."""

from __future__ import annotations

import json
import os
import reprlib
import stat
from pathlib import Path
from typing import Any, NoReturn

from k2hybrid.errors import CheckpointError

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def show(value: object) -> str:
    """`value` for an error message: one line, bounded in length and depth, control characters escaped."""
    if value is None or type(value) is bool:
        return json.dumps(value)
    if type(value) is int and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    return _SHORT.repr(value)


def read_bounded(path: Path, limit_bytes: int, error: type[CheckpointError]) -> bytes:
    """The content of the regular file `path`, at most `limit_bytes`.

    Raises:
        error: the file is missing, unreadable, no regular file, or larger.
    """
    try:
        # A pipe in place of the file must not block the open.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode):
                raise error(f"{path} is not a regular file")
            if info.st_size > limit_bytes:
                raise error(f"{path} has {info.st_size} bytes; more than {limit_bytes} is not plausible")
            return file.read(limit_bytes + 1)
    except FileNotFoundError:
        raise error(f"{path} is missing; download or synthesize the checkpoint again") from None
    except (OSError, ValueError) as problem:
        raise error(f"{path} cannot be read: {problem}") from problem


def parse_object(data: bytes, what: str, error: type[CheckpointError]) -> dict[str, Any]:
    """The JSON object in `data`; `what` names it in messages.

    Raises:
        error: not UTF-8, not JSON, nested too deeply, a key twice in one object, NaN or Infinity, no object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise error(f"{what} has the key {show(twice)} twice in one object")
        return result

    def constant(word: str) -> NoReturn:
        raise error(f"{what} holds {word}, which is not JSON")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except UnicodeDecodeError as problem:
        raise error(f"{what} is not UTF-8 (byte {problem.start})") from None
    except RecursionError:
        raise error(f"{what} is nested too deeply") from None
    except ValueError as problem:
        raise error(f"{what} is not valid JSON: {problem}") from None
    if not isinstance(value, dict):
        raise error(f"{what} is not a JSON object")
    return value
