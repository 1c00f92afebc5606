"""Which error becomes which HTTP status. One table; every dialect renders from it.

Which dialect a failure is told in depends on path and headers alone, so that it is the right one too for what
is refused before any handler sees it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope

from k2hybrid.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    ContextLengthError,
    EngineError,
    ExpertReadError,
    K2Error,
    NativeError,
    RequestError,
    TemplateError,
    TimeLimitError,
    WeightReadError,
)

# Seconds a client should wait when the queue is full (about one long prompt's prefill on a CPU), or for
# another server.
RETRY_AFTER_S = 5


class HttpError(K2Error):
    """A refusal that is about HTTP itself (key, host, size, path), not about a request's fields."""

    def __init__(self, status: int, message: str, *, kind: str, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.code = code


class AnswerCancelledError(K2Error):
    """The server ended this answer because it is ending itself; another one may give it."""


class ShuttingDownError(K2Error):
    """The server is ending and takes nothing new; the next one at this address may."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as a client sees it. `retry`: whether sending the same again may succeed."""

    status: int
    kind: str
    message: str
    param: str | None = None
    code: str | None = None
    retry: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {
            "error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code},
        }


@dataclass(frozen=True, slots=True)
class _Rule:
    status: int
    kind: str
    code: str | None = None
    retry: bool = False


# Most specific first: the first class that matches wins.
_RULES: tuple[tuple[type[K2Error], _Rule], ...] = (
    (ContextLengthError, _Rule(400, "invalid_request_error", "context_length_exceeded")),
    (RequestError, _Rule(400, "invalid_request_error")),  # its own code
    (TemplateError, _Rule(500, "server_error", "template_error")),
    (CapacityError, _Rule(429, "rate_limit_error", "capacity_exceeded", retry=True)),
    (AnswerCancelledError, _Rule(503, "server_error", "shutting_down", retry=True)),
    (ShuttingDownError, _Rule(503, "server_error", "shutting_down", retry=True)),
    (ExpertReadError, _Rule(500, "server_error", "expert_read_error", retry=True)),
    (WeightReadError, _Rule(500, "server_error", "weight_read_error", retry=True)),
    (TimeLimitError, _Rule(504, "server_error", "time_limit")),
    (EngineError, _Rule(500, "server_error", "engine_error")),
    (ConfigError, _Rule(500, "server_error", "config_error")),
    (CheckpointError, _Rule(500, "server_error", "checkpoint_error")),
    (NativeError, _Rule(500, "server_error", "native_error")),
    (K2Error, _Rule(500, "server_error", "internal_error")),
)


def classify(error: BaseException, request_id: str = "") -> Failure:
    """The failure a client is told about. What is not a `K2Error` is told by its request id alone."""
    if isinstance(error, HttpError):
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        return Failure(error.status, error.kind, str(error), code=error.code, headers=headers)
    for cls, rule in _RULES:
        if isinstance(error, cls):
            own = error if isinstance(error, RequestError) else None
            headers = {"Retry-After": str(RETRY_AFTER_S)} if rule.status in (429, 503) else {}
            return Failure(
                rule.status,
                rule.kind,
                str(error),
                param=own.param if own else None,
                code=rule.code or (own.code if own else None),
                retry=rule.retry,
                headers=headers,
            )
    return Failure(
        500, "server_error", f"internal error; the log has it as {request_id}", code="internal_error"
    )


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response. Lone surrogates cannot occur: the parser refuses them and the decoder makes none."""
    return Response(orjson.dumps(value), status, dict(headers or {}), "application/json")


# Anthropic's words, by status; beside these it is invalid_request_error below 500, and api_error above.
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def is_anthropic(scope: Scope) -> bool:
    """Whether a request is to one of Anthropic's paths, those that do not exist included.

    /v1/models is everybody's: there it is told by the header that their clients always send, and no others.
    """
    path = str(scope["path"])
    if path == "/v1/models" or path.startswith("/v1/models/"):
        return "anthropic-version" in Headers(scope=scope)
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def failure_body(failure: Failure, scope: Scope) -> dict[str, Any]:
    """The error object in the dialect of the request."""
    if not is_anthropic(scope):
        return failure.body()
    other = "invalid_request_error" if failure.status < 500 else "api_error"
    kind = _ANTHROPIC_TYPES.get(failure.status, other)
    return {
        "type": "error",
        "error": {"type": kind, "message": failure.message},
        "request_id": scope["state"]["request_id"],
    }


def failure_response(failure: Failure, scope: Scope) -> Response:
    """The whole HTTP answer of a failure. SDKs retry 408, 409, 429 and 5xx unless told otherwise."""
    headers = dict(failure.headers)
    if not failure.retry:
        headers["x-should-retry"] = "false"
    return json_response(failure_body(failure, scope), failure.status, headers)
