"""From the engine's thread to one consumer, which may block or be a coroutine. Layer 5."""

from __future__ import annotations

import asyncio
import threading
from queue import Empty, SimpleQueue

from k2hybrid.types import EngineEvent


class Mailbox:
    """Events of one job in order. `put` never blocks; what waits is bounded by the job's max_tokens."""

    def __init__(self) -> None:
        self._events: SimpleQueue[EngineEvent] = SimpleQueue()
        self._lock = threading.Lock()
        self._awaited: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    def put(self, event: EngineEvent) -> None:
        """Deliver; from any thread.

        Raises:
            RuntimeError: the event loop that waits for it is closed. (The engine then cancels the job.)
        """
        self._events.put(event)
        with self._lock:
            awaited, self._awaited = self._awaited, None
        if awaited is not None:
            loop, future = awaited
            loop.call_soon_threadsafe(_wake, future)

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
                self._awaited = (loop, future)
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


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():  # the task that waited may have been cancelled meanwhile
        future.set_result(None)
