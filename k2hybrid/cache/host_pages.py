"""Latent pages in RAM beside the pool: a bounded number, found under the keys that the journal uses.

What the prefix tree lets go of lies on here, so that it need not be computed again. Pages are found by scope
and tokens alone, whichever of the pages before them lie here too. When there is no room, the page used least
recently goes; leased ones last, those first whose lease ends first, and never for a page that is leased for
a shorter time. A page that somebody reads or fills is held, and stays. Pure Python: it never looks at the
bytes. For one thread. Layer 2.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from k2hybrid.cache.page_keys import Found, common_tokens
from k2hybrid.errors import EngineError

Buffer = TypeVar("Buffer")

_UNLEASED = -math.inf


class HostPage(Generic[Buffer]):
    """A page that lies here. `filled` is set while its bytes may still be on their way to `buffer`."""

    __slots__ = ("buffer", "filled", "here", "holds", "ids", "key", "parent", "serial", "until", "used")

    def __init__(self, key: bytes, parent: bytes, ids: tuple[int, ...], buffer: Buffer) -> None:
        self.key = key
        self.parent = parent
        self.ids = ids
        self.buffer = buffer
        self.filled: Future[None] | None = None
        self.here = True  # it can be found
        self.holds = 0
        self.until = _UNLEASED
        self.used = 0
        self.serial = 0  # of its valid entry among the candidates; 0: it has none


class HostPages(Generic[Buffer]):
    """As many pages as there are `buffers`, each of which holds the rows of one page in all layers."""

    def __init__(self, buffers: Sequence[Buffer]) -> None:
        self.capacity = len(buffers)
        self.lost = 0  # pages that made room for others
        self.broken_leases = 0  # of these, before their lease was over
        self._free: list[Buffer] = [buffers[i] for i in reversed(range(self.capacity))]
        self._pages: dict[bytes, HostPage[Buffer]] = {}
        self._apart: list[HostPage[Buffer]] = []  # held, but forgotten
        self._children: dict[bytes, list[HostPage[Buffer]]] = {}  # parent → pages, sorted by tokens
        # Who may go: (use or end of lease, serial, page). An entry counts while its serial is the page's.
        self._unleased: list[tuple[float, int, HostPage[Buffer]]] = []
        self._leased: list[tuple[float, int, HostPage[Buffer]]] = []
        self._clock = 0
        self._serial = 0

    def __len__(self) -> int:
        """Pages that can be found."""
        return len(self._pages)

    def get(self, key: bytes) -> HostPage[Buffer] | None:
        """The page with this key."""
        return self._pages.get(key)

    def closest(self, parent: bytes, ids: Sequence[int]) -> Found | None:
        """The page after `parent` with most tokens in common with `ids`, at least one."""
        siblings = self._children.get(parent)
        if siblings is None:
            return None
        wanted = tuple(ids)
        place = bisect_left(siblings, wanted, key=_ids)
        best, rows = None, 0
        for near in siblings[max(place - 1, 0) : place + 1]:
            common = common_tokens(near.ids, wanted)
            if common > rows:
                best, rows = near, common
        return None if best is None else Found(best.key, parent, best.ids, rows)

    def known(self, parent: bytes, ids: tuple[int, ...], until: float) -> bool:
        """Whether `ids` lie here, perhaps in a longer page: then it is used now, and leased `until` then."""
        siblings = self._children.get(parent, ())
        place = bisect_left(siblings, ids, key=_ids)
        if place == len(siblings) or siblings[place].ids[: len(ids)] != ids:
            return False
        page = siblings[place]
        page.until = max(page.until, until)
        self._use(page)
        return True

    def add(
        self, key: bytes, parent: bytes, ids: tuple[int, ...], until: float, now: float
    ) -> HostPage[Buffer] | None:
        """Enter a page that is not known, held once, for its buffer is to be filled; None: no room."""
        siblings = self._children.get(parent, ())
        place = bisect_left(siblings, ids, key=_ids)
        # No page begins as another one and ends there, so only the one before can be such a beginning.
        shorter = siblings[place - 1] if place else None
        if shorter is not None and ids[: len(shorter.ids)] == shorter.ids and not shorter.holds:
            until = max(until, shorter.until)
            self.drop(shorter)
        if not self._free and not self._make_room(until, now):
            return None
        page = HostPage(key, parent, ids, self._free.pop())
        page.until = until
        page.holds = 1
        self._pages[key] = page
        siblings = self._children.setdefault(parent, [])
        siblings.insert(bisect_left(siblings, ids, key=_ids), page)
        self._use(page)
        return page

    def lease(self, pages: Sequence[HostPage[Buffer]], until: float) -> None:
        """Ask to keep pages of a history, first to last, until then; of several leases the longest counts."""
        for page in reversed(pages):  # the last ones are to go first
            page.until = max(page.until, until)
            self._use(page)

    def hold(self, page: HostPage[Buffer]) -> None:
        """Keep `page` where it is."""
        page.holds += 1

    def release(self, page: HostPage[Buffer]) -> None:
        """Hold `page` no longer."""
        if page.holds < 1:
            raise EngineError("a page in RAM is released more often than it was held")
        page.holds -= 1
        if page.holds:
            return
        if not page.here:
            self._apart.remove(page)
            self._free.append(page.buffer)
        elif not page.serial:
            self._enter(page)

    def spare(self, pages: Sequence[HostPage[Buffer]]) -> None:
        """Pages of a history, first to last, lie in the pool again: unless leased, they go before others."""
        for page in pages:
            if page.here:
                self._clock += 1
                page.used = -self._clock
                self._enter(page)

    def drop(self, page: HostPage[Buffer]) -> None:
        """Find `page` no more. Its buffer is free once nobody holds it."""
        if not page.here:
            return
        page.here = False
        del self._pages[page.key]
        siblings = self._children[page.parent]
        del siblings[bisect_left(siblings, page.ids, key=_ids)]
        if not siblings:
            del self._children[page.parent]
        if page.holds:
            self._apart.append(page)
        else:
            self._free.append(page.buffer)

    def check(self, holds: Counter[HostPage[Buffer]]) -> list[str]:
        """What is wrong with the counts, given who holds which page; empty if they add up."""
        wrong = []
        pages = [*self._pages.values(), *self._apart]
        if len(self._free) + len(pages) != self.capacity:
            wrong.append(f"{len(self._free)} free + {len(pages)} used ≠ {self.capacity} pages in RAM")
        wrong += [
            f"a page in RAM: {page.holds} holds, {holds[page]} expected"
            for page in {*pages, *holds}
            if page.holds != holds[page]
        ]
        if sum(len(siblings) for siblings in self._children.values()) != len(self._pages):
            wrong.append("pages in RAM that cannot be found by their tokens")
        return wrong

    def _make_room(self, until: float, now: float) -> bool:
        """Let a page go for one that is leased until then."""
        while True:
            expired = bool(self._leased) and self._leased[0][0] <= now
            heap = self._leased if expired or not self._unleased else self._unleased
            if not heap:
                return False
            end, serial, victim = heap[0]
            if victim.serial == serial and heap is self._leased and not expired and end > until:
                return False
            heapq.heappop(heap)
            if victim.serial != serial or not victim.here:
                continue
            if victim.holds:
                victim.serial = 0  # it comes back when nobody holds it
            elif expired:
                victim.until = _UNLEASED
                self._enter(victim)
            else:
                break
        self.lost += 1
        self.broken_leases += victim.until > now
        self.drop(victim)
        return True

    def _use(self, page: HostPage[Buffer]) -> None:
        self._clock += 1
        page.used = self._clock
        self._enter(page)

    def _enter(self, page: HostPage[Buffer]) -> None:
        """Have a valid entry for `page` among the candidates."""
        self._serial += 1
        page.serial = self._serial
        heap, key = (self._unleased, page.used) if page.until == _UNLEASED else (self._leased, page.until)
        heapq.heappush(heap, (key, page.serial, page))
        if len(heap) > 2 * len(self._pages) + 16:
            heap[:] = [entry for entry in heap if entry[2].here and entry[2].serial == entry[1]]
            heapq.heapify(heap)


def _ids(page: HostPage[Any]) -> tuple[int, ...]:
    return page.ids
