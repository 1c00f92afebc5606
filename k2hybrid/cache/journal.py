"""The journal: sessions' answers and latent pages on disk, from which a restarted server goes on.

    DIR/lock      DIR/<fingerprint>/pages/…      DIR/<fingerprint>/sessions/…

A fingerprint binds what pages depend on: checkpoint, page format, template. The folders of other fingerprints
are never read; limits of size and age hold for all of them together. Whatever happens to the files later,
requests go on: what cannot be read counts as absent, and after a failed write nothing is written for a while.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from k2hybrid.cache.journal_folder import (
    FolderLock,
    Foreign,
    check_folder,
    fingerprints,
    is_fingerprint,
    measure_foreign,
)
from k2hybrid.cache.journal_health import WriteHealth
from k2hybrid.cache.journal_index import SessionInfo, Victim
from k2hybrid.cache.journal_store import Store
from k2hybrid.cache.page_files import Damaged, PageFile
from k2hybrid.cache.page_keys import Found, next_key, pack_ids
from k2hybrid.cache.private_files import Bytes
from k2hybrid.cache.session_log import Exchange
from k2hybrid.errors import ConfigError

log = logging.getLogger(__name__)

_TOUCH_SECONDS = 60.0  # a use is noted on disk if the last note is older
_SLACK = 20  # when full, one part in so many is freed at once
_MAX_LEFT_OUT = 1 << 16


class Journal:
    """Opens and locks `folder`, and keeps to the limits at once. All methods may be called from any thread.

    Args:
        folder: created with mode 0700 if it is not there; its parents are not.
        fingerprint: 8 to 128 hex digits.
        page_bytes: bytes of a full page's payload.
        max_bytes: of all files in `folder`; None: no limit. Answers may exceed it until the next sweep.
        max_age_s: what was not used for so long is deleted; None: nothing is.

    Raises:
        ConfigError: the folder is open to others, in use by another process, or cannot be written.

    Attributes:
        page_bytes: as given.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        page_bytes: int,
        max_bytes: int | None = None,
        max_age_s: float | None = None,
    ) -> None:
        if not is_fingerprint(fingerprint):
            raise ValueError(f"a fingerprint has 8 to 128 hex digits, unlike {fingerprint!r}")
        self.page_bytes = page_bytes
        self._health = WriteHealth()
        self._closed = False
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._left_out: set[bytes] = set()  # keys of pages that were to be written and are not there
        # Held for every change of names on disk, and so for as long as the disk takes; whoever changes the
        # index, or walks through it, holds it too. `has`, `closest` and reading go without it: the index
        # guards itself, and a file that is deleted while it is read stays whole for its reader.
        self._changing = threading.Lock()
        check_folder(folder, create=True)
        self._lock = FolderLock(folder)
        try:
            self._store = Store(folder / fingerprint, page_bytes, repair=True)
            others = [folder / name for name in fingerprints(folder) if name != fingerprint]
            self._foreign = [measure_foreign(path, time.time()) for path in others]
        except OSError as error:
            self._lock.release()
            raise ConfigError(f"cannot write in the journal {folder}: {error.strerror or error}") from None
        self.sweep(time.time())

    # --- reading ----------------------------------------------------------------------------------

    def exchanges(self) -> list[Exchange]:
        """All answers of this fingerprint, oldest first."""
        with self._changing:
            return self._store.exchanges()

    def sessions(self) -> list[SessionInfo]:
        """All sessions of this fingerprint, least recently used first."""
        with self._changing:
            return self._store.index.sessions()

    @property
    def size(self) -> int:
        """Bytes of all files, those of other fingerprints included."""
        return self._store.index.size + sum(foreign.size for foreign in self._foreign)

    @property
    def failed(self) -> str:
        """Why nothing is written at the moment; empty while all is well."""
        return "it is closed" if self._closed else self._health.failed

    @property
    def last_error(self) -> str:
        """Why writing failed the last time, also if it works again; empty if it never did."""
        return self._health.last_error

    @property
    def ready(self) -> bool:
        """Whether a write may be tried: nothing failed lately, and the journal is open."""
        return not self._closed and self._health.ready

    @property
    def damaged(self) -> int:
        """Files that proved to be no good so far."""
        return self._store.damaged

    def has(self, key: bytes) -> bool:
        """Whether a page is on disk."""
        return key in self._store.index.pages

    def closest(self, parent: bytes, ids: Sequence[int]) -> Found | None:
        """The page on disk after `parent` with most tokens in common with `ids`, at least one."""
        packed = pack_ids(ids)
        key = next_key(parent, packed)
        if self.has(key):
            return Found(key, parent, tuple(ids), len(ids))
        return self._store.index.closest(parent, packed)

    def read_page(self, key: bytes, parent: bytes, ids: Sequence[int], out: Bytes | Sequence[Bytes]) -> bool:
        """Fill `out`, one buffer or several in the order of the payload, if the page is there and whole.

        The payload must be as long as `out`. On False, what `out` holds is undefined; a page that was no good
        is deleted.
        """
        page = self._store.index.pages.get(key)
        if page is None:
            return False
        try:
            self._store.pages.read(key, parent, pack_ids(ids), out)
        except (Damaged, OSError) as error:
            with self._changing:
                # Unless the page went, or was written anew, in the meantime.
                if self._store.index.pages.get(key) is page and not self._closed:
                    self._discard(key, str(error))
            return False
        self._touch_page(key, page)
        return True

    def touch(self, session: str) -> None:
        """Note that a session is in use: it goes last when room is needed. Unknown sessions are ignored."""
        if self._store.index.touch_session(session, time.time()):
            try:
                self._store.logs.touch(session)
            except OSError as error:
                log.debug("journal: use of session %s not noted: %s", session, error)

    # --- writing ----------------------------------------------------------------------------------

    def takes(self, parent: bytes) -> bool:
        """Whether a page after `parent` may be tried: if that one was left out, it would lead nowhere."""
        return self.ready and (parent not in self._left_out or self.has(parent))

    def leave_out(self, key: bytes) -> None:
        """A page is not written: neither are those after it, until it is."""
        if len(self._left_out) >= _MAX_LEFT_OUT:
            self._left_out.clear()
        self._left_out.add(key)

    def write_page(
        self, key: bytes, parent: bytes, ids: Sequence[int], payload: Bytes | Sequence[Bytes]
    ) -> bool:
        """Write a page of one buffer or several; whether it is on disk now.

        False also if there is no room beside the pages before it, or one of these was left out. ValueError if
        `key` is not the key of `ids` after `parent`, or the payload is longer than `page_bytes`. The payload
        must not change meanwhile.
        """
        packed = pack_ids(ids)
        if next_key(parent, packed) != key:
            raise ValueError("the key is not that of these tokens after this parent")
        if self.has(key):
            return True
        written = False
        try:
            if self.takes(parent):
                size = self._store.pages.stored_bytes(packed, payload)
                if self._make_room(size, parent):
                    prepared = self._store.pages.prepare(key, parent, packed, payload)
                    written = self._publish(prepared, key, PageFile(parent, packed, size, time.time()))
        except OSError as error:
            self._health.fail(error)
        if written:
            self._left_out.discard(key)
            self._health.worked()
        else:
            self.leave_out(key)
        return written

    def append(self, exchange: Exchange, chain: Sequence[bytes] = ()) -> bool:
        """Add an answer to its session's log; whether it is on disk now.

        Args:
            exchange: the answer.
            chain: the keys of all pages of prompt and answer, first to last. With them `last_page` is taken
                from what is on disk: a page that was not written leaves those before it reachable.
        """
        try:
            with self._changing:
                if not self.ready:
                    return False
                if chain:
                    exchange = replace(exchange, last_page=self._store.index.deepest(chain).hex())
                self._store.append(exchange)
        except OSError as error:
            self._health.fail(error)
            return False
        self._health.worked()
        return True

    def delete(self, session: str) -> bool:
        """Delete a session and all pages that no other one reaches; False if it is unknown or stays.

        What waits in a `JournalWriter` is written later: flush it before. Of requests that still run, what
        was written so far goes too.
        """
        with self._changing:
            if self._closed or session not in self._store.index:
                return False
            try:
                self._store.remove(self._store.index.alone(session))
            except OSError as error:
                self._health.fail(error)
                return False
        return True

    def sweep(self, now: float) -> None:
        """Delete superseded pages, what is too old, and what was used least recently until the rest fits."""
        with self._changing:
            if self._closed:
                return
            try:
                self._store.remove(Victim(now, None, tuple(self._store.index.superseded())))
                self._shrink(now, self._max_bytes, set())
            except OSError as error:
                self._health.fail(error)

    def close(self) -> None:
        """Change nothing more, and let other processes have the folder."""
        with self._changing:
            self._closed = True
            self._lock.release()

    # --- inside -----------------------------------------------------------------------------------

    def _publish(self, prepared: Path, key: bytes, page: PageFile) -> bool:
        """Give a prepared page its name; False if the journal was closed meanwhile."""
        with self._changing:
            if self._closed:
                prepared.unlink(missing_ok=True)
                return False
            self._store.pages.publish(prepared, key)
            self._store.index.add_page(key, page)
        return True

    def _make_room(self, size: int, parent: bytes) -> bool:
        """Have room for a page's file of `size` bytes beside the pages before it; whether there is."""
        limit = self._max_bytes
        if limit is None:
            return True
        if size <= limit < self.size + size:
            with self._changing:
                if self._closed:
                    return False
                # More than is needed: choosing looks at all pages, too much for each one written.
                keep = self._store.index.ancestors(parent)
                self._shrink(time.time(), limit - max(size, limit // _SLACK), keep)
        return self.size + size <= limit

    def _shrink(self, now: float, limit: int | None, keep: set[bytes]) -> None:
        """Delete what is too old, and the least recently used down to `limit` bytes; but not `keep`."""
        oldest = float("-inf") if self._max_age_s is None else now - self._max_age_s
        own: Iterator[Victim | Foreign] = self._store.index.victims(keep)
        other = sorted(self._foreign, key=lambda foreign: foreign.used)
        for victim in heapq.merge(own, other, key=lambda victim: victim.used):
            if victim.used >= oldest and (limit is None or self.size <= limit):
                break
            if isinstance(victim, Foreign):
                self._foreign.remove(victim)
                victim.remove()
            else:
                self._store.remove(victim)

    def _touch_page(self, key: bytes, page: PageFile) -> None:
        now = time.time()
        if now - page.used < _TOUCH_SECONDS:
            return
        page.used = now
        try:
            self._store.pages.touch(key)
        except OSError as error:
            log.debug("journal: use of page %s not noted: %s", key.hex(), error)

    def _discard(self, key: bytes, reason: str) -> None:
        try:
            self._store.discard(key, reason)
        except OSError as error:
            self._health.fail(error)
