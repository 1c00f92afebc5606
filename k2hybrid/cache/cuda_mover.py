"""Copies of whole pages between a CUDA device and pinned memory: see `page_mover`. Layer 2.

Each way is a stream of its own, and a thread that queues copies on it and has several under way. In the pool
a page's layers lie apart, and a copy for each of 61 layers would cost more than their bytes: over the bus a
page goes in one piece, by way of a page on the device beside the pool.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from k2hybrid.cache.page_mover import Buffers, Finish, Lane
from k2hybrid.cache.pages import LatentPages

UNDER_WAY = 3  # jobs that one way has queued, so that the bus never waits for the next


class CudaMover:
    """For pages that lie on a CUDA device; takes two pages of its memory more."""

    def __init__(self, pages: LatentPages) -> None:
        self._pages = pages
        self._out, self._into = _Way(pages, "k2hybrid-pages-out"), _Way(pages, "k2hybrid-pages-in")
        self._own = threading.local()
        self._pinned: list[torch.Tensor] = []

    def room(self, buffers: int) -> torch.Tensor:
        """See `PageMover`. Registered with the driver: what torch pins, it rounds up to a power of two."""
        room = torch.empty((buffers, *self._pages.page(0).shape), dtype=torch.uint8)
        code = _runtime().cudaHostRegister(room.data_ptr(), room.numel(), 0)
        if int(code) != 0:
            raise RuntimeError(f"cudaHostRegister failed with {int(code)}")
        self._pinned.append(room)
        return room

    def mark(self) -> torch.cuda.Event:
        """An event on the calling thread's stream."""
        event = _event()
        event.record(torch.cuda.current_stream(self._pages.device))
        return event

    def out(
        self, pages: Sequence[int], buffers: Sequence[torch.Tensor], after: torch.cuda.Event
    ) -> Future[None]:
        """See `PageMover`."""
        way = self._out

        def copy() -> None:
            for page, buffer in zip(pages, buffers, strict=True):
                way.gathered.copy_(self._pages.page(page))
                buffer.copy_(way.gathered, non_blocking=True)

        return way.submit(after, copy)

    def into(
        self, pages: Sequence[int], buffers: Sequence[torch.Tensor], after: torch.cuda.Event
    ) -> Future[None]:
        """See `PageMover`."""
        way = self._into

        def copy() -> None:
            for page, buffer in zip(pages, buffers, strict=True):
                way.gathered.copy_(buffer, non_blocking=True)
                self._pages.page(page).copy_(way.gathered)

        return way.submit(after, copy)

    def buffers(self, page: int, tokens: int, after: torch.cuda.Event) -> Buffers:
        """A copy in a pinned page of the calling thread's own."""
        landing = self._landing()
        self.out([page], [landing], after).result()
        return _views(landing, tokens)

    def fill(self, page: int, tokens: int, read: Callable[[Buffers], bool], after: torch.cuda.Event) -> bool:
        """By way of a pinned page of the calling thread's own."""
        landing = self._landing()
        if not read(_views(landing, tokens)):
            return False
        self.into([page], [landing], after).result()
        return True

    def close(self) -> None:
        """See `PageMover`."""
        self._out.lane.close()
        self._into.lane.close()
        for room in self._pinned:
            _runtime().cudaHostUnregister(room.data_ptr())
        self._pinned.clear()

    def _landing(self) -> torch.Tensor:
        if not hasattr(self._own, "page"):
            self._own.page = self.room(1)[0]
        page: torch.Tensor = self._own.page
        return page


class _Way:
    """A stream, its thread, and the page on the device where rows of all layers lie together."""

    def __init__(self, pages: LatentPages, name: str) -> None:
        self.gathered = torch.empty(pages.page(0).shape, dtype=torch.uint8, device=pages.device)
        self.stream = torch.cuda.Stream(pages.device)  # type: ignore[no-untyped-call]
        self.lane = Lane(name, UNDER_WAY)

    def submit(self, after: torch.cuda.Event, copy: Callable[[], None]) -> Future[None]:
        def start() -> Finish:
            with torch.cuda.stream(self.stream):
                self.stream.wait_event(after)
                copy()
                done = _event()
                done.record(self.stream)
            return done.synchronize

        return self.lane.submit(start)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _views(page: torch.Tensor, tokens: int) -> Buffers:
    return [memoryview(layer).cast("B") for layer in page[:, :tokens].numpy()]
