"""A client of the server's HTTP API, of the standard library alone: one connection a request."""

from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from tqdm import tqdm

from k2hybrid.errors import EvaluationError, ReplyError

_TIMEOUT_S = 600
_SHOWN = 300  # characters of an unexpected answer that an error quotes

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Said:
    """A call as the model made it. Arguments that are no JSON stay text, which equals no arguments."""

    name: str
    arguments: Any


@dataclass(frozen=True)
class Reply:
    """One answer: the message to send back unchanged, and what is read from it."""

    message: dict[str, Any]
    finish_reason: str
    completion_tokens: int

    @property
    def content(self) -> str:
        return self.message.get("content") or ""

    @property
    def reasoning(self) -> str:
        return self.message.get("reasoning_content") or ""

    @property
    def calls(self) -> list[Said]:
        """The calls in the order they were made; one that the server could not read counts as a call too."""
        functions = [call["function"] for call in self.message.get("tool_calls") or ()]
        unreadable = self.message.get("k2hybrid", {}).get("malformed", ())
        return [Said(f["name"], _json(f["arguments"])) for f in functions] + [
            Said("(malformed)", entry.get("text", "")) for entry in unreadable
        ]


class Client:
    """Talks to the server at `url` (with or without /v1). Any thread may use it.

    `constrained`: whether a grammar holds the answers in their format; without it they are the model's own.
    """

    def __init__(self, url: str, *, constrained: bool = False) -> None:
        self._constrained = constrained
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = None
        if parts.scheme not in ("http", "https") or not parts.hostname or (":" in parts.netloc and not port):
            raise EvaluationError(f"{url!r} is no address of a server; it looks like http://127.0.0.1:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._host, self._port, self._secure = parts.hostname, port, parts.scheme == "https"

    def chat(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], **options: Any
    ) -> Reply:
        """One chat completion. ReplyError: the request was refused, or the answer is none."""
        body = {"model": "mini-eval", "messages": list(messages), "constrain": self._constrained, **options}
        if tools:
            body["tools"] = list(tools)
        answer = self._post("/v1/chat/completions", body)
        try:
            choice = answer["choices"][0]
            reply = Reply(choice["message"], choice["finish_reason"], answer["usage"]["completion_tokens"])
            _ = reply.content + reply.reasoning, reply.calls
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ReplyError(f"no chat completion: {_short(json.dumps(answer))}") from error
        return reply

    def tokenize(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[int]:
        """The ids of the prompt that these messages and tools make."""
        answer = self._post("/tokenize", {"messages": list(messages), "tools": list(tools)})
        tokens = answer.get("tokens") if isinstance(answer, dict) else None
        if not isinstance(tokens, list):
            raise ReplyError(f"no tokens: {_short(json.dumps(answer))}")
        return tokens

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=_TIMEOUT_S)
        try:
            data = json.dumps(body).encode()
            headers = {"Content-Type": "application/json", "Connection": "close"}
            connection.request("POST", self._prefix + path, data, headers)
            response = connection.getresponse()
            text = response.read().decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise EvaluationError(f"the server at {self.url} does not answer: {reason}") from error
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise ReplyError(f"HTTP {response.status} for {path}: {_short(text)}")
        try:
            return json.loads(text)
        except ValueError as error:
            raise ReplyError(f"{path} did not answer with JSON: {_short(text)}") from error


def at_once(function: Callable[[T], R], items: Iterable[T], concurrency: int, label: str) -> list[R]:
    """`function` of all items, `concurrency` at a time, results in order; a bar where someone watches."""
    listed = list(items)
    bar = tqdm(total=len(listed), desc=label, leave=False, disable=not sys.stderr.isatty())
    pool = ThreadPoolExecutor(concurrency)
    try:
        results = []
        for result in pool.map(function, listed):
            results.append(result)
            bar.update()
        return results
    finally:
        # After a failure nobody wants the rest; what is under way ends with the server.
        pool.shutdown(wait=False, cancel_futures=True)
        bar.close()


def _json(text: str) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except ValueError:
        return text


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
