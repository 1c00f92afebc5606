"""Prefill of what the next turn will begin with, while the machine is idle. Layer 5.

After a final answer templates drop the reasoning of the run that led to it. The next user turn therefore
differs from what is cached where that reasoning began, and would prefill the whole run again while the user
waits. The idle machine does it before.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from itertools import takewhile

from k2hybrid.errors import K2Error
from k2hybrid.types import ChatRequest, DoneEvent, EngineEvent, Job, Message, SamplingParams

log = logging.getLogger(__name__)

MAX_WAITING = 8
MOST_TRIES = 16  # of one request: others that come between them cancel the job
LOOK_SECONDS = 0.05  # between two looks whether the machine is idle


class Ahead:
    """Renders in a thread of its own, while nothing runs, and submits background jobs.

    Args:
        prompt_ids: renders a request as a real one would be.
        submit: takes the job.
        idle: whether no request runs or waits.
    """

    def __init__(
        self,
        prompt_ids: Callable[[ChatRequest], list[int]],
        submit: Callable[[Job], object],
        idle: Callable[[], bool],
    ) -> None:
        self._prompt_ids = prompt_ids
        self._submit = submit
        self._idle = idle
        self._changed = threading.Condition()
        # With how often each was tried; the oldest is dropped for the newest.
        self._waiting: deque[tuple[ChatRequest, int]] = deque(maxlen=MAX_WAITING)
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="k2hybrid-ahead", daemon=True)
        self._thread.start()

    def prefill(self, request: ChatRequest) -> None:
        """Compute what every user turn after `request.messages` begins with. Returns at once."""
        with self._changed:
            self._waiting.append((request, 0))
            self._changed.notify()

    def close(self) -> None:
        """Start nothing any more; a rendering under way ends first."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                while not self._closed and not self._idle():
                    self._changed.wait(LOOK_SECONDS)
                if self._closed:
                    return
                request, tries = self._waiting.pop()  # the newest is likeliest to go on
            self._run(request, tries + 1)

    def _run(self, request: ChatRequest, tries: int) -> None:
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
                self._submit(
                    self._job(request, first[:common], lambda event: self._ended(event, request, tries))
                )
        except K2Error as error:  # the context is full, the template refuses, the engine has stopped
            log.debug("nothing is prefilled ahead: %s", error)
        except Exception:
            log.exception("prefilling ahead failed")

    def _ended(self, event: EngineEvent, request: ChatRequest, tries: int) -> None:
        """What was cancelled goes on at the next idle moment, from where it was."""
        if not isinstance(event, DoneEvent) or event.reason != "cancelled" or tries == MOST_TRIES:
            return
        with self._changed:
            if not self._closed and len(self._waiting) < MAX_WAITING:
                self._waiting.appendleft((request, tries))
                self._changed.notify()

    def _job(self, request: ChatRequest, ids: list[int], sink: Callable[[EngineEvent], None]) -> Job:
        return Job(
            ids=ids,
            sampling=SamplingParams(temperature=0.0),
            max_tokens=0,
            stop=_Never(),
            sink=sink,
            request_id=f"{request.request_id} ahead",
            scope=request.scope,
            store=request.store,
            background=True,
        )


class _Never:
    paused = False

    def push(self, token: int) -> bool:
        return False
