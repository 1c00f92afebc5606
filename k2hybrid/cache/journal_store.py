"""One fingerprint's folder of a journal: its pages and logs, with the index over them.

Its owner sees to it that one thread at a time changes it. What the index answers to other threads meanwhile
never waits for the disk.

<fingerprint>/pages/<key>.page      <fingerprint>/sessions/<session>.log
"""

from __future__ import annotations

import itertools
import logging
import time
from pathlib import Path

from k2hybrid.cache.journal_index import JournalIndex, Victim
from k2hybrid.cache.page_files import PageFile, PageFiles
from k2hybrid.cache.private_files import make_folder
from k2hybrid.cache.session_log import Exchange, LogContent, SessionLogs

log = logging.getLogger(__name__)


class Store:
    """Opening reads every log and every page's header.

    Args:
        folder: the fingerprint's; with `repair` it is created if it is not there.
        page_bytes: the largest payload; None where no payload is read or written.
        repair: delete what is no good, and cut torn logs; otherwise nothing on disk changes.
    """

    def __init__(self, folder: Path, page_bytes: int | None, *, repair: bool) -> None:
        if repair:
            make_folder(folder)
        self.pages = PageFiles(folder / "pages", page_bytes, create=repair)
        self.logs = SessionLogs(folder / "sessions", create=repair)
        self.index = JournalIndex()
        self.damaged = 0
        self._repair = repair
        self._found: list[Exchange] | None = None
        now = time.time()
        self._load_pages(now)
        self._load_logs(now)

    def exchanges(self) -> list[Exchange]:
        """All answers on disk, oldest first. What opening found is handed over once, not kept."""
        found, self._found = self._found, None
        if found is None:
            contents = []
            for session in self.logs.sessions():
                try:
                    contents.append(self.logs.read(session, time.time()))
                except OSError as error:
                    log.warning("journal: session %s cannot be read: %s", session, error)
            found = _oldest_first(contents)
        return [exchange for exchange in found if exchange.session in self.index]

    def append(self, exchange: Exchange) -> None:
        """Add an answer to its session's log."""
        self._found = None
        self.index.add_exchange(exchange, self.logs.append(exchange), time.time())

    def discard(self, key: bytes, reason: str) -> None:
        """Delete a page that proved to be no good."""
        self.damaged += 1
        log.warning("journal: page %s is left out and deleted: %s", key.hex(), reason)
        self.index.drop_page(key)
        self.pages.remove(key)

    def remove(self, victim: Victim) -> None:
        """Delete pages and, last, their session's log: until then the session can be deleted again."""
        for key in victim.pages:
            # Nobody finds it from now on, however long the disk takes; and until it is gone it counts.
            page = self.index.drop_page(key)
            try:
                self.pages.remove(key)
            except OSError:
                if page is not None:
                    self.index.add_page(key, page)
                raise
        if victim.session is not None:
            self.logs.remove(victim.session)
            self.index.drop_session(victim.session)

    def _load_pages(self, now: float) -> None:
        for name, key, page in self.pages.scan(now):
            if isinstance(page, PageFile):
                self.index.add_page(key, page)
            elif self._repair:
                if not name.endswith(".tmp"):  # what a killed process leaves is no damage
                    self.damaged += 1
                    log.warning("journal: %s is left out and deleted: %s", name, page)
                try:
                    self.pages.remove_name(name)
                except OSError as error:
                    log.warning("journal: %s cannot be deleted: %s", name, error.strerror)

    def _load_logs(self, now: float) -> None:
        contents = []
        for session in self.logs.sessions():
            try:
                content = self.logs.read(session, now)
                if self._repair and content.good_bytes < content.size:
                    lost = content.size - content.good_bytes
                    log.warning("journal: session %s: %d torn bytes are cut off", session, lost)
                    self.damaged += 1
                    self.logs.cut(session, content.good_bytes)
                if content.exchanges:
                    self.index.add_log(session, content)
                    contents.append(content)
                elif self._repair:
                    self.logs.remove(session)
            except FileNotFoundError:  # deleted meanwhile
                continue
            except OSError as error:
                log.warning("journal: session %s cannot be read: %s", session, error)
        self._found = _oldest_first(contents)


def _oldest_first(contents: list[LogContent]) -> list[Exchange]:
    """By time; a session's own answers stay in order even if the clock went back between them."""
    dated: list[tuple[int, Exchange]] = []
    for content in contents:
        times = itertools.accumulate((exchange.created for exchange in content.exchanges), max)
        dated += zip(times, content.exchanges, strict=True)
    return [exchange for _, exchange in sorted(dated, key=lambda pair: pair[0])]
