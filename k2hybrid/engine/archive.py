"""Latent pages outside the pool: in RAM, and in the journal on disk. Layer 4.

What a sequence computed is offered to the journal's writer page by page, the pages pinned until they are
written. What an admitted sequence lacks is looked for page by page, in RAM first and then in the journal, and
brought behind the scenes into pages that the sequence holds already, while others run. What leaves the pool
goes to RAM by `spill`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from k2hybrid.cache.host_pages import HostPage
from k2hybrid.cache.page_keys import Found, PageKey, next_key, pack_ids, root_key
from k2hybrid.cache.page_mover import Buffers, PageMover
from k2hybrid.engine.memory import PageMemory
from k2hybrid.engine.metrics import PageTraffic
from k2hybrid.engine.sequence import Sequence
from k2hybrid.engine.spill import BATCH, Spill
from k2hybrid.errors import EngineError

log = logging.getLogger(__name__)

READERS = 2  # so that one slow read from disk does not keep another request's pages in RAM
AHEAD = 4  # copies from RAM that a request may have under way: when it is cancelled, they are waited for


class PageReader(Protocol):
    """Pages on disk (`Journal` has it)."""

    def closest(self, parent: bytes, ids: Seq[int], /) -> Found | None: ...
    def read_page(self, key: bytes, parent: bytes, ids: Seq[int], out: Buffers, /) -> bool: ...


class PageWriter(Protocol):
    """Writes behind the scenes (`JournalWriter` has it)."""

    @property
    def ready(self) -> bool: ...
    def knows(self, key: bytes, /) -> bool: ...
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
class Source:
    """Where a page of a sequence lies: in RAM if `host`, else on disk."""

    found: Found
    host: HostPage[Any] | None = None
    filled: Future[None] | None = None  # while it is still on its way to RAM


@dataclass(frozen=True, slots=True, eq=False)
class Fetch:
    """Pages that continue what a sequence has, the first of them its page number `first`."""

    first: int
    pages: tuple[Source, ...]
    tokens: int  # of the sequence, known once all are there


@dataclass(frozen=True, slots=True)
class Fetched:
    """What came of a fetch: its first `pages`, with which so many `tokens` of the sequence are known."""

    pages: int
    tokens: int
    failed: bool = False  # a copy failed, not only a file


@dataclass(slots=True)
class _Step:
    """Pages that are copied from RAM together, or one that is read from disk."""

    pages: list[int]
    sources: list[Source]
    first: list[Future[None]] = field(default_factory=list)  # what must be done before


class Archive:
    """The engine's side of RAM and journal. Its methods are for the engine's thread.

    Args:
        mover: of the pages' bytes; its owner closes it, after the journal's writer.
        page_tokens: tokens of a page.
        reader, writer: of the journal; None: there is none.
        spill: what goes to RAM; None: nothing does.
        traffic: where what comes back is counted.
    """

    def __init__(
        self,
        mover: PageMover,
        page_tokens: int,
        *,
        reader: PageReader | None = None,
        writer: PageWriter | None = None,
        spill: Spill | None = None,
        page_bytes: int = 0,
        traffic: PageTraffic | None = None,
    ) -> None:
        self.spill = spill
        self.traffic = traffic or PageTraffic()
        self.mover = mover
        self._page_tokens = page_tokens
        self._reader = reader
        self._writer = writer
        self._page_bytes = page_bytes
        self._fetches: list[Fetch] = []  # whose pages in RAM are held
        self._closing = False
        self._worker = ThreadPoolExecutor(READERS, "k2hybrid-fetch")

    def keep(
        self,
        sequence: Sequence,
        memory: PageMemory,
        call: Callable[[Callable[[PageMemory], None]], None],
        *,
        last: bool = False,
    ) -> None:
        """Offer the full pages computed since the last time, and with `last` the partly filled one too.

        A page that the journal does not take is offered again the next time, and none after it before that:
        without it they would lead nowhere. One that it took and could not write is left out, with those after
        it, until the session's next turn.

        Args:
            call: has the engine's thread call a function, from any thread.
        """
        if self._writer is None:
            return
        size = self._page_tokens
        full = sequence.computed // size
        self._extend_keys(sequence, full)
        while sequence.journaled < full:
            if not self._offer(self._writer, sequence, sequence.page_keys[sequence.journaled], memory, call):
                return
            sequence.journaled += 1
        if last and sequence.computed > full * size:
            key = self._key(sequence, self._parent(sequence, full), full * size, sequence.computed)
            self._offer(self._writer, sequence, key, memory, call)

    def find(self, sequence: Sequence, least: int = 1) -> Fetch | None:
        """What RAM and journal have beyond the tokens that `sequence` has; None if it is less than `least`.

        The last token of the prompt is left to be run: its logits are needed. What is found in RAM stays
        there until `end`.
        """
        if self.spill is not None:
            self.spill.settle()
        size = self._page_tokens
        limit = len(sequence.ids) - 1
        first = sequence.computed // size  # of a page known in part, more may lie elsewhere
        self._extend_keys(sequence, first)
        parent = self._parent(sequence, first)
        sources: list[Source] = []
        tokens = first * size
        for start in range(first * size, limit, size):
            source = self._source(parent, sequence.ids[start : min(start + size, limit)])
            if source is None:
                break
            sources.append(source)
            tokens += source.found.rows
            if source.found.rows < size:
                break
            parent = source.found.key
        if tokens < sequence.computed + least:
            return None
        fetch = Fetch(first, tuple(sources), tokens)
        for source in sources:
            if source.host is not None and self.spill is not None:
                self.spill.host.hold(source.host)
        self._fetches.append(fetch)
        return fetch

    def read(
        self, sequence: Sequence, fetch: Fetch, memory: PageMemory, then: Callable[[Fetched], None]
    ) -> None:
        """Fill the pages of `sequence`, none of them known in part, which holds them until `then`.

        `then` gets, from the reading thread, what is there: less than hoped if a file or a copy was no good.
        """
        steps: list[_Step] = []
        for page, source in zip(sequence.pages[fetch.first :], fetch.pages, strict=True):
            last = steps[-1] if steps else None
            together = last is not None and source.host is not None and last.sources[0].host is not None
            if last is None or not together or len(last.pages) == BATCH:
                steps.append(last := _Step([], []))
            last.pages.append(page)
            last.sources.append(source)
        for step in steps:
            step.first += memory.leaving(step.pages)
            step.first += [source.filled for source in step.sources if source.filled is not None]
        after = self.mover.mark()
        known = fetch.first * self._page_tokens
        self._worker.submit(
            self._read, steps, known, after, then, lambda: sequence.cancelled or self._closing
        )

    def end(self, fetch: Fetch, fetched: Fetched | None = None) -> None:
        """`fetch` is over, with what came of it."""
        self._fetches.remove(fetch)
        pages = [source.host for source in fetch.pages if source.host is not None]
        for page in pages:
            if self.spill is not None:
                self.spill.host.release(page)
        if fetched is None:
            return
        there = fetch.pages[: fetched.pages]
        copied = [source.host for source in there if source.host is not None]
        if self.spill is not None:
            self.spill.host.spare(copied)
        self.traffic.pages_in += len(copied)
        self.traffic.bytes_in += len(copied) * self._page_bytes
        for source in there:
            if source.host is not None:
                self.traffic.ram_tokens += source.found.rows
            else:
                self.traffic.journal_tokens += source.found.rows
        self.traffic.copy_errors += fetched.failed

    def check(self) -> None:
        """Prove that pages in RAM are held by those who fill or read them, and by nobody else.

        Raises:
            EngineError: they are not.
        """
        if self.spill is None:
            return
        reading = Counter(s.host for fetch in self._fetches for s in fetch.pages if s.host is not None)
        if wrong := self.spill.check(reading):
            raise EngineError("pages in RAM do not add up: " + "; ".join(wrong[:20]))

    def close(self) -> None:
        """Bring nothing back any more; what is being read or copied ends first."""
        self._closing = True
        self._worker.shutdown(wait=True, cancel_futures=True)
        if self.spill is not None:
            while self.spill.wait():
                pass

    def _source(self, parent: bytes, ids: Seq[int]) -> Source | None:
        """The page after `parent` with most of `ids`; in RAM if it has as many there."""
        host = self.spill.host if self.spill is not None else None
        here = host.closest(parent, ids) if host is not None else None
        if self._reader is not None and (here is None or here.rows < len(ids)):
            there = self._reader.closest(parent, ids)
            if there is not None and (here is None or there.rows > here.rows):
                return Source(there)
        if here is None or host is None or (page := host.get(here.key)) is None:
            return None
        return Source(here, page, page.filled)

    def _read(
        self,
        steps: list[_Step],
        known: int,
        after: Any,
        then: Callable[[Fetched], None],
        given_up: Callable[[], bool],
    ) -> None:
        copies: list[Future[None] | None] = []  # of the steps that were begun; None: it was read
        failed: BaseException | None = None
        try:
            for step in steps:
                if given_up():
                    break
                if len(copies) >= AHEAD and (oldest := copies[-AHEAD]) is not None:
                    oldest.result()
                for copy in step.first:
                    copy.exception()
                if any(s.filled is not None and s.filled.exception() is not None for s in step.sources):
                    break
                if step.sources[0].host is not None:
                    buffers = [source.host.buffer for source in step.sources if source.host is not None]
                    copies.append(self.mover.into(step.pages, buffers, after))
                elif self._read_page(step.pages[0], step.sources[0].found, after):
                    copies.append(None)
                else:
                    break
        except Exception as raised:
            failed = raised
        finally:
            # Neither a copy from RAM nor one to it may be under way when the sequence writes its pages.
            for under_way in (*copies, *(copy for step in steps for copy in step.first)):
                if under_way is not None:
                    under_way.exception()
            good = 0
            for step, done in zip(steps, copies, strict=False):
                if done is not None and (error := done.exception()) is not None:
                    failed = error
                    break
                good += len(step.pages)
                known += sum(source.found.rows for source in step.sources)
            if failed is not None:
                log.error("latent pages did not come back, their tokens are prefilled: %s", failed)
            then(Fetched(good, known, failed is not None))

    def _read_page(self, page: int, found: Found, after: Any) -> bool:
        reader = self._reader
        # All rows of a file are read to be verified; those beyond `rows` will be overwritten.
        return reader is not None and self.mover.fill(
            page,
            len(found.ids),
            lambda out: reader.read_page(found.key, found.parent, found.ids, out),
            after,
        )

    def _extend_keys(self, sequence: Sequence, pages: int) -> None:
        """Have `page_keys` of the first so many full pages."""
        size = self._page_tokens
        chain = sequence.page_keys
        for index in range(len(chain), pages):
            chain.append(self._key(sequence, self._parent(sequence, index), index * size, (index + 1) * size))

    def _parent(self, sequence: Sequence, index: int) -> bytes:
        """Of the page with this number, whose predecessors have their keys."""
        return sequence.page_keys[index - 1].key if index else root_key(sequence.job.scope)

    def _key(self, sequence: Sequence, parent: bytes, start: int, stop: int) -> PageKey:
        return PageKey(next_key(parent, pack_ids(sequence.ids[start:stop])), parent, start, stop)

    def _offer(
        self,
        writer: PageWriter,
        sequence: Sequence,
        key: PageKey,
        memory: PageMemory,
        call: Callable[[Callable[[PageMemory], None]], None],
    ) -> bool:
        """Whether the page is on disk, or about to be."""
        if writer.knows(key.key):
            return True
        if not writer.ready:  # asked first: a mark and a pin at every step would be dear
            return False
        page, tokens = sequence.pages[key.start // self._page_tokens], key.stop - key.start
        after = self.mover.mark()
        memory.pin([page])
        taken = writer.offer(
            key.key,
            key.parent,
            sequence.ids[key.start : key.stop],
            lambda: self.mover.buffers(page, tokens, after),
            lambda: call(lambda memory: memory.unpin([page])),
        )
        if not taken:
            memory.unpin([page])
        return taken
