"""Latent pages between memory and the journal on disk. Layer 4.

What a sequence computed is offered to the journal's writer page by page, the pages pinned until they are
written. What an admitted sequence lacks and the journal has is read by a thread of its own into pages that
the sequence holds already, while others run.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from k2hybrid.cache.journal_index import Found
from k2hybrid.cache.page_keys import PageKey, next_key, pack_ids, root_key
from k2hybrid.engine.memory import PageMemory
from k2hybrid.engine.sequence import Sequence

Buffers = list[memoryview]


class PageBuffers(Protocol):
    """Where the rows of a page lie (`LatentPages` has it)."""

    def buffers(self, page: int, tokens: int, /) -> Buffers:
        """The first `tokens` rows of `page`, one buffer a layer."""


class PageReader(Protocol):
    """Pages on disk (`Journal` has it)."""

    def match(self, scope: str, ids: Seq[int], page_tokens: int, /) -> Seq[Found]: ...
    def read_page(self, key: bytes, parent: bytes, ids: Seq[int], out: Buffers, /) -> bool: ...


class PageWriter(Protocol):
    """Writes behind the scenes (`JournalWriter` has it)."""

    def offer(
        self,
        key: bytes,
        parent: bytes,
        ids: Seq[int],
        payload_source: Callable[[], Buffers],
        done: Callable[[], None],
        /,
    ) -> bool: ...


@dataclass(frozen=True, slots=True)
class Fetch:
    """Pages on disk that continue what a sequence has, the first of them its page number `first`."""

    first: int
    pages: tuple[Found, ...]
    tokens: int  # of the sequence, known once all are read


class Archive:
    """The engine's side of the journal. Its methods are for the engine's thread.

    Args:
        buffers: the pages' bytes.
        page_tokens: tokens of a page.
    """

    def __init__(
        self, reader: PageReader, writer: PageWriter, buffers: PageBuffers, page_tokens: int
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._buffers = buffers
        self._page_tokens = page_tokens
        self._closing = False
        self._worker = ThreadPoolExecutor(1, "k2hybrid-fetch")

    def keep(
        self,
        sequence: Sequence,
        memory: PageMemory,
        call: Callable[[Callable[[PageMemory], None]], None],
        *,
        last: bool = False,
    ) -> None:
        """Offer the full pages computed since the last time, and with `last` the partly filled one too.

        Args:
            call: has the engine's thread call a function, from any thread.
        """
        size = self._page_tokens
        chain = sequence.page_keys
        full = sequence.computed // size
        for index in range(len(chain), full):
            key = self._key(sequence, chain[-1] if chain else None, index * size, (index + 1) * size)
            chain.append(key)
            self._offer(sequence, key, memory, call)
        if last and sequence.computed > full * size:
            key = self._key(sequence, chain[-1] if chain else None, full * size, sequence.computed)
            self._offer(sequence, key, memory, call)

    def find(self, sequence: Sequence) -> Fetch | None:
        """What the journal has beyond the tokens that `sequence` has; None if it is nothing.

        The last token of the prompt is left to be run: its logits are needed.
        """
        size = self._page_tokens
        found = self._reader.match(sequence.job.scope, sequence.ids[: len(sequence.ids) - 1], size)
        tokens = sum(page.rows for page in found)
        if tokens <= sequence.computed:
            return None
        first = sequence.computed // size  # of a page known in part, more is on disk
        return Fetch(first, tuple(found[first:]), tokens)

    def read(self, sequence: Sequence, fetch: Fetch, then: Callable[[int], None]) -> None:
        """Read into the pages of `sequence`, none of them known in part, which holds them until `then`.

        `then` gets, from the reading thread, the tokens known now: fewer than hoped if a file was no good.
        """
        pages = sequence.pages[fetch.first :]
        self._worker.submit(self._read, pages, fetch, then, lambda: sequence.cancelled or self._closing)

    def close(self) -> None:
        """Read nothing more; the page that is being read ends first."""
        self._closing = True
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _read(
        self, pages: list[int], fetch: Fetch, then: Callable[[int], None], given_up: Callable[[], bool]
    ) -> None:
        known = fetch.first * self._page_tokens
        try:
            for page, found in zip(pages, fetch.pages, strict=False):
                if given_up():
                    break
                # All rows of a file are read to be verified; those beyond `rows` will be overwritten.
                out = self._buffers.buffers(page, len(found.ids))
                if not self._reader.read_page(found.key, found.parent, found.ids, out):
                    break
                known += found.rows
        finally:
            then(known)

    def _key(self, sequence: Sequence, before: PageKey | None, start: int, stop: int) -> PageKey:
        parent = before.key if before else root_key(sequence.job.scope)
        return PageKey(next_key(parent, pack_ids(sequence.ids[start:stop])), parent, start, stop)

    def _offer(
        self,
        sequence: Sequence,
        key: PageKey,
        memory: PageMemory,
        call: Callable[[Callable[[PageMemory], None]], None],
    ) -> None:
        page, tokens = sequence.pages[key.start // self._page_tokens], key.stop - key.start
        memory.pin([page])
        taken = self._writer.offer(
            key.key,
            key.parent,
            sequence.ids[key.start : key.stop],
            lambda: self._buffers.buffers(page, tokens),
            lambda: call(lambda memory: memory.unpin([page])),
        )
        if not taken:
            memory.unpin([page])
