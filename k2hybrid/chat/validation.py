"""Whether a text is JSON that fits a schema, found out by a process of its own (`validate_worker.py`)."""

from __future__ import annotations

import json
from typing import Any

from k2hybrid.chat.schema import Schema
from k2hybrid.chat.worker import Worker, WorkerError

MAX_TEXT_CHARS = 8 << 20
_MEMORY_BYTES = 1 << 30
_MAX_ANSWER_BYTES = 1 << 16


class Validator:
    """One lazily started process, killed when it exceeds its bounds and started anew after that.

    Thread-safe: checks take turns, and each has `timeout_s` of its own.
    """

    def __init__(self, *, timeout_s: float = 2.0) -> None:
        self._timeout_s = timeout_s
        self._cpu_s = int(timeout_s) + 1
        start = {"memory_bytes": _MEMORY_BYTES, "cpu_s": self._cpu_s}
        self._worker = Worker("k2hybrid.chat.validate_worker", start)
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Of the process, if one runs."""
        return self._worker.pid

    def check(self, schema: Schema, text: str) -> str | None:
        """None if `text` is JSON that fits `schema`, else why not, in a few words."""
        if len(text) > MAX_TEXT_CHARS:
            return f"longer than {MAX_TEXT_CHARS} characters"
        if self._ending():
            return "could not be validated: the server is ending"
        request = {"cpu_s": self._cpu_s, "digest": schema.digest, "text": text}
        try:
            answer = self._exchange(request)
            if "unknown" in answer:  # its process has not met the schema, or has forgotten it
                answer = self._exchange({**request, "schema": schema.value})
        except WorkerError as error:
            return f"could not be validated: it {error}"
        finally:
            if self._ending():  # meanwhile; it may have started another process
                self._worker.close()
        if "error" in answer:
            return f"could not be validated: {answer['error'][:200]}"
        reason: str | None = answer.get("invalid")
        return reason

    def close(self) -> None:
        """End the process, if one runs. No text is valid after that."""
        self._closed = True
        self._worker.close()

    def _ending(self) -> bool:
        return self._closed

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        return self._worker.exchange(json.dumps(request).encode(), self._timeout_s, _MAX_ANSWER_BYTES)
