"""OpenAI's /v1/completions: text continued as it stands."""

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
from k2hybrid.server.chat_reply import usage
from k2hybrid.server.completions_reply import TextChoice, prompt_text, summed
from k2hybrid.server.completions_request import CompletionCall, parse_completion
from k2hybrid.server.guard import request_id
from k2hybrid.server.head import Head
from k2hybrid.server.live import LiveRuns
from k2hybrid.server.patient import PatientResponse
from k2hybrid.server.retry import choice_key
from k2hybrid.server.runs import chosen, connected, failure_of, log_answer, merge, start_all
from k2hybrid.server.served import ServedModel, TextRun
from k2hybrid.server.sse import DONE, EventStream, data_event


class Completions:
    """The handler, over one model under one name. Choice i·n + j is the j-th answer to prompt i."""

    def __init__(self, model: ServedModel, name: str, live: LiveRuns) -> None:
        self._model = model
        self._name = name
        self._live = live

    async def completions(self, request: Request) -> Response:
        """Parse, queue, and answer as a stream or as a whole."""
        body = await read_object(request)
        head = Head.new("cmpl", self._name, "text_completion")
        call, runs = await run_in_threadpool(self._start, body, request.scope)
        self._live.add(runs)

        def close(sent: bool) -> None:
            self._live.end(runs, park=not sent and bool(call.requests[0].retry_key))

        if call.stream:
            return EventStream(self._events(call, runs, head, request.scope), close)
        return PatientResponse(
            self._completion(call, runs, head, request.scope),
            lambda error: failure_of(error, request.scope),
            close,
        )

    def _start(self, body: dict[str, Any], scope: Scope) -> tuple[CompletionCall, list[TextRun]]:
        """In a thread: parse, tokenize, queue."""
        call = parse_completion(body)
        first = connected(call.requests[0], body, scope)  # once: it takes as long as the body is
        requests = tuple(
            dataclasses.replace(first, prompt=request.prompt, retry_key=choice_key(first.retry_key, i))
            for i, request in enumerate(call.requests)
        )
        call = dataclasses.replace(call, requests=requests)
        return call, start_all(
            self._model.complete, (chosen(request, i) for request in requests for i in range(call.choices))
        )

    def _choices(self, call: CompletionCall) -> list[TextChoice]:
        tokenizer = self._model.tokenizer
        prompts = [request for request in call.requests for _ in range(call.choices)]
        return [
            TextChoice(i, request, tokenizer, prompt_text(request, tokenizer) if call.echo else "")
            for i, request in enumerate(prompts)
        ]

    def _ended(
        self, call: CompletionCall, runs: Sequence[TextRun], scope: Scope, started: float
    ) -> dict[str, Any]:
        """Log the answers to each prompt; the usage of all."""
        groups = [runs[i : i + call.choices] for i in range(0, len(runs), call.choices)]
        for group in groups:
            log_answer(request_id(scope), group, time.monotonic() - started)
        return summed([usage(group) for group in groups])

    async def _completion(
        self, call: CompletionCall, runs: Sequence[TextRun], head: Head, scope: Scope
    ) -> dict[str, Any]:
        choices = self._choices(call)
        started = time.monotonic()
        async with aclosing(merge(runs)) as deltas:
            async for i, delta in deltas:
                if delta is not None:
                    choices[i].push(delta)
        finished = [choice.completion(run) for choice, run in zip(choices, runs, strict=True)]
        return head.whole(finished, usage=self._ended(call, runs, scope, started))

    async def _events(
        self, call: CompletionCall, runs: Sequence[TextRun], head: Head, scope: Scope
    ) -> AsyncGenerator[bytes, None]:
        choices = self._choices(call)
        # With include_usage every chunk but the last has the field, as null.
        more = {"usage": None} if call.include_usage else {}
        started = time.monotonic()
        try:
            for choice in choices:
                if (piece := choice.opening()) is not None:
                    yield data_event(head.chunk([piece], **more))
            async with aclosing(merge(runs)) as deltas:
                async for i, delta in deltas:
                    piece = choices[i].closing(runs[i]) if delta is None else choices[i].push(delta)
                    if piece is not None:
                        yield data_event(head.chunk([piece], **more))
            totals = self._ended(call, runs, scope, started)
            if call.include_usage:
                yield data_event(head.chunk([], usage=totals))
        except Exception as error:
            yield data_event(failure_of(error, scope).body())
        yield DONE
