"""Responses kept in memory for requests that go on from them: limited, and apart for each API key."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from k2hybrid.server.responses_items import Item, owner

MAX_RESPONSES = 1000
MAX_BYTES = 64 << 20  # of JSON; a history counts in each response that has it


@dataclass(frozen=True, slots=True)
class Kept:
    """A response, and all items that it answers: those of the responses before it, and its own input."""

    response: Mapping[str, Any]
    items: tuple[Item, ...]
    by_id: Mapping[str, Item]  # these and the response's own
    size: int


class Responses:
    """The responses of one API key, least recently used out first. Thread-safe."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        with self._lock:
            return len(self._kept)

    def add(self, response: Mapping[str, Any], items: Sequence[Item]) -> None:
        """Keep `response`, unless it alone is too large for the shelf. Takes as long as it is large."""
        size = len(orjson.dumps(response)) + len(orjson.dumps(items))
        by_id = _by_id([*items, *response["output"]])
        with self._lock:
            self._remove(response["id"])
            if size > self._max_bytes:
                return
            self._kept[response["id"]] = Kept(response, tuple(items), by_id, size)
            self._bytes += size
            while self._bytes > self._max_bytes or len(self._kept) > self._max_responses:
                self._remove(next(iter(self._kept)))

    def get(self, response_id: str) -> Kept | None:
        """The response, which so becomes the most recently used."""
        with self._lock:
            kept = self._kept.get(response_id)
            if kept is not None:
                self._kept.move_to_end(response_id)
            return kept

    def remove(self, response_id: str) -> bool:
        """Forget it; whether it was there."""
        with self._lock:
            return self._remove(response_id)

    def history(self, response_id: str) -> tuple[Item, ...] | None:
        """All items up to the response's end."""
        kept = self.get(response_id)
        return None if kept is None else (*kept.items, *kept.response["output"])

    def item(self, identity: str) -> Item | None:
        """The item with an id that was given here."""
        response_id = owner(identity)
        kept = self.get(response_id) if response_id else None
        return kept.by_id.get(identity) if kept else None

    def _remove(self, response_id: str) -> bool:
        kept = self._kept.pop(response_id, None)
        self._bytes -= kept.size if kept else 0
        return kept is not None


def _by_id(items: Sequence[Item]) -> dict[str, Item]:
    """Of several with one id, the first."""
    return {item["id"]: item for item in reversed(items) if isinstance(item.get("id"), str)}


class ResponsesStore:
    """A shelf for each API key's namespace; there are as many as keys that were used."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shelves: dict[str, Responses] = {}

    def of(self, scope: str) -> Responses:
        """The responses of one namespace."""
        with self._lock:
            return self._shelves.setdefault(scope, Responses())
