"""Which token prefixes have their latents in pages already: a tree of pages per scope, exact to the token.

A node is a page and the tokens whose latents it claims to hold, a *chunk*: a full page, or fewer in a leaf.
Its path from the root of its scope is the exact prefix that they were computed for. Rows behind the chunk are
nobody's: who holds the page alone may write them, and extends the node when he inserts again. The tree holds
one reference on each of its pages and evicts, least recently used first, pages that nobody else holds; leased
ones last. Who keeps their latents elsewhere is told before. Pure Python: it knows page numbers and reference
counts, never the bytes. Layer 2.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from k2hybrid.cache.page_keys import common_tokens, next_key, pack_ids, root_key
from k2hybrid.errors import EngineError

Chunk = tuple[int, ...]

_UNLEASED = -math.inf


class PageCounts(Protocol):
    """What the tree needs of the page pool (`LatentPages` has it)."""

    def retain(self, pages: Sequence[int]) -> None:
        """One more reference on each page."""

    def release(self, pages: Sequence[int]) -> None:
        """One reference less; a page without references is free."""

    def refcount(self, page: int) -> int:
        """References on `page`."""


@dataclass(frozen=True, slots=True)
class Partial:
    """A page of which the first `rows` tokens agree, at least one and not all that a page holds."""

    page: int
    rows: int
    whole: bool  # the page's node claims no further rows


@dataclass(frozen=True, slots=True)
class Match:
    """The longest known prefix: full pages, then perhaps a part of one more."""

    pages: list[int]  # full pages
    tokens: int  # of the full pages and the partial one
    partial: Partial | None = None


@dataclass(frozen=True, slots=True)
class Evicted:
    """A page that is about to leave the tree for lack of room, by the key that it has elsewhere."""

    page: int
    key: bytes
    parent: bytes
    ids: Chunk  # of its claimed rows
    until: float  # end of its lease; −inf without one


Leaving = Callable[[Evicted, float], bool]


class _Node:
    """`children` are sorted by chunk: those with most in common with a chunk lie beside its place."""

    __slots__ = (
        "children", "chunk", "depth", "key", "page", "parent", "queued", "root", "touched", "until", "used",
    )  # fmt: skip

    def __init__(self, chunk: Chunk, page: int, parent: _Node | None, used: int) -> None:
        self.chunk = chunk
        self.page = page
        self.parent = parent
        self.root: _Node = parent.root if parent else self
        self.depth: int = parent.depth + 1 if parent else 0  # pages from the root to here
        self.used = self.touched = used  # `used` is later where it was held when it should have gone
        self.until = _UNLEASED  # never later than the parent's
        self.queued = False  # has an entry among the candidates for eviction
        self.key = b""  # see page_keys; empty until it is asked for
        self.children: list[_Node] = []

    def touch(self, clock: int) -> None:
        """It was asked for, or what lies below it."""
        self.touched = clock
        self.used = max(self.used, clock)

    def closest(self, chunk: Chunk) -> tuple[_Node | None, int]:
        """The child with most tokens in common with `chunk`, one that ends there if possible; how many."""
        if len(self.children) == 1 and self.children[0].chunk == chunk:  # nearly always, within a history
            return self.children[0], len(chunk)
        best, rows = None, 0
        place = bisect_left(self.children, chunk, key=_chunk)
        for near in self.children[place : place + 1] + self.children[max(place - 1, 0) : place]:
            common = common_tokens(near.chunk, chunk)
            if common > rows:
                best, rows = near, common
            if rows == len(chunk):
                break
        if best is not None and rows < len(best.chunk):
            # Of all that begin with these rows, the one that ends there sorts first.
            first = self.children[bisect_left(self.children, chunk[:rows], key=_chunk)]
            if len(first.chunk) == rows:
                best = first
        return best, rows

    def beginnings(self, chunk: Chunk) -> list[_Node]:
        """Children whose chunk is a proper prefix of `chunk`."""
        found = []
        length = len(chunk) - 1
        while length > 0:
            place = bisect_right(self.children, chunk[:length], key=_chunk)
            if place == 0:
                break
            near = self.children[place - 1]
            # All prefixes of `chunk` that sort before `near` are prefixes of what they have in common.
            length = common_tokens(near.chunk, chunk)
            if length == len(near.chunk):
                found.append(near)
                length -= 1
        return found

    def add(self, child: _Node) -> None:
        insort(self.children, child, key=_chunk)

    def remove(self, child: _Node) -> None:
        del self.children[bisect_left(self.children, child.chunk, key=_chunk)]


class _Root(_Node):
    __slots__ = ("scope",)

    def __init__(self, scope: str) -> None:
        super().__init__((), -1, None, 0)
        self.scope = scope
        self.key = root_key(scope)


class PrefixTree:
    """Longest-prefix lookup over token ids; nothing is shared between scopes.

    Args:
        counts: the pool whose pages the tree shares.
        page_tokens: tokens per page.
        leaving: told of each page before it is evicted, and of the time; whether its latents are kept.
    """

    def __init__(self, counts: PageCounts, page_tokens: int, leaving: Leaving | None = None) -> None:
        self.broken_leases = 0  # pages lost before their lease was over
        self._leaving = leaving
        self._counts = counts
        self._page_tokens = page_tokens
        self._roots: dict[str, _Root] = {}
        self._clock = 0
        self._pages: dict[int, _Node] = {}
        # Candidates for eviction: (last use or end of lease, serial, node). Entries go stale when a node is
        # used or leased again, gets children or goes; they are mended when popped, so that a match costs
        # nothing here. A key that went stale is too early, never too late.
        self._leaves: list[tuple[float, int, _Node]] = []
        self._leased: list[tuple[float, int, _Node]] = []
        self._serial = 0

    def __len__(self) -> int:
        """Pages in the tree."""
        return len(self._pages)

    def __contains__(self, page: int) -> bool:
        return page in self._pages

    def pages(self) -> Iterator[int]:
        """All pages in the tree, in no order."""
        return iter(self._pages)

    def rows(self, page: int) -> int:
        """How many rows of `page` the tree claims, the first ones; 0 if it does not hold the page."""
        node = self._pages.get(page)
        return 0 if node is None else len(node.chunk)

    def match(self, ids: Sequence[int], scope: str = "") -> Match:
        """The longest known prefix of `ids`. Takes no reference; retain the pages."""
        path, tokens = self._walk(ids, scope)
        full, rows = divmod(tokens, self._page_tokens)
        partial = Partial(path[full].page, rows, rows == len(path[full].chunk)) if rows else None
        return Match([node.page for node in path[:full]], tokens, partial)

    def lease(self, ids: Sequence[int], until: float, scope: str = "") -> int:
        """Ask to keep the longest known prefix of `ids` until then (seconds, any clock); its tokens.

        Of several leases on a page the longest counts.
        """
        path, tokens = self._walk(ids, scope)
        for node in path:
            node.until = max(node.until, until)
        return tokens

    def leased(self, now: float) -> int:
        """Pages with a lease at `now` that only the tree holds."""
        return sum(
            1 for page, node in self._pages.items() if node.until > now and self._counts.refcount(page) == 1
        )

    def insert(self, ids: Sequence[int], pages: Sequence[int], scope: str = "") -> list[int]:
        """Record that `pages`, held by the caller, have the latents of `ids`; the last may be partly filled.

        Returns the pages to go on with. A full page differs from the one given where the same prefix was
        known already: the caller then goes on with the tree's page and drops its own, so that the pages that
        a sequence shares with the tree always form a path from the root. A partly filled one is always the
        caller's own, for it is going to be written; the tree takes it if it does not know its tokens yet.

        Raises:
            EngineError: not ceil(len(ids) / page_tokens) pages, or one that has other tokens in the tree (of
                those that are a path in the tree already the last one is compared).
        """
        size = self._page_tokens
        if len(pages) != -(-len(ids) // size):
            raise EngineError(f"{len(ids)} tokens in pages of {size} do not fill {len(pages)} pages")
        if not pages:
            return []
        self._clock += 1
        root = self._roots.setdefault(scope, _Root(scope))
        node, known = self._known(root, ids, pages)
        node.touch(self._clock)
        kept = list(pages[:known])
        try:
            for chunk, page in zip(self._chunks(ids, known * size), pages[known:], strict=True):
                node = self._enter(node, chunk, page)
                node.touch(self._clock)
                kept.append(node.page if len(chunk) == size else page)
        finally:
            if not root.children:
                del self._roots[scope]
            elif not node.children:
                self._offer(node)
        return kept

    def evict(self, pages: int, now: float = 0.0, *, only_kept: bool = False) -> int:
        """Let go of up to `pages` pages that only the tree holds; how many.

        Least recently used first; if those without a lease at `now` do not suffice, leased ones go too, those
        first whose lease ends first. With `only_kept` it ends before the first page that would be lost.
        """
        freed = 0
        held: list[_Node] = []
        while freed < pages:
            node = self._candidate(now)
            if node is None:
                if only_kept or not self._let_go(held, now):
                    break
            elif self._counts.refcount(node.page) > 1:
                held.append(node)
            else:
                kept = self._tell(node, now)
                if only_kept and not kept:
                    self._offer(node)
                    break
                self._break(node, now, kept)
                freed += 1
        for node in held:
            node.used = self._clock  # being held is being used; and the next call need not look at it first
            self._offer(node)
        return freed

    def clear(self) -> None:
        """Forget everything and release all pages."""
        self._counts.release(list(self._pages))
        self._roots.clear()
        self._pages.clear()
        self._leaves.clear()
        self._leased.clear()

    def _walk(self, ids: Sequence[int], scope: str) -> tuple[list[_Node], int]:
        """Nodes of the longest known prefix, now used, and its tokens."""
        self._clock += 1
        path: list[_Node] = []
        tokens = 0
        node: _Node | None = self._roots.get(scope)
        if node is None:
            return path, 0
        for chunk in self._chunks(tuple(ids)):
            node, rows = node.closest(chunk)
            if node is None:
                break
            node.touch(self._clock)
            path.append(node)
            tokens += rows
            if rows < self._page_tokens:
                break
        return path, tokens

    def _known(self, root: _Root, ids: Sequence[int], pages: Sequence[int]) -> tuple[_Node, int]:
        """The last of the leading full pages that the tree has already, one below the other, and how many.

        So that a long history that grows is not compared from its beginning each time: what a sequence shares
        with the tree is a path from the root, so the last page of it tells of all.
        """
        size = self._page_tokens
        for known in range(len(pages), 0, -1):
            node = self._pages.get(pages[known - 1])
            if node is None or node.root is not root or node.depth != known or len(node.chunk) < size:
                continue
            if node.chunk == tuple(ids[(known - 1) * size : known * size]):
                return node, known
            break
        return root, 0

    def _enter(self, parent: _Node, chunk: Chunk, page: int) -> _Node:
        """The node below `parent` that knows `chunk`, on `page` if none did."""
        own = self._pages.get(page)
        if own is not None:
            if own.parent is not parent or common_tokens(own.chunk, chunk) < min(len(own.chunk), len(chunk)):
                raise EngineError(
                    f"page {page} has other tokens in the prefix tree than those to be inserted"
                )
            if len(own.chunk) >= len(chunk):
                return own
        node, rows = parent.closest(chunk)
        if node is not None and rows == len(chunk):
            if own is not None:
                self._replace(own, node)
            return node
        if own is None:
            self._counts.retain([page])
            own = _Node(chunk, page, parent, self._clock)
            self._pages[page] = own
        else:
            parent.remove(own)
            own.chunk, own.key = chunk, b""
        parent.add(own)
        for shorter in parent.beginnings(chunk):
            if self._counts.refcount(shorter.page) == 1:
                self._replace(shorter, own)
        return own

    def _replace(self, node: _Node, longer: _Node) -> None:
        """Drop `node`, since its sibling `longer` claims all its tokens and more."""
        longer.until = max(longer.until, node.until)
        self._drop(node)

    def _candidate(self, now: float) -> _Node | None:
        """Take the leaf that is to go first, held or not, from the candidates."""
        while True:
            expired = bool(self._leased) and self._leased[0][0] <= now
            heap = self._leased if expired or not self._leaves else self._leaves
            if not heap:
                return None
            key, _, node = heapq.heappop(heap)
            node.queued = False
            if self._pages.get(node.page) is not node or node.children:
                continue
            if node.until <= now:
                node.until = _UNLEASED
            right_heap, right_key = self._place(node)
            if heap is right_heap and key == right_key:
                return node
            self._offer(node)

    def _let_go(self, held: list[_Node], now: float) -> bool:
        """Forget held leaves that keep pages above them, which nobody holds, from being evicted; any?

        For the last resort: who holds a page without its path, to copy it, can do without the node.
        """
        blocking = []
        for leaf in held:
            below = []
            node: _Node | None = leaf
            while node is not None and node.page >= 0 and self._counts.refcount(node.page) > 1:
                below.append(node)
                node = node.parent
            if node is not None and node.page >= 0:
                blocking.append(below)
        for below in blocking:
            held.remove(below[0])
            for node in below:
                if node.children:
                    break
                self._break(node, now, self._tell(node, now))
        return bool(blocking)

    def _tell(self, node: _Node, now: float) -> bool:
        """Whether somebody keeps the latents of `node`, which is to go."""
        if self._leaving is None:
            return False
        parent = node.parent
        assert parent is not None
        gone = Evicted(node.page, self._key(node), self._key(parent), node.chunk, node.until)
        return self._leaving(gone, now)

    @staticmethod
    def _key(node: _Node) -> bytes:
        path = []
        above = node
        while not above.key and above.parent is not None:
            path.append(above)
            above = above.parent
        key = above.key
        for below in reversed(path):
            below.key = key = next_key(key, pack_ids(below.chunk))
        return key

    def _break(self, node: _Node, now: float, kept: bool) -> None:
        self.broken_leases += node.until > now and not kept
        self._drop(node)

    def _drop(self, node: _Node) -> None:
        parent = node.parent
        assert parent is not None
        parent.remove(node)
        parent.touch(max(parent.touched, node.touched))  # `insert` does not touch all above what it enters
        if not parent.children:
            if isinstance(parent, _Root):
                del self._roots[parent.scope]
            else:
                self._offer(parent)
        del self._pages[node.page]
        self._counts.release([node.page])

    def _offer(self, leaf: _Node) -> None:
        if leaf.queued:
            return
        leaf.queued = True
        self._serial += 1
        heap, key = self._place(leaf)
        heapq.heappush(heap, (key, self._serial, leaf))
        if len(heap) > 2 * len(self._pages) + 16:  # entries of nodes that were replaced
            heap[:] = [entry for entry in heap if self._pages.get(entry[2].page) is entry[2]]
            heapq.heapify(heap)

    def _place(self, leaf: _Node) -> tuple[list[tuple[float, int, _Node]], float]:
        """Where `leaf` stands among the candidates: which of the heaps, and its key there."""
        return (self._leased, leaf.until) if leaf.until > _UNLEASED else (self._leaves, leaf.used)

    def _chunks(self, ids: Sequence[int], first: int = 0) -> Iterator[Chunk]:
        size = self._page_tokens
        for start in range(first, len(ids), size):
            yield tuple(ids[start : start + size])


def _chunk(node: _Node) -> Chunk:
    return node.chunk
