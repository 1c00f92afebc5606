"""Which pages each sequence holds, and which it is promised. Layer 4.

Admission promises pages for a prompt and the output that comes first, `extend` those for more, since answers
are seldom as long as they may be; where none are left, the engine has a sequence wait and come back.
Pages are taken from the pool only as tokens arrive, so that until then they may keep cached prefixes. What is
promised is there, by one inequality:

    pages that are free or held by the prefix tree alone  ≥  Σ over running sequences (promised − held)

The left side is `total − held by sequences or pins`, and all of it can be had: a sequence holds the whole
path of each page that it shares with the tree, and a page that is pinned without its path leaves the tree
before it keeps what lies above it from being evicted. The inequality stays true because

* `extend`, and `admit` and `pin`, which may hold pages that nobody held, compare first; the source of a copy
  counts as held while it is copied, and where there is no room for it, nothing is copied;
* `grow`, and the copy when it takes its page, lower both sides by as many; `shrink` raises them again, and
  gives back pages that no other sequence holds;
* `publish` exchanges own pages for the tree's: as many come back as are taken, except for those that others
  hold too (pins); for these `publish` compares first, and ends before the one for which there is no room;
* `leave` and `unpin` only give back;
* a page that leaves for RAM belongs to the left side from then on: it is free as soon as it is copied.

A sequence writes a page only while no other sequence holds it, and only behind the rows that the tree claims.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from typing import Protocol

from k2hybrid.cache.prefix import Match, Partial, PrefixTree
from k2hybrid.engine.scheduler import pages_for
from k2hybrid.engine.sequence import Sequence
from k2hybrid.engine.spill import Spill
from k2hybrid.errors import CapacityError, EngineError

# Tokens of output that pages are promised for at a time.
OUTPUT_AHEAD = 2048


class PagePool(Protocol):
    """What the engine needs of the latent pages; no bytes."""

    @property
    def free_pages(self) -> int: ...
    def allocate(self, count: int, /) -> list[int]: ...
    def retain(self, pages: Seq[int], /) -> None: ...
    def release(self, pages: Seq[int], /) -> None: ...
    def refcount(self, page: int, /) -> int: ...
    def copy_rows(self, src: int, dst: int, rows: int, /) -> None: ...


class PageMemory:
    """Deals the pages of one pool to sequences and to the prefix tree, which share them.

    Args:
        pool: all of its pages must be free.
        page_tokens: tokens per page.
        spill: takes what the tree lets go of to RAM; None: it is lost.
    """

    def __init__(self, pool: PagePool, page_tokens: int, spill: Spill | None = None) -> None:
        self.page_tokens = page_tokens
        self.total_pages = pool.free_pages
        self.tree = PrefixTree(pool, page_tokens, spill.leave if spill else None)
        self.now: Callable[[], float] = time.monotonic  # of leases
        self._pool = pool
        self._spill = spill
        self._running: set[Sequence] = set()
        self._holders: Counter[int] = Counter()  # page → sequences and pins that hold it
        self._pins: Counter[int] = Counter()  # page → pins
        self._owed = 0  # Σ (promised − held)

    @property
    def total_tokens(self) -> int:
        """What all pages hold."""
        return self.total_pages * self.page_tokens

    @property
    def available_pages(self) -> int:
        """Pages that a new sequence could be promised now."""
        return self.total_pages - len(self._holders) - self._owed

    def snapshot(self) -> dict[str, int]:
        """How the pages are dealt, under stable names; may be called from any thread.

        Each is held by running sequences ("used"), or kept in the tree alone for later ones, or free.
        """
        used, free = len(self._holders), self._pool.free_pages
        return {
            "page_tokens": self.page_tokens,
            "pages": self.total_pages,
            "used": used,
            "kept": max(0, self.total_pages - used - free),  # the others may have changed in between
            "free": free,
        }

    def admit(self, sequence: Sequence) -> bool:
        """Give `sequence` its longest cached prefix and promise the rest; False if it must wait.

        At most all tokens but one are taken from the cache: the last one's logits are needed. A page that
        agrees only in its first rows is continued in place if they are all that is claimed of it and nobody
        holds it; else the rows are copied to a fresh page. For a background job no leased page is given up.
        """
        sequence.reserved_pages = self._reach(sequence)
        match = self._match(sequence)
        pages, tokens, partial = match.pages, match.tokens, match.partial
        if partial is not None and partial.whole and partial.page not in self._holders:
            pages, partial = [*pages, partial.page], None
        owed = sequence.reserved_pages - len(pages)
        room = self.available_pages
        if sequence.job.background:
            room -= self.tree.leased(self.now())
        if partial is not None and self._unheld([*pages, partial.page]) + owed > room:
            tokens, partial = tokens - partial.rows, None
        if self._unheld(pages) + owed > room:
            return False
        self._hold(pages)
        self._owed += owed
        if partial is not None:
            try:
                pages = [*pages, self._copy(partial)]
            except BaseException:
                self._owed -= owed
                self._drop(pages)
                raise
        self._running.add(sequence)
        sequence.pages = pages
        sequence.pages_version += 1
        sequence.computed = sequence.cached_tokens = tokens
        return True

    def extend(self, sequence: Sequence) -> bool:
        """Promise `sequence` pages for all its tokens and, if there are, for more; False if it must wait."""
        needed = pages_for(len(sequence.ids), self.page_tokens) - sequence.reserved_pages
        if needed <= 0:
            return True
        more = self._reach(sequence) - sequence.reserved_pages
        promised = min(more, self.available_pages)
        if promised < needed:
            return False
        sequence.reserved_pages += promised
        self._owed += promised
        return True

    def grow(self, sequence: Sequence, tokens: int, *, ready: bool = True) -> None:
        """Let `sequence` hold pages for its first `tokens` tokens; cannot fail within what it was promised.

        Without `ready` some may still be on their way to RAM: nothing is waited for, and who writes them
        first waits for what `leaving` says.
        """
        missing = pages_for(tokens, self.page_tokens) - len(sequence.pages)
        if missing <= 0:
            return
        if len(sequence.pages) + missing > sequence.reserved_pages:
            raise EngineError(
                f"request {sequence.job.request_id!r} needs {len(sequence.pages) + missing} pages "
                f"but was promised {sequence.reserved_pages}"
            )
        sequence.pages = [*sequence.pages, *self._take(missing, ready=ready)]
        sequence.pages_version += 1

    def make_room(self, pages: int) -> None:
        """Have idle pages leave for RAM until so many are free or will be, as far as RAM takes them."""
        if self._spill is not None:
            self._spill.settle()
            self.tree.evict(pages - self._pool.free_pages - len(self._leaving()), self.now(), only_kept=True)
            self._spill.begin()

    def leaving(self, pages: Seq[int]) -> list[Future[None]]:
        """What must be done before any of `pages` is written: copies to RAM."""
        return self._spill.copies_of(pages) if self._spill else []

    def drop_partial(self, sequence: Sequence) -> None:
        """Let a newly admitted `sequence` do without the rows it has of a partly filled page."""
        full, rows = divmod(sequence.computed, self.page_tokens)
        if rows:
            sequence.computed = full * self.page_tokens
            sequence.cached_tokens = min(sequence.cached_tokens, sequence.computed)
            self.shrink(sequence)

    def shrink(self, sequence: Sequence) -> None:
        """Give back pages behind the computed tokens of `sequence`; they are promised to it all the same."""
        count = pages_for(sequence.computed, self.page_tokens)
        if behind := sequence.pages[count:]:
            self._drop(behind)
            self._owed += len(behind)
            sequence.pages = sequence.pages[:count]
            sequence.pages_version += 1

    def publish(self, sequence: Sequence) -> None:
        """Enter all tokens computed so far into the tree, for later requests that begin with them."""
        tokens = self._publishable(sequence)
        own = sequence.pages[: pages_for(tokens, self.page_tokens)]
        shared = self.tree.insert(sequence.ids[:tokens], own, sequence.job.scope)
        if own != shared:
            changed = [(ours, theirs) for ours, theirs in zip(own, shared, strict=True) if ours != theirs]
            self._hold([theirs for _, theirs in changed])
            self._drop([ours for ours, _ in changed])
            sequence.pages = [*shared, *sequence.pages[len(shared) :]]
            sequence.pages_version += 1

    def leave(self, sequence: Sequence) -> None:
        """`sequence` gives back all it holds and all it was promised."""
        self._running.discard(sequence)
        self._owed -= sequence.reserved_pages - len(sequence.pages)
        self._drop(sequence.pages)
        sequence.pages = []
        sequence.pages_version += 1

    def lease(self, scope: str, ids: Seq[int], seconds: float) -> None:
        """Keep the longest known prefix of `ids` for so long, unless running sequences need its pages."""
        until = self.now() + seconds
        self.tree.lease(ids, until, scope)
        if self._spill is not None:
            self._spill.lease(scope, ids, until)

    def pin(self, pages: Seq[int]) -> None:
        """Hold pages for somebody who is no sequence and only reads the rows claimed now.

        Raises:
            CapacityError: pages that only the tree holds are promised to running sequences; none is pinned.
                Pages that a sequence holds can always be pinned.
            EngineError: a page is free.
        """
        free = [page for page in pages if self._pool.refcount(page) < 1]
        if free:
            raise EngineError(f"latent pages {free} are free and cannot be pinned")
        unheld = self._unheld(pages)
        if unheld > self.available_pages:
            raise CapacityError(
                f"{unheld} latent pages cannot be pinned: {self.available_pages} are not promised to running "
                "sequences; try again when one has ended"
            )
        self._hold(pages)
        self._pins.update(pages)

    def unpin(self, pages: Seq[int]) -> None:
        """Let go of pinned pages."""
        missing = Counter(pages) - self._pins
        if missing:
            raise EngineError(f"latent pages {sorted(missing)} are unpinned more often than pinned")
        self._pins.subtract(pages)
        self._pins = +self._pins
        self._drop(pages)

    def check(self) -> None:
        """Prove that sequences, pins, tree and pool agree on every page, and that no written page is shared.

        Raises:
            EngineError: they do not; the message lists pages and counts.
        """
        wrong = []
        expected = self._pins.copy()
        for sequence in self._running:
            expected.update(sequence.pages)
        for page in {*expected, *self._holders}:
            if self._holders[page] != expected[page]:
                wrong.append(f"page {page}: {self._holders[page]} holders, {expected[page]} expected")
        owed = sum(sequence.reserved_pages - len(sequence.pages) for sequence in self._running)
        if self._owed != owed:
            wrong.append(f"{self._owed} pages are owed, {owed} expected")
        leaving = self._spill.leaving if self._spill else Counter[int]()
        used = {*self._holders, *self.tree.pages(), *leaving}
        for page in used:
            references = self._holders[page] + (page in self.tree) + leaving[page]
            if self._pool.refcount(page) != references:
                wrong.append(f"page {page}: {self._pool.refcount(page)} references, {references} expected")
        if self._pool.free_pages + len(used) != self.total_pages:
            wrong.append(f"{self._pool.free_pages} free + {len(used)} used ≠ {self.total_pages} pages")
        if self.available_pages < 0:
            wrong.append(f"{-self.available_pages} pages more are promised than there are")
        for sequence in self._running:
            wrong += self._wrongly_written(sequence)
        if wrong:
            raise EngineError("latent pages do not add up: " + "; ".join(wrong[:20]))

    def _wrongly_written(self, sequence: Sequence) -> list[str]:
        """Pages that `sequence` is still to write and another one holds, or the tree claims too much of."""
        wrong = []
        first, rows = divmod(sequence.computed, self.page_tokens)
        if not sequence.fetching and not all(copy.done() for copy in self.leaving(sequence.pages[first:])):
            wrong.append(f"a page of {sequence.pages[first:]} is written while it is copied to RAM")
        for page in sequence.pages[first:]:
            holders = self._sequences_on(page)
            if holders != 1:
                wrong.append(f"page {page}: one sequence writes it and {holders} hold it")
            if self.tree.rows(page) > rows:
                wrong.append(f"page {page}: {self.tree.rows(page)} rows claimed, {rows} computed")
            rows = 0
        return wrong

    def _reach(self, sequence: Sequence) -> int:
        """Pages for the tokens of `sequence` and those that come next."""
        return min(sequence.most_pages, pages_for(len(sequence.ids) + OUTPUT_AHEAD, self.page_tokens))

    def _match(self, sequence: Sequence) -> Match:
        if not sequence.job.reuse and sequence.cached_before is None:  # else what it knows is its own
            return Match([], 0)
        return self.tree.match(sequence.ids[: len(sequence.ids) - 1], sequence.job.scope)

    def _publishable(self, sequence: Sequence) -> int:
        """Computed tokens, up to a page that others hold too, if the tree's cannot be held beside it."""
        room = self.available_pages
        if room < len(sequence.pages):
            known = self.tree.match(sequence.ids[: sequence.computed], sequence.job.scope).pages
            for i, (ours, theirs) in enumerate(zip(sequence.pages, known, strict=False)):
                if ours != theirs and self._holders[ours] > 1 and theirs not in self._holders:
                    if room == 0:
                        return i * self.page_tokens
                    room -= 1
        return sequence.computed

    def _copy(self, partial: Partial) -> int:
        """A fresh page, out of what is owed, with the rows of `partial`."""
        source = [partial.page]
        self._hold(source)  # so that it is not evicted to make room for its copy
        try:
            (page,) = self._take(1)
            try:
                self._pool.copy_rows(partial.page, page, partial.rows)
            except BaseException:
                self._owed += 1
                self._drop([page])
                raise
        finally:
            self._drop(source)
        return page

    def _take(self, count: int, *, ready: bool = True) -> list[int]:
        """Fresh pages, out of what is owed."""
        spill = self._spill
        if spill is not None:
            spill.settle()
        shortage = count - self._pool.free_pages - len(self._leaving())
        if shortage > 0:
            self.tree.evict(shortage, self.now())
        if spill is not None:
            spill.begin()
        while ready and spill is not None and self._pool.free_pages < count and spill.wait():
            pass
        pages = self._leaving()[: max(0, count - self._pool.free_pages)]
        fresh = self._pool.allocate(count - len(pages))
        self._holders.update(fresh)
        self._hold(pages)
        self._owed -= count
        return [*fresh, *pages]

    def _leaving(self) -> list[int]:
        """Pages that will be free once they are copied to RAM."""
        leaving = self._spill.leaving if self._spill else ()
        return [page for page in leaving if page not in self._holders]

    def _sequences_on(self, page: int) -> int:
        return self._holders[page] - self._pins[page]

    def _unheld(self, pages: Seq[int]) -> int:
        """How many of `pages` neither a sequence nor a pin holds."""
        return sum(1 for page in set(pages) if page not in self._holders)

    def _hold(self, pages: Seq[int]) -> None:
        self._pool.retain(pages)
        self._holders.update(pages)

    def _drop(self, pages: Seq[int]) -> None:
        self._pool.release(pages)
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
