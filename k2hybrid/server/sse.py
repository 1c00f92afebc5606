"""Event streams with keep-alive, and noticing that a client has gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

KEEP_ALIVE_S = 10.0  # clients and proxies give up after 30 to 600 silent seconds
KEEP_ALIVE = b": keep-alive\n\n"  # a comment: every client seen skips it
DONE = b"data: [DONE]\n\n"


def comment() -> bytes:
    """What says no more than that somebody is there."""
    return KEEP_ALIVE


def data_event(value: Any) -> bytes:
    """One `data:` event holding `value` as JSON (which never spans lines)."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


def named_event(name: str, value: Any) -> bytes:
    """As `data_event`, under the name that clients choose their handler by."""
    return b"event: " + name.encode() + b"\n" + data_event(value)


async def wait_gone(receive: Receive) -> None:
    """Return when the client has disconnected. Call it after the body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends what `events` yields as it comes, until it ends or the client goes; then calls `close`, always.

    Args:
        events: must not raise: it turns its errors into events.
        close: called with whether everything was sent, before `events` is closed.
        keep_alive: what to send when there was nothing for a while; called only while `events` is waiting.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        close: Callable[[bool], None],
        keep_alive: Callable[[], bytes] = comment,
    ) -> None:
        # Proxies must neither store nor collect the stream.
        super().__init__(None, 200, {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._close = close
        self._keep_alive = keep_alive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Headers at once, events as they come, and a sign of life after every KEEP_ALIVE_S without one."""
        gone = asyncio.ensure_future(wait_gone(receive))
        item: asyncio.Future[bytes] | None = None
        sent = False
        try:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            while True:
                if item is None:
                    item = asyncio.ensure_future(anext(self._events))
                waiting: set[asyncio.Future[Any]] = {item, gone}
                await asyncio.wait(waiting, timeout=KEEP_ALIVE_S, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    return
                if not item.done():
                    chunk = self._keep_alive()
                else:
                    try:
                        chunk = item.result()
                    except StopAsyncIteration:
                        break
                    item = None
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            sent = True
        finally:
            # Not left to the generator, for one that never began runs none of its code; and before its end,
            # which cancels what it was reading.
            self._close(sent)
            await end_task(gone)
            if item is not None:
                await end_task(item)
            await self._events.aclose()


async def end_task(task: asyncio.Future[Any]) -> None:
    """Cancel `task` and wait for it, so that its own clean-up has run."""
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # taken note of: whoever wanted the result has it
