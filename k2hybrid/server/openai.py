"""OpenAI's chat endpoint: /v1/chat/completions."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from k2hybrid.server.body import read_object
from k2hybrid.server.chat_reply import Choice, usage
from k2hybrid.server.chat_request import ChatCall, parse_chat
from k2hybrid.server.head import Head
from k2hybrid.server.live import LiveRuns
from k2hybrid.server.patient import PatientResponse
from k2hybrid.server.runs import failure_of, identified, log_answer, merge, start_runs
from k2hybrid.server.served import ChatRun, ServedModel
from k2hybrid.server.sse import DONE, EventStream, data_event


class OpenAI:
    """The handlers, over one model under one name: a request for any other name gets this one."""

    def __init__(self, model: ServedModel, name: str, live: LiveRuns) -> None:
        self._model = model
        self._live = live
        self._name = name

    async def chat_completions(self, request: Request) -> Response:
        """Parse, queue, and answer as a stream or as a whole."""
        body = await read_object(request)
        head = Head.new("chatcmpl", self._name, "chat.completion")
        call, runs = await run_in_threadpool(self._start, body, request.scope, head.id)
        self._live.add(runs)

        def close(sent: bool) -> None:
            self._live.end(runs, park=not sent and bool(call.request.retry_key))

        if call.stream:
            return EventStream(self._events(call, runs, head, request.scope), close)
        return PatientResponse(
            self._completion(call, runs, head), lambda error: failure_of(error, request.scope), close
        )

    def _start(self, body: dict[str, Any], scope: Scope, response_id: str) -> tuple[ChatCall, list[ChatRun]]:
        """In a thread: parse, render, queue."""
        call = parse_chat(body)
        request = identified(call.request, body, scope, response_id)
        call = dataclasses.replace(call, request=request)
        return call, start_runs(self._model, request, call.choices)

    def _choices(self, call: ChatCall) -> list[Choice]:
        logprobs = call.request.sampling.logprobs is not None
        return [
            Choice(
                i,
                self._model.tokenizer,
                logprobs=logprobs,
                reasoning=call.show_reasoning,
                legacy=call.legacy,
            )
            for i in range(call.choices)
        ]

    async def _completion(self, call: ChatCall, runs: Sequence[ChatRun], head: Head) -> dict[str, Any]:
        choices = self._choices(call)
        started = time.monotonic()
        async with aclosing(merge(runs)) as deltas:
            async for i, delta in deltas:
                if delta is not None:
                    choices[i].push(delta)
        finished = [choice.completion(run) for choice, run in zip(choices, runs, strict=True)]
        totals = usage(runs)
        log_answer(call.request.request_id, runs, time.monotonic() - started)
        return head.whole(finished, usage=totals)

    async def _events(
        self, call: ChatCall, runs: Sequence[ChatRun], head: Head, scope: Scope
    ) -> AsyncGenerator[bytes, None]:
        choices = self._choices(call)
        # With include_usage every chunk but the last has the field, as null.
        more = {"usage": None} if call.include_usage else {}
        started = time.monotonic()
        try:
            for choice in choices:
                yield data_event(choice.opening(head, **more))
            async with aclosing(merge(runs)) as deltas:
                async for i, delta in deltas:
                    if delta is None:
                        yield data_event(choices[i].closing(head, runs[i], **more))
                        continue
                    if delta.progress is not None:
                        yield data_event(choices[i].progress(head, delta.progress, **more))
                    for piece in choices[i].push(delta):
                        yield data_event(choices[i].chunk(head, piece, **more))
            totals = usage(runs)
            log_answer(call.request.request_id, runs, time.monotonic() - started)
            if call.include_usage:
                yield data_event(head.chunk([], usage=totals))
        except Exception as error:
            yield data_event(failure_of(error, scope).body())
        yield DONE
