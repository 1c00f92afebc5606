"""From the engine's thread to one consumer, which may block or be a coroutine. Layer 5."""

from __future__ import annotations

import asyncio
import threading
from collections import deque

from k2hybrid.types import EngineEvent


class Mailbox:
    """Events of one job in order. `put` never blocks; what waits is bounded by the job's max_tokens."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._events: deque[EngineEvent] = deque()
        self._awaited: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    def put(self, event: EngineEvent) -> None:
        """Deliver; from any thread.

        Raises:
            RuntimeError: the event loop that waits for it is closed. (The engine then cancels the job.)
        """
        with self._condition:
            self._events.append(event)
            self._condition.notify()
            awaited, self._awaited = self._awaited, None
        if awaited is not None:
            loop, future = awaited
            loop.call_soon_threadsafe(_wake, future)

    def get(self) -> EngineEvent:
        """The next event; blocks until there is one."""
        with self._condition:
            while not self._events:
                self._condition.wait()
            return self._events.popleft()

    async def get_async(self) -> EngineEvent:
        """The next event, without blocking the event loop: other tasks run between any two."""
        await asyncio.sleep(0)
        while True:
            with self._condition:
                if self._events:
                    return self._events.popleft()
                loop = asyncio.get_running_loop()
                future: asyncio.Future[None] = loop.create_future()
                self._awaited = (loop, future)
            await future


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():  # the task that waited may have been cancelled meanwhile
        future.set_result(None)
