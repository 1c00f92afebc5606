"""From a parsed request to running answers, and their deltas in one stream: what every dialect does alike."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from starlette.types import Scope

from k2hybrid.server.failures import Failure, classify
from k2hybrid.server.guard import key_scope, log_unexpected, request_id
from k2hybrid.server.retry import choice_key, retry_key
from k2hybrid.server.served import ChatRun, Run, ServedModel
from k2hybrid.types import ChatRequest, CompletionRequest, SamplingParams

T = TypeVar("T")
_Request = TypeVar("_Request")
_Retriable = TypeVar("_Retriable", ChatRequest, CompletionRequest)
_Run = TypeVar("_Run", bound=Run)

_log = logging.getLogger("k2hybrid.server")

# Deltas waiting for a slow client beyond what the run itself keeps.
_MERGE_DEPTH = 64


def identified(request: ChatRequest, body: Mapping[str, Any], scope: Scope, response_id: str) -> ChatRequest:
    """`request` with what the connection adds, and the id under which its answer goes out."""
    return dataclasses.replace(connected(request, body, scope), response_id=response_id)


def connected(request: _Retriable, body: Mapping[str, Any], scope: Scope) -> _Retriable:
    """`request` with what the connection adds: its id, the key's namespace, and the key of its retries."""
    namespace = key_scope(scope)
    return dataclasses.replace(
        request,
        request_id=request_id(scope),
        scope=namespace,
        # What is to be computed anew takes nothing up again either.
        retry_key=retry_key(namespace, scope["path"], body) if request.reuse else "",
    )


def start_runs(model: ServedModel, request: ChatRequest, choices: int = 1) -> list[ChatRun]:
    """Queue one run per choice. Call it in a thread."""
    return start_all(model.chat, (chosen(request, i) for i in range(choices)))


def chosen(request: _Retriable, choice: int) -> _Retriable:
    """`request` for one of several answers: with a seed, each has its own; and so has each retry."""
    return dataclasses.replace(
        request,
        sampling=seeded(request.sampling, choice),
        retry_key=choice_key(request.retry_key, choice),
    )


def start_all(start: Callable[[_Request], _Run], requests: Iterable[_Request]) -> list[_Run]:
    """Start a run for each request; if one cannot be, those before it are cancelled."""
    runs: list[_Run] = []
    try:
        for request in requests:
            runs.append(start(request))
    except BaseException:
        for run in runs:
            run.cancel()
        raise
    return runs


def seeded(sampling: SamplingParams, choice: int) -> SamplingParams:
    """`sampling` of one of several answers: with a seed, each has its own."""
    if sampling.seed is None:
        return sampling
    return dataclasses.replace(sampling, seed=sampling.seed + choice)


async def merge(runs: Sequence[AsyncIterable[T]]) -> AsyncGenerator[tuple[int, T | None], None]:
    """(choice, delta) as they come, (choice, None) at a run's end; the first failure ends everything."""
    queue: asyncio.Queue[tuple[int, T | Exception | None]] = asyncio.Queue(_MERGE_DEPTH)

    async def pump(i: int, run: AsyncIterable[T]) -> None:
        try:
            async for delta in run:
                await queue.put((i, delta))
        except Exception as error:
            await queue.put((i, error))
        else:
            await queue.put((i, None))

    pumps = [asyncio.create_task(pump(i, run)) for i, run in enumerate(runs)]
    try:
        running = len(runs)
        while running:
            i, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            running -= item is None
            yield i, item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


def failure_of(error: Exception, scope: Scope) -> Failure:
    """What a client is told about `error`; logged if nobody foresaw it."""
    log_unexpected(error, scope)
    return classify(error, request_id(scope))


def log_answer(identity: str, runs: Sequence[Run], seconds: float) -> None:
    """One line an answer: sizes and time, no text."""
    first = runs[0].usage
    generated = sum(run.usage.completion_tokens for run in runs)
    _log.info(
        "%s: prompt %d (cached %d) + %d tokens in %.1f s",
        identity, first.prompt_tokens, first.cached_tokens, generated, seconds,
    )  # fmt: skip
