"""From the engine's thread to one consumer, which may block or be a coroutine. Layer 5."""

from __future__ import annotations

import asyncio
import threading
import weakref
from queue import Empty, SimpleQueue

from k2hybrid.types import EngineEvent


class Mailbox:
    """Events of one job in order. `put` never blocks; what waits is bounded by the job's max_tokens."""

    def __init__(self) -> None:
        self._events: SimpleQueue[EngineEvent] = SimpleQueue()
        self._lock = threading.Lock()
        self._awaited: tuple[_Bell, asyncio.Future[None]] | None = None

    def put(self, event: EngineEvent) -> None:
        """Deliver; from any thread.

        Raises:
            RuntimeError: the event loop that waits for it is closed. (The engine then cancels the job.)
        """
        self._events.put(event)
        with self._lock:
            awaited, self._awaited = self._awaited, None
        if awaited is not None:
            bell, future = awaited
            bell.ring(future)

    def get(self) -> EngineEvent:
        """The next event; blocks until there is one."""
        return self._events.get()

    async def get_async(self) -> EngineEvent:
        """The next event, without blocking the event loop: other tasks run between any two."""
        await asyncio.sleep(0)
        while True:
            if (event := self._waiting()) is not None:
                return event
            loop = asyncio.get_running_loop()
            future: asyncio.Future[None] = loop.create_future()
            with self._lock:
                self._awaited = (_bell(loop), future)
            if (event := self._waiting()) is None:
                await future
                continue
            with self._lock:  # it came before anybody waited, and wakes nobody
                self._awaited = None
            return event

    def _waiting(self) -> EngineEvent | None:
        try:
            return self._events.get_nowait()
        except Empty:
            return None


class _Bell:
    """Wakes those who wait in one event loop, all of a step by one call: each call would stop the caller."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._lock = threading.Lock()
        self._due: list[asyncio.Future[None]] = []

    def ring(self, future: asyncio.Future[None]) -> None:
        """Have `future` done soon; from any thread."""
        with self._lock:
            self._due.append(future)
            if len(self._due) > 1:
                return
        loop = self._loop()
        try:
            if loop is None:
                raise RuntimeError("the event loop that waited is gone")
            loop.call_soon_threadsafe(self._wake)
        except BaseException:
            with self._lock:
                self._due.clear()
            raise

    def _wake(self) -> None:
        with self._lock:
            due, self._due = self._due, []
        for future in due:
            if not future.done():  # the task that waited may have been cancelled meanwhile
                future.set_result(None)


_BELLS: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Bell] = weakref.WeakKeyDictionary()


def _bell(loop: asyncio.AbstractEventLoop) -> _Bell:
    """Of a loop, in its thread."""
    bell = _BELLS.get(loop)
    if bell is None:
        bell = _BELLS.setdefault(loop, _Bell(loop))
    return bell
