"""Latent pages: the MLA cache in refcounted pages of 64 tokens, stored `[layer][page][token][row_bytes]`.

A page holds the latent rows of 64 consecutive tokens in every layer. Holders say so with `retain` and
`release`; a page nobody holds is free. What a row looks like in memory is the `RowFormat`'s business alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import torch

from k2hybrid.cache.row_sizes import PAGE_TOKENS as PAGE_TOKENS
from k2hybrid.cache.rows import RowFormat
from k2hybrid.errors import CapacityError, EngineError


class LatentPages:
    """A fixed number of pages for `layers` layers. Memory is reserved at once, and touched only when written.

    Page 3 of layer 0 and page 3 of layer 5 belong together: pages are counted once, for all layers.
    """

    PAGE_TOKENS = PAGE_TOKENS

    def __init__(self, layers: int, pages: int, fmt: RowFormat, device: torch.device | str = "cpu") -> None:
        self.format = fmt
        self.pages = pages
        self._storage = torch.empty(
            (layers, pages, PAGE_TOKENS, fmt.row_bytes), dtype=torch.uint8, device=device
        )
        self._rows = self._storage.view(layers, pages * PAGE_TOKENS, fmt.row_bytes)
        self._refcounts = [0] * pages
        # A heap hands out the lowest free page, so that a sequence tends to lie in one piece: no copy.
        self._free = list(range(pages))

    @property
    def device(self) -> torch.device:
        """Where the rows lie."""
        return self._storage.device

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        return self._storage.shape[0] * PAGE_TOKENS * self.format.row_bytes

    @property
    def free_pages(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def refcount(self, page: int) -> int:
        """How many hold `page`; 0 if it is free."""
        return self._refcounts[page]

    def allocate(self, n: int) -> list[int]:
        """Take `n` free pages, each held once. Raises CapacityError, and takes none, if there are fewer."""
        if n > len(self._free):
            raise CapacityError(
                f"{n} latent pages are wanted and {len(self._free)} of {self.pages} are free; "
                "wait for a sequence to end, or raise latent_bytes"
            )
        taken = [heapq.heappop(self._free) for _ in range(n)]
        for page in taken:
            self._refcounts[page] = 1
        return taken

    def retain(self, pages: Iterable[int]) -> None:
        """Hold pages that somebody holds already."""
        for page in pages:
            if self._refcounts[page] < 1:
                raise EngineError(f"latent page {page} is free and cannot be retained; allocate it")
            self._refcounts[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Let go of pages; those nobody holds any more become free."""
        for page in pages:
            if self._refcounts[page] < 1:
                raise EngineError(f"latent page {page} is released more often than it was held")
            self._refcounts[page] -= 1
            if self._refcounts[page] == 0:
                heapq.heappush(self._free, page)

    def page(self, page: int) -> torch.Tensor:
        """All rows of `page`, uint8 [layers, 64, row_bytes]: a view; each layer's lie in one piece."""
        return self._storage[:, page]

    def buffers(self, page: int, tokens: int) -> list[memoryview]:
        """The first `tokens` rows of `page` in each layer, as writable memory; for pages on the CPU."""
        rows = self._storage[:, page, :tokens].numpy()
        return [memoryview(layer).cast("B") for layer in rows]

    def slots(self, page_table: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Row numbers, int64 [stop - start], of a sequence's tokens; the same in every layer."""
        tokens = torch.arange(start, stop, device=page_table.device)
        return page_table[tokens // PAGE_TOKENS] * PAGE_TOKENS + tokens % PAGE_TOKENS

    @staticmethod
    def slot(page_table: torch.Tensor, token: int) -> int:
        """Row number of one token, as `slots` has it; quicker, since every sequence that decodes asks."""
        page, row = divmod(token, PAGE_TOKENS)
        return int(page_table[page]) * PAGE_TOKENS + row

    def rows(self, layer: int) -> torch.Tensor:
        """All rows of a layer as stored, uint8 [pages · 64, row_bytes]."""
        return self._rows[layer]

    def put(self, layer: int, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """Store rows [n, latent_dim] at `slots` [n], which may belong to several sequences."""
        self.format.put(rows, slots, self._rows[layer])

    def write(self, layer: int, page_table: torch.Tensor, start: int, rows: torch.Tensor) -> None:
        """Store rows [n, latent_dim] as tokens start…start+n-1 of the sequence with this page table [P].

        Token t lies in page `page_table[t // 64]` at `t % 64`.
        """
        slots = self.slots(page_table, start, start + rows.shape[0])
        self.put(layer, slots.to(self.device), rows)

    def copy_rows(self, src: int, dst: int, rows: int) -> None:
        """Copy the first `rows` rows of page `src` to page `dst`, in every layer; both must be held."""
        if not 0 <= rows <= PAGE_TOKENS:
            raise EngineError(f"{rows} rows cannot be copied: a latent page has {PAGE_TOKENS}")
        for page in (src, dst):
            if self._refcounts[page] < 1:
                raise EngineError(f"latent page {page} is free; no rows are copied from it or to it")
        self._storage[:, dst, :rows] = self._storage[:, src, :rows]

    def gather(
        self,
        layer: int,
        page_table: torch.Tensor,
        start: int,
        stop: int,
        there: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rows [stop - start, latent_dim] of tokens start…stop-1; a view if their pages adjoin.

        Args:
            page_table: in RAM.
            there: the same where the rows lie; None: it is copied, which on a device is waited for.
        """
        first = start // PAGE_TOKENS
        some = slice(first, -(-stop // PAGE_TOKENS))
        numbers = page_table[some].tolist()
        if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            base = numbers[0] * PAGE_TOKENS
            rows = self._rows[layer]
        else:
            base = 0
            pages = page_table[some].to(self.device) if there is None else there[some]
            rows = self._storage[layer].index_select(0, pages).view(-1, self.format.row_bytes)
        base -= first * PAGE_TOKENS
        return self.format.decode(rows[base + start : base + stop])
