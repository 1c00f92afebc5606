"""Which pages each sequence holds, and the promise that a running one never runs out. Layer 4.

Admission reserves pages for a request's prompt and all its possible output; they are taken from the pool only
as tokens arrive, so that until then they may keep cached prefixes. The promise is one inequality:

    pages that are free or held by the prefix tree alone  ≥  Σ over running sequences (reserved − held)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from typing import Protocol

from k2hybrid.cache.prefix import PrefixTree
from k2hybrid.engine.scheduler import pages_for
from k2hybrid.engine.sequence import Sequence
from k2hybrid.errors import EngineError


class PagePool(Protocol):
    """What the engine needs of the latent pages; no bytes."""

    @property
    def free_pages(self) -> int: ...
    def allocate(self, count: int, /) -> list[int]: ...
    def retain(self, pages: Seq[int], /) -> None: ...
    def release(self, pages: Seq[int], /) -> None: ...
    def refcount(self, page: int, /) -> int: ...


class PageMemory:
    """Deals the pages of one pool to sequences and to the prefix tree, which share them.

    Args:
        pool: all of its pages must be free.
        page_tokens: tokens per page.
    """

    def __init__(self, pool: PagePool, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self.total_pages = pool.free_pages
        self.tree = PrefixTree(pool, page_tokens)
        self._pool = pool
        self._holders: Counter[int] = Counter()  # page → sequences that hold it
        self._owed = 0  # Σ (reserved − held)

    @property
    def total_tokens(self) -> int:
        """What all pages hold."""
        return self.total_pages * self.page_tokens

    @property
    def available_pages(self) -> int:
        """Pages that a new sequence could be promised now."""
        return self.total_pages - len(self._holders) - self._owed

    def admit(self, sequence: Sequence) -> bool:
        """Give `sequence` its longest cached prefix and reserve the rest; False if it must wait.

        At most all tokens but one are taken from the cache: the last one's logits are needed.
        """
        pages, tokens = self.tree.match(sequence.ids[: len(sequence.ids) - 1])
        newly_held = sum(1 for page in pages if page not in self._holders)
        if newly_held + sequence.reserved_pages - len(pages) > self.available_pages:
            return False
        self._hold(pages)
        self._owed += sequence.reserved_pages - len(pages)
        sequence.pages = pages
        sequence.pages_version += 1
        sequence.computed = sequence.cached_tokens = tokens
        return True

    def grow(self, sequence: Sequence, tokens: int) -> None:
        """Let `sequence` hold pages for its first `tokens` tokens; cannot fail within its reservation."""
        missing = pages_for(tokens, self.page_tokens) - len(sequence.pages)
        if missing <= 0:
            return
        if len(sequence.pages) + missing > sequence.reserved_pages:
            raise EngineError(
                f"request {sequence.job.request_id!r} needs {len(sequence.pages) + missing} pages "
                f"but reserved {sequence.reserved_pages}"
            )
        shortage = missing - self._pool.free_pages
        if shortage > 0:
            self.tree.evict(shortage)
        pages = self._pool.allocate(missing)
        self._holders.update(pages)
        self._owed -= missing
        sequence.pages = [*sequence.pages, *pages]
        sequence.pages_version += 1

    def publish(self, sequence: Sequence) -> None:
        """Enter the full pages computed so far into the tree, for later requests that begin with them."""
        full = sequence.computed // self.page_tokens
        own = sequence.pages[:full]
        shared = self.tree.insert(sequence.ids[: full * self.page_tokens], own)
        if shared != own:
            self._hold(shared)
            self._drop(own)
            sequence.pages = [*shared, *sequence.pages[full:]]
            sequence.pages_version += 1

    def leave(self, sequence: Sequence) -> None:
        """`sequence` gives back all it holds and all it reserved."""
        self._owed -= sequence.reserved_pages - len(sequence.pages)
        self._drop(sequence.pages)
        sequence.pages = []
        sequence.pages_version += 1

    def check(self) -> None:
        """Prove that holders, tree and pool agree on every page.

        Raises:
            EngineError: they do not; the message lists pages and counts.
        """
        wrong = []
        for page in {*self._holders, *self.tree.pages()}:
            expected = self._holders[page] + (page in self.tree)
            if self._pool.refcount(page) != expected:
                wrong.append(f"page {page}: {self._pool.refcount(page)} references, {expected} expected")
        used = len(self._holders.keys() | set(self.tree.pages()))
        if self._pool.free_pages + used != self.total_pages:
            wrong.append(f"{self._pool.free_pages} free + {used} used ≠ {self.total_pages} pages")
        if self.available_pages < 0:
            wrong.append(f"{-self.available_pages} pages more are promised than there are")
        if wrong:
            raise EngineError("latent pages do not add up: " + "; ".join(wrong[:20]))

    def _hold(self, pages: Seq[int]) -> None:
        self._pool.retain(pages)
        self._holders.update(pages)

    def _drop(self, pages: Seq[int]) -> None:
        self._pool.release(pages)
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
