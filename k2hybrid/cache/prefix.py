"""Which token prefixes have their latents in pages already: a tree of full pages, keyed by token ids.

A node is one full page of tokens; its path from the root is the exact prefix its latents were computed for.
The tree holds one reference on each of its pages and evicts, least recently used first, pages that nobody
else holds. Pure Python: it knows page numbers and reference counts, never the bytes. Layer 2.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import Protocol

Chunk = tuple[int, ...]


class PageCounts(Protocol):
    """What the tree needs of the page pool (`LatentPages` has it)."""

    def retain(self, pages: Sequence[int]) -> None:
        """One more reference on each page."""

    def release(self, pages: Sequence[int]) -> None:
        """One reference less; a page without references is free."""

    def refcount(self, page: int) -> int:
        """References on `page`."""


class _Node:
    __slots__ = ("children", "chunk", "page", "parent", "queued", "used")

    def __init__(self, chunk: Chunk, page: int, parent: _Node | None, used: int) -> None:
        self.chunk = chunk
        self.page = page
        self.parent = parent
        self.used = used
        self.queued = False  # has an entry among the candidates for eviction
        self.children: dict[Chunk, _Node] = {}


class PrefixTree:
    """Longest-prefix lookup over full pages of token ids.

    Args:
        counts: the pool whose pages the tree shares.
        page_tokens: tokens per page.
    """

    def __init__(self, counts: PageCounts, page_tokens: int) -> None:
        self._counts = counts
        self._page_tokens = page_tokens
        self._root = _Node((), -1, None, 0)
        self._clock = 0
        self._pages: dict[int, _Node] = {}
        # Candidates for eviction: (last use, serial, node). Entries go stale when a node is used again or
        # gets children; they are mended when popped, so that a match costs nothing here.
        self._leaves: list[tuple[int, int, _Node]] = []
        self._serial = 0

    def __len__(self) -> int:
        """Pages in the tree."""
        return len(self._pages)

    def __contains__(self, page: int) -> bool:
        return page in self._pages

    def match(self, ids: Sequence[int]) -> tuple[list[int], int]:
        """Pages of the longest known prefix of `ids`, and its tokens. Takes no reference; retain them."""
        self._clock += 1
        node = self._root
        pages: list[int] = []
        for chunk in self._chunks(ids):
            child = node.children.get(chunk)
            if child is None:
                break
            child.used = self._clock
            pages.append(child.page)
            node = child
        return pages, len(pages) * self._page_tokens

    def insert(self, ids: Sequence[int], pages: Sequence[int]) -> list[int]:
        """Record that `pages` hold the latents of the full pages of `ids`.

        Returns the tree's page for each of them. It differs from the one given where the same prefix was
        known already; the caller then goes on with the tree's page and drops its own, so that the pages that
        a sequence shares with the tree always form a path from the root.
        """
        self._clock += 1
        node = self._root
        kept: list[int] = []
        for chunk, page in zip(self._chunks(ids), pages, strict=False):
            child = node.children.get(chunk)
            if child is None:
                child = _Node(chunk, page, node, self._clock)
                node.children[chunk] = child
                self._counts.retain([page])
                self._pages[page] = child
            child.used = self._clock
            kept.append(child.page)
            node = child
        if node is not self._root and not node.children:
            self._offer(node)
        return kept

    def evict(self, pages: int) -> int:
        """Release up to `pages` pages that only the tree holds, least recently used first; how many."""
        freed = 0
        busy: list[_Node] = []
        while freed < pages and self._leaves:
            used, _, node = heapq.heappop(self._leaves)
            node.queued = False
            if self._pages.get(node.page) is not node or node.children:
                continue
            if used != node.used:
                self._offer(node)
            elif self._counts.refcount(node.page) > 1:
                busy.append(node)
            else:
                self._drop(node)
                freed += 1
        for node in busy:
            self._offer(node)
        return freed

    def clear(self) -> None:
        """Forget everything and release all pages."""
        self._counts.release(list(self._pages))
        self._root.children.clear()
        self._pages.clear()
        self._leaves.clear()

    def pages(self) -> Iterator[int]:
        """All pages in the tree, in no order."""
        return iter(self._pages)

    def _drop(self, node: _Node) -> None:
        parent = node.parent
        if parent is not None:
            del parent.children[node.chunk]
            if parent is not self._root and not parent.children:
                self._offer(parent)
        del self._pages[node.page]
        self._counts.release([node.page])

    def _offer(self, leaf: _Node) -> None:
        if leaf.queued:
            return
        leaf.queued = True
        self._serial += 1
        heapq.heappush(self._leaves, (leaf.used, self._serial, leaf))

    def _chunks(self, ids: Sequence[int]) -> Iterator[Chunk]:
        size = self._page_tokens
        for start in range(0, len(ids) - size + 1, size):
            yield tuple(ids[start : start + size])
