"""Anthropic's endpoints: /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from k2hybrid.server.body import read_object
from k2hybrid.server.failures import failure_body, json_response
from k2hybrid.server.guard import key_scope
from k2hybrid.server.live import LiveRuns
from k2hybrid.server.messages_reply import Frame, Reply, whole_message
from k2hybrid.server.messages_request import MessagesCall, parse_messages
from k2hybrid.server.patient import PatientResponse
from k2hybrid.server.runs import failure_of, identified, log_answer, merge, start_runs
from k2hybrid.server.served import ChatRun, ServedModel
from k2hybrid.server.sse import EventStream, named_event


class Anthropic:
    """The handlers, over one model under one name: a request for any other name gets this one."""

    def __init__(self, model: ServedModel, name: str, live: LiveRuns) -> None:
        self._model = model
        self._live = live
        self._name = name

    async def messages(self, request: Request) -> Response:
        """Parse, queue, and answer as a stream or as a whole."""
        body = await read_object(request)
        identity = uuid.uuid4().hex
        call, run = await run_in_threadpool(self._start, body, request.scope, f"msg_{identity}")
        self._live.add([run])

        def close(sent: bool) -> None:
            self._live.end([run], park=not sent and bool(call.request.retry_key))

        frames = self._frames(call, run, identity)
        if call.stream:
            return EventStream(_events(frames, request.scope), close, _ping)
        return PatientResponse(_message(frames), lambda error: failure_of(error, request.scope), close)

    async def count_tokens(self, request: Request) -> Response:
        """How long the prompt of such a request would be."""
        body = await read_object(request)
        return json_response({"input_tokens": await run_in_threadpool(self._count, body, request.scope)})

    def _start(self, body: dict[str, Any], scope: Scope, response_id: str) -> tuple[MessagesCall, ChatRun]:
        """In a thread: parse, render, queue."""
        call = parse_messages(body)
        request = identified(call.request, body, scope, response_id)
        (run,) = start_runs(self._model, request)
        return dataclasses.replace(call, request=request), run

    def _count(self, body: dict[str, Any], scope: Scope) -> int:
        request = parse_messages(body, counting=True).request
        return self._model.count(dataclasses.replace(request, scope=key_scope(scope)))

    async def _frames(self, call: MessagesCall, run: ChatRun, identity: str) -> AsyncGenerator[Frame, None]:
        reply = Reply(identity, self._name, call.display)
        started = time.monotonic()
        yield reply.opening(run)
        async with aclosing(merge([run])) as deltas:
            async for _, delta in deltas:
                if delta is not None:
                    for frame in reply.push(delta):
                        yield frame
        closing = reply.closing(run, call.request.max_tokens)
        log_answer(call.request.request_id, [run], time.monotonic() - started)
        for frame in closing:
            yield frame


async def _events(frames: AsyncGenerator[Frame, None], scope: Scope) -> AsyncGenerator[bytes, None]:
    try:
        async with aclosing(frames):
            async for frame in frames:
                yield named_event(frame["type"], frame)
                if frame["type"] == "message_start":
                    yield _ping()
    except Exception as error:
        yield named_event("error", failure_body(failure_of(error, scope), scope))


async def _message(frames: AsyncGenerator[Frame, None]) -> dict[str, Any]:
    async with aclosing(frames):
        return whole_message([frame async for frame in frames])


def _ping() -> bytes:
    """What says no more than that somebody is there: other than comments, clients' idle timers see it."""
    return named_event("ping", {"type": "ping"})
