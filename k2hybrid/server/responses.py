"""OpenAI's Responses endpoints: /v1/responses and what lies below it."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from k2hybrid.server.body import read_object
from k2hybrid.server.failures import HttpError, json_response
from k2hybrid.server.fields import wrong_value
from k2hybrid.server.guard import key_scope
from k2hybrid.server.live import LiveRuns
from k2hybrid.server.patient import PatientResponse
from k2hybrid.server.responses_reply import Reply, ResponseHead
from k2hybrid.server.responses_request import ResponsesCall, parse_responses
from k2hybrid.server.responses_store import Kept, Responses, ResponsesStore
from k2hybrid.server.runs import failure_of, identified, log_answer, merge, start_runs
from k2hybrid.server.served import ChatRun, ServedModel
from k2hybrid.server.sse import EventStream, named_event

MAX_LISTED = 100  # items on a page, as in the API


class _Frames:
    """Events as they go over the wire, numbered in the order in which they do."""

    def __init__(self) -> None:
        self._sent = 0

    def frame(self, event: Mapping[str, Any]) -> bytes:
        numbered = {**event, "sequence_number": self._sent}
        self._sent += 1
        return named_event(event["type"], numbered)


class ResponsesApi:
    """The handlers, over one model under one name, and the responses they remember."""

    def __init__(self, model: ServedModel, name: str, live: LiveRuns) -> None:
        self._model = model
        self._name = name
        self._live = live
        self._store = ResponsesStore()

    async def create(self, request: Request) -> Response:
        """Parse, queue, and answer as a stream or as a whole."""
        body = await read_object(request)
        head = ResponseHead(f"resp_{uuid.uuid4().hex}", int(time.time()), self._name)
        scope = request.scope
        call, run = await run_in_threadpool(self._start, body, scope, head.id)
        self._live.add([run])
        reply = Reply(call, head, self._model.tokenizer)

        def close(sent: bool) -> None:
            self._live.end([run], park=not sent and bool(call.request.retry_key))

        if call.stream:
            frames = _Frames()
            return EventStream(
                self._events(call, run, reply, frames, scope),
                close,
                lambda: frames.frame(reply.in_progress()),
            )
        return PatientResponse(self._whole(call, run, reply), lambda error: failure_of(error, scope), close)

    def _start(self, body: dict[str, Any], scope: Scope, response_id: str) -> tuple[ResponsesCall, ChatRun]:
        """In a thread: parse, render, queue."""
        call = self._parsed(body, scope, response_id)
        return call, start_runs(self._model, call.request)[0]

    def _parsed(self, body: dict[str, Any], scope: Scope, response_id: str) -> ResponsesCall:
        call = parse_responses(body, self._store.of(key_scope(scope)), response_id)
        return dataclasses.replace(call, request=identified(call.request, body, scope, response_id))

    async def _whole(self, call: ResponsesCall, run: ChatRun, reply: Reply) -> dict[str, Any]:
        started = time.monotonic()
        async with aclosing(merge([run])) as deltas:
            async for _, delta in deltas:
                if delta is not None:
                    reply.push(delta)
        return await self._finished(call, run, reply.finish(run, int(time.time())), started)

    async def _events(
        self, call: ResponsesCall, run: ChatRun, reply: Reply, frames: _Frames, scope: Scope
    ) -> AsyncGenerator[bytes, None]:
        started = time.monotonic()
        try:
            for event in reply.opening():
                yield frames.frame(event)
            async with aclosing(merge([run])) as deltas:
                async for _, delta in deltas:
                    for event in reply.push(delta) if delta is not None else ():
                        yield frames.frame(event)
            last = reply.finish(run, int(time.time()))
            await self._finished(call, run, last, started)
            for event in last:
                yield frames.frame(event)
        except Exception as error:
            yield frames.frame(reply.failed(failure_of(error, scope)))

    async def _finished(
        self, call: ResponsesCall, run: ChatRun, last: list[dict[str, Any]], started: float
    ) -> dict[str, Any]:
        """The response; kept before its client learns of it, who may go on from it at once."""
        response: dict[str, Any] = last[-1]["response"]
        log_answer(call.request.request_id, [run], time.monotonic() - started)
        if call.request.store:
            await run_in_threadpool(self._store.of(call.request.scope).add, response, call.items)
        return response

    async def input_tokens(self, request: Request) -> Response:
        """How long the prompt of such a request would be."""
        body = await read_object(request)
        count = await run_in_threadpool(self._count, body, request.scope)
        return json_response({"object": "response.input_tokens", "input_tokens": count})

    def _count(self, body: dict[str, Any], scope: Scope) -> int:
        return self._model.count(self._parsed(body, scope, f"resp_{uuid.uuid4().hex}").request)

    async def retrieve(self, request: Request) -> Response:
        """A response that is still remembered."""
        if request.query_params.get("stream") == "true":
            raise wrong_value("stream", "is not supported here: only what is finished is kept")
        return json_response(self._kept(request).response)

    async def delete(self, request: Request) -> Response:
        """Forget a response."""
        kept = self._kept(request)
        self._shelf(request).remove(kept.response["id"])
        return json_response({"id": kept.response["id"], "object": "response", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        """Only what runs in the background can be cancelled, and nothing does."""
        self._kept(request)
        raise HttpError(
            400,
            "only what runs in the background can be cancelled; close the connection to end this",
            kind="invalid_request_error",
            code="invalid_value",
        )

    async def input_items(self, request: Request) -> Response:
        """What a response answers, the newest first unless asked otherwise, in pages."""
        items = list(self._kept(request).items)
        query = request.query_params
        if query.get("order", "desc") != "asc":
            items.reverse()
        after = query.get("after")
        ids = [item["id"] for item in items]
        if after is not None:
            if after not in ids:
                raise wrong_value("after", "names no item of this response")
            items = items[ids.index(after) + 1 :]
        limit = query.get("limit", "20")
        if not (limit.isascii() and limit.isdigit() and len(limit) < 4 and 1 <= int(limit) <= MAX_LISTED):
            raise wrong_value("limit", f"must be between 1 and {MAX_LISTED}")
        page = items[: int(limit)]
        return json_response(
            {
                "object": "list",
                "data": page,
                "first_id": page[0]["id"] if page else None,
                "last_id": page[-1]["id"] if page else None,
                "has_more": len(page) < len(items),
            }
        )

    def _shelf(self, request: Request) -> Responses:
        return self._store.of(key_scope(request.scope))

    def _kept(self, request: Request) -> Kept:
        identity = request.path_params["id"]
        kept = self._shelf(request).get(identity)
        if kept is None:
            raise HttpError(
                404,
                f"Response with id {identity[:100]!r} not found",
                kind="invalid_request_error",
                code="response_not_found",
            )
        return kept
