"""Latent pages on their way from the pool to RAM. Layer 4.

A page that the prefix tree lets go of is copied to host pages before it is free. Until then it is *leaving*:
one reference more on the page, none of a sequence's. Whoever needs it sooner waits for its copy. So that this
is rare, idle pages leave before the pool is full (`PageMemory.make_room`).
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from k2hybrid.cache.host_pages import HostPage, HostPages
from k2hybrid.cache.page_keys import next_key, pack_ids, root_key
from k2hybrid.cache.page_mover import PageMover
from k2hybrid.cache.prefix import Evicted, PageCounts
from k2hybrid.engine.metrics import PageTraffic

log = logging.getLogger(__name__)

BATCH = 8  # pages that are copied together: fewer wake too many threads, more are waited for too long


@dataclass(slots=True)
class _Copy:
    pages: list[int]
    to: list[HostPage[Any]]
    done: Future[None] | None = None  # None: more pages may come along


class Spill:
    """Copies pages out. For the engine's thread.

    Args:
        host: where they go.
        pool: where they come from; a page is held while it is copied.
        page_tokens: tokens of a page.
        page_bytes: of a page.
        traffic: where copies are counted.
    """

    def __init__(
        self,
        host: HostPages[Any],
        mover: PageMover,
        pool: PageCounts,
        *,
        page_tokens: int,
        page_bytes: int = 0,
        traffic: PageTraffic | None = None,
    ) -> None:
        self.host = host
        self.leaving: Counter[int] = Counter()  # page → copies of it under way
        self._mover = mover
        self._pool = pool
        self._page_tokens = page_tokens
        self._page_bytes = page_bytes
        self._traffic = traffic or PageTraffic()
        self._copies: deque[_Copy] = deque()  # a mover ends them in order

    def leave(self, gone: Evicted, now: float) -> bool:
        """Have a page copied that leaves the tree, unless RAM has its tokens; whether RAM has them now."""
        try:
            return self.host.known(gone.parent, gone.ids, gone.until) or self._copy(gone, now)
        except Exception:
            log.exception("a latent page was not moved to RAM")
            self._traffic.copy_errors += 1
            return False
        finally:
            self._traffic.ram_pages = len(self.host)

    def copies_of(self, pages: Seq[int]) -> list[Future[None]]:
        """What must be done before any of `pages` is written."""
        self.begin()
        if self.leaving.keys().isdisjoint(pages):
            return []
        wanted = set(pages)
        return [copy.done for copy in self._copies if copy.done and not wanted.isdisjoint(copy.pages)]

    def begin(self) -> None:
        """Begin to copy what has been told to leave."""
        if not self._copies or (copy := self._copies[-1]).done is not None:
            return
        try:
            copy.done = self._mover.out(copy.pages, [page.buffer for page in copy.to], self._mover.mark())
        except Exception as error:
            copy.done = Future()
            copy.done.set_exception(error)
        for page in copy.to:
            page.filled = copy.done

    def settle(self) -> None:
        """Begin what can begin, and let go of pages that are copied."""
        self.begin()
        while self._copies and (done := self._copies[0].done) is not None and done.done():
            self._end(self._copies.popleft())

    def wait(self) -> bool:
        """Wait for the copy begun first and let go of its pages; False if none is under way."""
        self.begin()
        if not self._copies:
            return False
        self._end(self._copies.popleft())
        return True

    def lease(self, scope: str, ids: Seq[int], until: float) -> None:
        """Ask to keep what RAM has of `ids` until then, whichever of their pages it has."""
        if not len(self.host):
            return
        size = self._page_tokens
        parent = root_key(scope)
        pages = []
        for start in range(0, len(ids), size):
            chunk = ids[start : start + size]
            found = self.host.closest(parent, chunk)
            if found is not None and (page := self.host.get(found.key)) is not None:
                pages.append(page)
            parent = next_key(parent, pack_ids(chunk))
        self.host.lease(pages, until)

    def check(self, reading: Counter[HostPage[Any]]) -> list[str]:
        """What is wrong with the counts, given which pages in RAM are being read."""
        filling = Counter(page for copy in self._copies for page in copy.to)
        wrong = self.host.check(filling + reading)
        if self.leaving != Counter(page for copy in self._copies for page in copy.pages):
            wrong.append("pages that leave are not those that are copied")
        return wrong

    def _copy(self, gone: Evicted, now: float) -> bool:
        to = self._room(gone, now)
        if to is None:
            return False
        if not self._copies or self._copies[-1].done is not None:
            self._copies.append(_Copy([], []))
        copy = self._copies[-1]
        self._pool.retain([gone.page])
        self.leaving[gone.page] += 1
        copy.pages.append(gone.page)
        copy.to.append(to)
        if len(copy.pages) == BATCH:
            self.begin()
        return True

    def _room(self, gone: Evicted, now: float) -> HostPage[Any] | None:
        while True:
            to = self.host.add(gone.key, gone.parent, gone.ids, gone.until, now)
            # Where all that might make room is still being filled: it is older, so it goes.
            if to is not None or not self.wait():
                return to

    def _end(self, copy: _Copy) -> None:
        error = copy.done.exception() if copy.done is not None else None  # waits
        self._pool.release(copy.pages)
        for left in copy.pages:
            self.leaving[left] -= 1
            if not self.leaving[left]:
                del self.leaving[left]
        for page in copy.to:
            page.filled = None
            self.host.release(page)
            if error is not None:
                self.host.drop(page)
        if error is None:
            self._traffic.pages_out += len(copy.pages)
            self._traffic.bytes_out += len(copy.pages) * self._page_bytes
        else:
            log.error("%d latent pages were not moved to RAM: %s", len(copy.pages), error)
            self._traffic.copy_errors += 1
        self._traffic.ram_pages = len(self.host)
