"""A whole answer that may take very long, and noticing that nobody waits for it any more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from k2hybrid.server import sse
from k2hybrid.server.failures import Failure, failure_body, failure_response, json_response


class PatientResponse(Response):
    """Sends the JSON that `work` returns; then calls `close`, always.

    Within `sse.KEEP_ALIVE_S` the status says how it ended. After that it is 200, a white-space byte follows
    every `KEEP_ALIVE_S` (JSON may begin with any number of them), and a failure is an `error` object in the
    body: clients give up on a silent connection, mostly after 600 seconds.

    Args:
        failed: the failure to report for an exception of `work`.
        close: called with whether everything was sent, before `work` is cancelled.
    """

    media_type = "application/json"

    def __init__(
        self,
        work: Coroutine[Any, Any, dict[str, Any]],
        failed: Callable[[Exception], Failure],
        close: Callable[[bool], None],
    ) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._work = work
        self._failed = failed
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Wait, and answer; stop the work when the client goes."""
        task = asyncio.ensure_future(self._work)
        gone = asyncio.ensure_future(sse.wait_gone(receive))
        waiting: set[asyncio.Future[Any]] = {task, gone}
        started = sent = False
        try:
            while not task.done():
                await asyncio.wait(waiting, timeout=sse.KEEP_ALIVE_S, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    return
                if not task.done():
                    if not started:
                        started = True
                        await send(
                            {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                        )
                    await send({"type": "http.response.body", "body": b" ", "more_body": True})
            await self._finish(task, started, scope, receive, send)
            sent = True
        finally:
            self._close(sent)
            await sse.end_task(task)
            await sse.end_task(gone)

    async def _finish(
        self, task: asyncio.Future[dict[str, Any]], started: bool, scope: Scope, receive: Receive, send: Send
    ) -> None:
        try:
            response, value = None, task.result()
        except Exception as error:
            failure = self._failed(error)
            response, value = failure_response(failure, scope), failure_body(failure, scope)
        if started:
            await send({"type": "http.response.body", "body": orjson.dumps(value), "more_body": False})
        else:
            await (response or json_response(value))(scope, receive, send)
