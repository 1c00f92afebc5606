"""A request body as a JSON object, from bytes nobody vouches for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import orjson
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from k2hybrid.errors import RequestError
from k2hybrid.server.failures import HttpError

MAX_BODY_BYTES = 32 << 20  # agents' histories reach tens of megabytes; more is a mistake
MAX_DEPTH = 100  # deeper than any real tool schema, far below Python's recursion limit
IDLE_S = 60.0  # without a byte of a body that was announced
INLINE_BYTES = 64 << 10  # larger bodies are parsed in a thread, so that other streams go on


async def read_object(request: Request) -> dict[str, Any]:
    """The body of `request` as a JSON object.

    Raises:
        HttpError: 415 if it is not said to be JSON, 413 over the limit, 408 if it does not come.
        RequestError: it is anything but a JSON object.
    """
    _check_type(request.headers.get("content-type", ""))
    data = await _read(request)
    if len(data) <= INLINE_BYTES:
        return parse_object(data)
    return await run_in_threadpool(parse_object, data)


def _check_type(content_type: str) -> None:
    """JSON only: with most other types, or none, browsers send any page's request without asking."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json")):
        return
    came = f"came as {kind[:80]}" if kind else "came without a type"
    raise HttpError(
        415,
        f"the body {came}; send it with the header 'Content-Type: application/json' (curl: -H)",
        kind="invalid_request_error",
        code="unsupported_media_type",
    )


async def _read(request: Request) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise _too_large()
    chunks: list[bytes] = []
    size, stream = 0, request.stream()
    while (chunk := await _next(stream)) is not None:
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise _too_large()
        chunks.append(chunk)
    return b"".join(chunks)


async def _next(stream: AsyncGenerator[bytes, None]) -> bytes | None:
    """The next piece of a body, None at its end."""
    try:
        return await asyncio.wait_for(anext(stream, None), IDLE_S)
    except TimeoutError:
        raise HttpError(
            408,
            f"the body did not arrive: nothing came for {IDLE_S:g} seconds",
            kind="invalid_request_error",
            code="body_timeout",
        ) from None


def _too_large() -> HttpError:
    limit = f"{MAX_BODY_BYTES >> 20} MiB"
    return HttpError(
        413, f"the body is larger than {limit}", kind="request_too_large", code="request_too_large"
    )


def parse_object(data: bytes) -> dict[str, Any]:
    """`data` as a JSON object no deeper than MAX_DEPTH; RequestError otherwise."""
    if not data.strip():
        raise RequestError("the body is empty; send a JSON object", code="invalid_json")
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, not {json_type(value)}", code="invalid_type")
    _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise RequestError(f"the JSON is nested deeper than {MAX_DEPTH} levels", code="invalid_json")
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]


def json_type(value: Any) -> str:
    """JSON's own word for a parsed value's type, with its article."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "a string"
    return "an array" if isinstance(value, list) else "an object"
