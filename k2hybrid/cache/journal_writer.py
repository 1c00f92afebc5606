"""Writing to the journal from a thread of its own, so that no step of the model waits for a disk."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from k2hybrid.cache.journal import Journal
from k2hybrid.cache.private_files import Bytes
from k2hybrid.cache.session_log import Exchange

log = logging.getLogger(__name__)

Payload = Bytes | Sequence[Bytes]


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits to be written, or is being written."""

    pages: int
    size: int  # bytes of the pages, each counted as a full one
    sessions: tuple[str, ...]  # whose answers wait


@dataclass(frozen=True, slots=True)
class _Page:
    key: bytes
    parent: bytes
    ids: Sequence[int]
    payload_source: Callable[[], Payload]
    done: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Answer:
    exchange: Exchange
    chain: Sequence[bytes]


class JournalWriter:
    """A bounded queue before a journal, in the order of the calls. All methods may be called from any thread.

    Args:
        journal: closed by its owner, after `close`.
        max_pages: pages that may wait.
        max_bytes: bytes of the pages that may wait, each counted as a full one.
        max_answers: answers that may wait.
        sweep_s: seconds between two sweeps of the journal.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        max_pages: int = 4096,
        max_bytes: int = 4 << 30,
        max_answers: int = 1024,
        sweep_s: float = 600.0,
    ) -> None:
        self._journal = journal
        self._max_pages = min(max_pages, max_bytes // journal.page_bytes)
        self._max_answers = max_answers
        self._sweep_s = sweep_s
        self._changed = threading.Condition()
        self._queue: deque[_Page | _Answer] = deque()
        self._waiting: set[bytes] = set()  # keys of pages in the queue, or being written
        self._answers = 0
        self._current: _Page | _Answer | None = None  # what is being written
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="k2hybrid-journal", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether an offer would be taken now, unless the page is known."""
        return not self._closed and len(self._waiting) < self._max_pages and self._journal.ready

    def knows(self, key: bytes) -> bool:
        """Whether a page is on disk, or about to be."""
        return self._journal.has(key) or key in self._waiting

    def offer(
        self,
        key: bytes,
        parent: bytes,
        ids: Sequence[int],
        payload_source: Callable[[], Payload],
        done: Callable[[], None],
    ) -> bool:
        """Queue a page; False if it is known, the queue is full, or nothing is written at the moment.

        After True, and only then, the writer's thread calls `payload_source` at most once, for what is to be
        written, and `done` exactly once, when that is needed no more, whatever happened.
        """
        with self._changed:
            if not self.ready or self.knows(key):
                return False
            self._waiting.add(key)
            self._queue.append(_Page(key, parent, ids, payload_source, done))
            self._changed.notify_all()
        return True

    def append(self, exchange: Exchange, chain: Sequence[bytes] = ()) -> bool:
        """Queue an answer (see `Journal.append`) behind what was offered before; False as for `offer`."""
        with self._changed:
            if self._closed or not self._journal.ready or self._answers >= self._max_answers:
                return False
            self._answers += 1
            self._queue.append(_Answer(exchange, chain))
            self._changed.notify_all()
        return True

    def backlog(self) -> Backlog:
        """What is not written yet."""
        with self._changed:
            entries = [*self._queue, *([self._current] if self._current else [])]
        answers = [entry.exchange.session for entry in entries if isinstance(entry, _Answer)]
        pages = len(entries) - len(answers)
        return Backlog(pages, pages * self._journal.page_bytes, tuple(dict.fromkeys(answers)))

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was queued is written or given up; False if that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and self._current is None, timeout_s)

    def close(self, timeout_s: float = 10.0) -> bool:
        """Give up the pages that wait, write the answers, end the thread; False if that takes longer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        next_sweep = time.monotonic() + self._sweep_s
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._queue or self._closed, max(0.0, next_sweep - time.monotonic())
                )
                if not self._queue and self._closed:
                    return
                self._current = entry = self._queue.popleft() if self._queue else None
                write = not self._closed
            if isinstance(entry, _Page):
                self._write_page(entry, write)
            elif isinstance(entry, _Answer):
                self._write_answer(entry)
            if time.monotonic() >= next_sweep:
                self._guarded("sweeping", lambda: self._journal.sweep(time.time()))
                next_sweep = time.monotonic() + self._sweep_s
            with self._changed:
                self._current = None
                self._changed.notify_all()

    def _write_page(self, page: _Page, write: bool) -> None:
        journal = self._journal
        try:
            if not (
                write
                and journal.takes(page.parent)
                and self._guarded(
                    "writing a page",
                    lambda: journal.write_page(page.key, page.parent, page.ids, page.payload_source()),
                )
            ):
                journal.leave_out(page.key)
        finally:
            with self._changed:
                self._waiting.discard(page.key)
            self._guarded("releasing a page", page.done)

    def _write_answer(self, answer: _Answer) -> None:
        self._guarded("writing an answer", lambda: self._journal.append(answer.exchange, answer.chain))
        with self._changed:
            self._answers -= 1

    def _guarded(self, what: str, act: Callable[[], object]) -> bool:
        """Whether `act` says that it did it. An exception must not end the thread: pages would wait for their
        `done` forever.
        """
        try:
            return bool(act())
        except Exception:
            log.exception("journal: %s failed", what)
            return False
