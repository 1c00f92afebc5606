"""Idle prefill: what is cancelled goes on later, what cannot be done is let go."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from k2hybrid.runtime import ahead
from k2hybrid.runtime.ahead import Ahead
from k2hybrid.types import ChatRequest, DoneEvent, Job, Message, ReasonCode, Usage

REQUEST = ChatRequest((Message("user", "hi"), Message("assistant", "hello")))


@contextmanager
def running(jobs: queue.Queue[Job]) -> Iterator[Ahead]:
    """One whose jobs come out of `jobs`; a prompt is its texts' bytes."""
    made = Ahead(
        lambda request: [*"".join(str(m.content) for m in request.messages).encode()], jobs.put, lambda: True
    )
    try:
        yield made
    finally:
        made.close()


def end(job: Job, reason: ReasonCode) -> None:
    job.sink(DoneEvent(reason, Usage(prompt_tokens=len(job.ids)), None))


def test_what_was_cancelled_is_tried_again_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "MOST_TRIES", 3)
    jobs: queue.Queue[Job] = queue.Queue()
    with running(jobs) as made:
        made.prefill(REQUEST)
        first = jobs.get(timeout=10)
        assert bytes(first.ids) == b"hihello"
        for _ in range(2):
            end(first, "cancelled")
            again = jobs.get(timeout=10)
            assert again.ids == first.ids
            first = again
        end(first, "cancelled")  # the third time
        time.sleep(0.1)
        assert jobs.empty()
        made.prefill(REQUEST)
        end(jobs.get(timeout=10), "length")
        made.prefill(REQUEST)
        end(jobs.get(timeout=10), "error")
        time.sleep(0.1)
        assert jobs.empty()
