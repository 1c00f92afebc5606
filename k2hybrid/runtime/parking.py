"""Parking: values kept for a while under a key, for whoever comes back for them. Layer 5."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

TTL_S = 600.0
LIMIT = 64


@dataclass(frozen=True, slots=True, eq=False)  # one is as good as itself only
class _Entry(Generic[T]):
    key: str
    value: T
    discard: Callable[[T], None]
    until: float  # on the clock


class Parking(Generic[T]):
    """A bounded store of what may be taken up again. Thread-safe.

    Several entries under one key form a queue: the first put is the first taken. Whatever leaves untaken
    (too old, one too many, cleared) has its `discard` called exactly once, outside the lock: it may block and
    may call back, but must not raise. Age is looked at on every call, and by a timer if nobody calls.

    Args:
        ttl_s: seconds after which an entry expires.
        limit: entries at most; one more puts the oldest out.
        clock: seconds, never going back.
    """

    def __init__(
        self, *, ttl_s: float = TTL_S, limit: int = LIMIT, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ttl_s = ttl_s
        self._limit = limit
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: deque[_Entry[T]] = deque()  # oldest first; few, so a key is searched for
        self._timer: threading.Timer | None = None
        self._closed = False

    def put(self, key: str, value: T, discard: Callable[[T], None]) -> None:
        """Keep `value` under `key`; after `close` it is discarded at once."""
        with self._lock:
            self._entries.append(_Entry(key, value, discard, self._clock() + self._ttl_s))
            out = self._expired()
            limit = 0 if self._closed else self._limit
            while len(self._entries) > limit:
                out.append(self._entries.popleft())
            self._arm()
        _discard(out)

    def take(self, key: str) -> T | None:
        """Hand over what was put first under `key`; None if there is nothing. It is the caller's now."""
        with self._lock:
            out = self._expired()
            found = next((entry for entry in self._entries if entry.key == key), None)
            if found is not None:
                self._entries.remove(found)
        _discard(out)
        return None if found is None else found.value

    def expire(self) -> None:
        """Discard what is too old."""
        with self._lock:
            out = self._expired()
        _discard(out)

    def clear(self) -> None:
        """Discard everything."""
        with self._lock:
            out = list(self._entries)
            self._entries.clear()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        _discard(out)

    def close(self) -> None:
        """Discard everything, now and from now on. Repeatedly."""
        with self._lock:
            self._closed = True
        self.clear()

    def __len__(self) -> int:
        self.expire()
        with self._lock:
            return len(self._entries)

    # --- under the lock ---------------------------------------------------------------------------

    def _expired(self) -> list[_Entry[T]]:
        now, out = self._clock(), []
        while self._entries and self._entries[0].until <= now:  # one ttl for all: the oldest go first
            out.append(self._entries.popleft())
        return out

    def _arm(self) -> None:
        if self._timer is None and self._entries:
            self._timer = threading.Timer(max(self._entries[0].until - self._clock(), 0.0), self._rang)
            self._timer.daemon = True
            self._timer.start()

    # --- the timer's thread -----------------------------------------------------------------------

    def _rang(self) -> None:
        with self._lock:
            if self._timer is not threading.current_thread():
                return  # cleared meanwhile
            self._timer = None
            out = self._expired()
            self._arm()
        _discard(out)


def _discard(entries: list[_Entry[T]]) -> None:
    for entry in entries:
        entry.discard(entry.value)
