"""Prefill of what the next turn will begin with, while the machine is idle. Layer 5.

After a final answer templates drop the reasoning of the run that led to it. The next user turn therefore
differs from what is cached where that reasoning began, and would prefill the whole run again while the user
waits. The idle machine does it before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import takewhile

from k2hybrid.errors import K2Error
from k2hybrid.types import ChatRequest, EngineEvent, Job, Message, SamplingParams

log = logging.getLogger(__name__)


class Ahead:
    """Renders in a thread of its own and submits background jobs: they give way to every request.

    Args:
        prompt_ids: renders a request as a real one would be.
        submit: takes the job.
    """

    def __init__(
        self, prompt_ids: Callable[[ChatRequest], list[int]], submit: Callable[[Job], object]
    ) -> None:
        self._prompt_ids = prompt_ids
        self._submit = submit
        self._worker = ThreadPoolExecutor(1, "k2hybrid-ahead")

    def prefill(self, request: ChatRequest) -> None:
        """Compute what every user turn after `request.messages` begins with. Returns at once."""
        try:
            self._worker.submit(self._run, request)
        except RuntimeError:  # closed meanwhile
            log.debug("closed; nothing is prefilled ahead")

    def close(self) -> None:
        """Start nothing any more."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _run(self, request: ChatRequest) -> None:
        try:
            # Two turns that differ from their first letter on share exactly what any turn begins with.
            first, second = (
                self._prompt_ids(replace(request, messages=(*request.messages, Message("user", text))))
                for text in ("1", "?")
            )
            common = sum(
                1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
            )
            if common:
                self._submit(self._job(request, first[:common]))
        except K2Error as error:  # the context is full, the template refuses, the engine has stopped
            log.debug("nothing is prefilled ahead: %s", error)
        except Exception:
            log.exception("prefilling ahead failed")

    def _job(self, request: ChatRequest, ids: list[int]) -> Job:
        return Job(
            ids=ids,
            sampling=SamplingParams(temperature=0.0),
            max_tokens=0,
            stop=_Never(),
            sink=_nobody,
            request_id=f"{request.request_id} ahead",
            scope=request.scope,
            store=request.store,
            background=True,
        )


class _Never:
    def push(self, token: int) -> bool:
        return False


def _nobody(event: EngineEvent) -> None:
    """Nobody waits for a background job."""
