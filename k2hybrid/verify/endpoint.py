"""An OpenAI-compatible endpoint, asked with the standard library alone: one connection a request."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from k2hybrid.errors import EvaluationError

_RETRIED = (408, 409, 429, 500, 502, 503, 504)
_LONGEST_WAIT_S = 60.0


class RequestFailedError(Exception):
    """A request has no answer. The message says why, without anything that was asked."""


@dataclass
class Call:
    """A call as the endpoint sent it."""

    name: str = ""
    arguments: str = ""


@dataclass
class Answer:
    """What of an answer is judged. `unreadable`: what our server tells of calls that are none."""

    finish_reason: str
    calls: list[Call] = field(default_factory=list)
    unreadable: int = 0


class Endpoint:
    """The server at `url`, with or without /v1. Any thread may use it."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float, retries: int) -> None:
        parts = urlsplit(url)
        try:
            self._port = parts.port
        except ValueError:
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EvaluationError(f"{url!r} is no address of a server; it looks like http://127.0.0.1:8000")
        self._host, self._secure = parts.hostname, parts.scheme == "https"
        self._prefix = parts.path.rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = {"Content-Type": "application/json", "Connection": "close"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout_s = timeout_s
        self._retries = retries

    def model(self) -> str:
        """The name of the first model it lists. EvaluationError if it lists none."""
        try:
            with closing(self._connection()) as connection:
                listed = json.loads(self._send(connection, "GET", "/models", None).read())
            return str(listed["data"][0]["id"])
        except (RequestFailedError, OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise EvaluationError(f"{self._host} lists no models: {reason}; name one with --model") from error
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise EvaluationError(f"{self._host} lists no models; name one with --model") from error

    def chat(self, body: Mapping[str, Any]) -> Answer:
        """The answer to one request, streamed if it asks for that. Raises RequestFailedError."""
        try:
            with closing(self._connection()) as connection:
                response = self._send(connection, "POST", "/chat/completions", body)
                return _streamed(_events(response)) if body.get("stream") else _whole(response.read())
        except (OSError, http.client.HTTPException) as error:
            raise RequestFailedError(f"no answer: {type(error).__name__}") from error
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise RequestFailedError("the answer is no chat completion") from error

    def _connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=self._timeout_s)

    def _send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: Mapping[str, Any] | None
    ) -> http.client.HTTPResponse:
        """The response of a request that was accepted, after as many tries as are allowed."""
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(self._retries + 1):
            connection.request(method, self._prefix + path, data, self._headers)
            response = connection.getresponse()
            if response.status == HTTPStatus.OK:
                return response
            refusal = _refusal(response)
            if response.status not in _RETRIED or attempt == self._retries:
                raise RequestFailedError(refusal)
            connection.close()
            time.sleep(_wait_s(response.headers.get("Retry-After"), attempt))
        raise AssertionError("the last attempt returns or raises")


def _wait_s(asked: str | None, attempt: int) -> float:
    seconds = float(asked) if asked and asked.isdecimal() else 2.0**attempt
    return min(seconds, _LONGEST_WAIT_S)


def _refusal(response: http.client.HTTPResponse) -> str:
    try:
        error = json.loads(response.read())
    except (ValueError, RecursionError):
        error = None
    return f"HTTP {response.status} {_words(error)}".rstrip()


def _words(answer: Any) -> str:
    """Type, code and field of an error object; its message may quote the request."""
    error = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(error, dict):
        return ""
    return " ".join(str(error[key])[:60] for key in ("type", "code", "param") if error.get(key))


def _whole(data: bytes) -> Answer:
    answer = json.loads(data)
    if "error" in answer and not answer.get("choices"):
        raise RequestFailedError(f"an error for an answer: {_words(answer)}".rstrip(": "))
    choice = answer["choices"][0]
    message = choice["message"]
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    return Answer(
        str(choice["finish_reason"]),
        [Call(str(function["name"]), str(function["arguments"])) for function in functions],
        _unreadable(message),
    )


def _streamed(chunks: Iterable[Any]) -> Answer:
    answer = Answer("")
    for chunk in chunks:
        if "error" in chunk:
            raise RequestFailedError(f"an error in the stream: {_words(chunk)}".rstrip(": "))
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            for part in delta.get("tool_calls") or ():
                _add(answer.calls, part)
            answer.unreadable += _unreadable(delta)
            answer.finish_reason = str(choice.get("finish_reason") or answer.finish_reason)
    if not answer.finish_reason:
        raise RequestFailedError("the stream ended without a finish_reason")
    return answer


def _add(calls: list[Call], part: Mapping[str, Any]) -> None:
    """One piece of a call; pieces with a new index begin a new one."""
    index = part.get("index", len(calls) - 1)
    if not 0 <= index <= len(calls):
        raise ValueError("calls out of order")
    if index == len(calls):
        calls.append(Call())
    function = part.get("function") or {}
    calls[index].name += function.get("name") or ""
    calls[index].arguments += function.get("arguments") or ""


def _unreadable(message: Mapping[str, Any]) -> int:
    return len((message.get("k2hybrid") or {}).get("malformed") or ())


def _events(response: http.client.HTTPResponse) -> Iterator[Any]:
    for raw in response:
        line = raw.strip()
        if not line.startswith(b"data:"):
            continue
        data = line[len(b"data:") :].strip()
        if data == b"[DONE]":
            return
        yield json.loads(data)
