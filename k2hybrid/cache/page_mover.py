"""Copies of whole pages between the pool and memory of the CPU, behind the scenes. Layer 2.

A buffer of the CPU has a page's rows in all layers one after the other, uint8 [layers, 64, row_bytes]. Each
way has a thread of its own, for on a card the two ways share nothing. `MemoryMover` is for pages that lie in
memory of the CPU themselves, `cuda_mover` for those on a card.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np
import torch

from k2hybrid.cache.pages import LatentPages
from k2hybrid.errors import EngineError

Buffers = list[memoryview]
Finish = Callable[[], None]


class PageMover(Protocol):
    """Moves pages of one pool, several at a time: a thread that wakes for each costs as much as its bytes.

    A page and a buffer stay as they are until their copy's future is done.

    What the pool's owner has queued on a device when it takes a `mark` comes before each copy that is made
    `after` it. Methods but `mark` may be called from any thread.
    """

    def room(self, buffers: int) -> Any:
        """Memory for so many buffers, uint8 [buffers, layers, 64, row_bytes].

        Raises:
            RuntimeError: so much cannot be had.
        """

    def mark(self) -> Any:
        """This moment, for the thread that computes."""

    def out(self, pages: Sequence[int], buffers: Sequence[Any], after: Any, /) -> Future[None]:
        """Copy each page to its buffer."""

    def into(self, pages: Sequence[int], buffers: Sequence[Any], after: Any, /) -> Future[None]:
        """Copy each buffer to its page."""

    def buffers(self, page: int, tokens: int, after: Any, /) -> Buffers:
        """The first `tokens` rows of `page` in each layer, to be read before this thread asks again."""

    def fill(self, page: int, tokens: int, read: Callable[[Buffers], bool], after: Any, /) -> bool:
        """Have `read` write the first `tokens` rows of `page`, one buffer a layer; what it returned."""

    def close(self) -> None:
        """Wait for the copies under way; take no more, and let go of `room`."""


class Lane:
    """A thread that starts jobs in order, some before others are finished, and ends them in order.

    Args:
        under_way: jobs that may be started and not finished.
    """

    def __init__(self, name: str, under_way: int = 1) -> None:
        self._under_way = under_way
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Finish], Future[None]] | None] = queue.SimpleQueue()
        self._guard = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, start: Callable[[], Finish]) -> Future[None]:
        """Call `start`, and later what it returned, which waits until the job is done.

        Raises:
            EngineError: the lane is closed.
        """
        future: Future[None] = Future()
        with self._guard:
            if self._closed:
                raise EngineError("pages are no longer moved")
            self._jobs.put((start, future))
        return future

    def close(self) -> None:
        """Finish what was submitted, and end the thread."""
        with self._guard:
            self._closed = True
            self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        started: deque[tuple[Finish, Future[None]]] = deque()
        while True:
            try:
                job = self._jobs.get(block=not started)
            except queue.Empty:
                self._finish(*started.popleft())
                continue
            if job is None:
                break
            start, future = job
            try:
                started.append((start(), future))
            except BaseException as error:
                future.set_exception(error)
            if len(started) >= self._under_way:
                self._finish(*started.popleft())
        while started:
            self._finish(*started.popleft())

    @staticmethod
    def _finish(finish: Finish, future: Future[None]) -> None:
        try:
            finish()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)


class MemoryMover:
    """For pages that lie in memory of the CPU."""

    def __init__(self, pages: LatentPages) -> None:
        self._pages = pages
        self._out, self._into = Lane("k2hybrid-pages-out"), Lane("k2hybrid-pages-in")

    def room(self, buffers: int) -> torch.Tensor:
        """See `PageMover`."""
        return torch.empty((buffers, *self._pages.page(0).shape), dtype=torch.uint8)

    def mark(self) -> None:
        """What was computed is there."""

    def out(self, pages: Sequence[int], buffers: Sequence[torch.Tensor], _after: None = None) -> Future[None]:
        """See `PageMover`."""
        return self._out.submit(lambda: _copied(buffers, [self._pages.page(page) for page in pages]))

    def into(
        self, pages: Sequence[int], buffers: Sequence[torch.Tensor], _after: None = None
    ) -> Future[None]:
        """See `PageMover`."""
        return self._into.submit(lambda: _copied([self._pages.page(page) for page in pages], buffers))

    def buffers(self, page: int, tokens: int, _after: None = None) -> Buffers:
        """The rows themselves."""
        return self._pages.buffers(page, tokens)

    def fill(self, page: int, tokens: int, read: Callable[[Buffers], bool], _after: None = None) -> bool:
        """In place."""
        return read(self._pages.buffers(page, tokens))

    def close(self) -> None:
        """See `PageMover`."""
        self._out.close()
        self._into.close()


def _copied(to: Sequence[torch.Tensor], source: Sequence[torch.Tensor]) -> Finish:
    for page, copied in zip(to, source, strict=True):
        # Not torch's copy: that wakes its own threads, where the model's are at work.
        np.copyto(page.numpy(), copied.numpy())
    return lambda: None
