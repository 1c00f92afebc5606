"""Which pages on disk belong to which sessions, and what may go first. Memory only: it touches no file.

A page knows its parent, so pages form trees; a session reaches the pages on the way from the last pages of
its answers to the root. A page that no session reaches belongs to a request that still runs or was
interrupted, was computed ahead of a turn that did not come yet, or follows a page that is missing: it is kept
like a session that nobody named, by its last use.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from k2hybrid.cache.page_files import PageFile
from k2hybrid.cache.page_keys import ID_BYTES, Found, common_tokens, unpack_ids
from k2hybrid.cache.session_log import Exchange, LogContent


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session on disk. Pages that several sessions reach are counted in each of them."""

    id: str
    exchanges: int
    tokens: int  # of the longest history
    size: int  # bytes of its log and of the pages reachable from it
    created: int  # unix seconds, as `last_used`
    last_used: float


@dataclass(frozen=True, slots=True)
class Victim:
    """Something that may be deleted as a whole: a session and the pages that are its alone, or pages only."""

    used: float
    session: str | None
    pages: tuple[bytes, ...]  # parents first


@dataclass(slots=True)
class _Session:
    created: int
    used: float
    log_bytes: int = 0
    exchanges: int = 0
    tokens: int = 0
    last_pages: set[bytes] = field(default_factory=set)


class JournalIndex:
    """Pages and sessions of one fingerprint. Its owner sees to it that one thread at a time changes it.

    Meanwhile other threads may look into `pages`, and call `closest` and `touch_session`.
    """

    def __init__(self) -> None:
        self.pages: dict[bytes, PageFile] = {}
        self.size = 0  # bytes of all pages and logs
        # parent → (tokens, key) of the pages after it, sorted: those that begin alike are neighbours.
        self._children: dict[bytes, list[tuple[bytes, bytes]]] = {}
        # Held while one page comes or goes, and while `closest` looks: whoever looks waits for no more.
        self._guard = threading.Lock()
        self._sessions: dict[str, _Session] = {}

    def add_page(self, key: bytes, page: PageFile) -> None:
        """A page is on disk."""
        self.drop_page(key)
        with self._guard:
            self.pages[key] = page
            insort(self._children.setdefault(page.parent, []), (page.packed, key))
            self.size += page.size

    def drop_page(self, key: bytes) -> PageFile | None:
        """A page is on disk no more, or about to go; what was known of it."""
        with self._guard:
            page = self.pages.pop(key, None)
            if page is None:
                return None
            self.size -= page.size
            siblings = self._children[page.parent]
            del siblings[bisect_left(siblings, (page.packed, key))]
            if not siblings:
                del self._children[page.parent]
            return page

    def add_log(self, session: str, content: LogContent) -> None:
        """A log was read."""
        for exchange in content.exchanges:
            self.add_exchange(exchange, 0, content.used)
        self._sessions[session].log_bytes = content.good_bytes
        self.size += content.good_bytes

    def add_exchange(self, exchange: Exchange, grown: int, now: float) -> None:
        """An answer was added to its session's log, which grew by `grown` bytes."""
        session = self._sessions.setdefault(exchange.session, _Session(exchange.created, now))
        session.used = max(session.used, now)
        session.log_bytes += grown
        session.exchanges += 1
        session.tokens = max(session.tokens, exchange.tokens)
        if exchange.last_page:
            session.last_pages.add(exchange.last_key)
        self.size += grown

    def touch_session(self, session: str, now: float) -> bool:
        """Note a use; False if there is no such session."""
        known = self._sessions.get(session)
        if known is not None:
            known.used = now
        return known is not None

    def drop_session(self, session: str) -> None:
        """A log is on disk no more."""
        self.size -= self._sessions.pop(session).log_bytes

    def __contains__(self, session: str) -> bool:
        return session in self._sessions

    def sessions(self) -> list[SessionInfo]:
        """All sessions, least recently used first."""
        infos = []
        for name, session in self._sessions.items():
            size = session.log_bytes + sum(self.pages[page].size for page in self._reach(session))
            infos.append(
                SessionInfo(name, session.exchanges, session.tokens, size, session.created, session.used)
            )
        return sorted(infos, key=lambda info: info.last_used)

    def unreachable_bytes(self) -> int:
        """Size of the pages that no session reaches."""
        return sum(self.pages[key].size for key in self._unreached())

    def deepest(self, chain: Iterable[bytes]) -> bytes:
        """The last page of a history, given first to last, up to which all are on disk; empty if none is."""
        last = b""
        for key in chain:
            if key not in self.pages:
                break
            last = key
        return last

    def closest(self, parent: bytes, packed: bytes) -> Found | None:
        """The page after `parent` with the most tokens in common with `packed`; of several, a short one."""
        wanted = unpack_ids(packed)
        with self._guard:
            siblings = self._children.get(parent, [])
            place = bisect_left(siblings, (packed, b""))
            best, rows = b"", 0
            for tokens, key in siblings[max(place - 1, 0) : place + 1]:
                common = common_tokens(unpack_ids(tokens), wanted)
                if common > rows:
                    best, rows = key, common
            if not rows:
                return None
            # Who ends where the agreement does is the shortest, and comes first of all that agree as far.
            alike = packed[: rows * ID_BYTES]
            tokens, key = siblings[bisect_left(siblings, (alike, b""))]
            best = key if tokens == alike else best
            return Found(best, parent, unpack_ids(self.pages[best].packed), rows)

    def ancestors(self, key: bytes) -> set[bytes]:
        """The page and all before it, as far as they are on disk."""
        found: set[bytes] = set()
        self._climb(key, found)
        return found

    def alone(self, name: str) -> Victim:
        """A session, and all pages that no other session reaches: what is left is what others know anyway.

        What no session reaches goes as well. It may hold this one's words: what was computed ahead of its
        next turn may branch from a page that it shares with others, and nothing tells whose that is.
        """
        return self._victim(self._sessions[name].used, name, self._unreached(but=name), set())

    def unreached(self) -> Victim:
        """All pages that no session reaches."""
        return self._victim(0.0, None, self._unreached(), set())

    def superseded(self) -> list[bytes]:
        """Partly filled pages whose tokens are in a longer page as well.

        They were the end of an answer, and the session went on. Each session that reaches such a page reaches
        the longer one too, and `closest` finds that instead.
        """
        longer: dict[bytes, set[bytes]] = {}
        for siblings in self._children.values():
            for place, (packed, key) in enumerate(siblings):
                by = set()
                for i in range(place + 1, len(siblings)):
                    if not siblings[i][0].startswith(packed):
                        break
                    by.add(siblings[i][1])
                if by and key not in self._children:
                    longer[key] = by
        if longer:
            for session in self._sessions.values():
                reach = self._reach(session)
                for key in [key for key in longer if key in reach and not longer[key] & reach]:
                    del longer[key]
        return list(longer)

    def victims(self, keep: set[bytes]) -> Iterator[Victim]:
        """What may go, least recently used first; each supposes that all before it went. `keep` stays."""
        used = self._last_uses()
        reach = {name: self._reach(session) for name, session in self._sessions.items()}
        holders = Counter(page for pages in reach.values() for page in pages)
        gone: set[bytes] = set()
        # At the same time of use: pages from the deepest on, then sessions.
        queue: list[tuple[float, int, str, bytes]] = []
        for name, session in self._sessions.items():
            latest = max((used[page] for page in session.last_pages if page in used), default=session.used)
            queue.append((max(session.used, latest), 1, name, b""))
        depth = self._depths()
        queue += [(used[key], -depth[key], "", key) for key in self.pages if key not in holders]
        for last_use, _, name, key in sorted(queue):
            if name:
                holders.subtract(reach[name])
                own = {page for page in reach[name] if not holders[page]}
                victim = self._victim(last_use, name, own - keep, gone | keep)
            elif key in gone or key in keep:
                continue
            else:
                victim = self._victim(last_use, None, {key}, gone | keep)
            gone.update(victim.pages)
            yield victim

    def _victim(self, used: float, session: str | None, pages: set[bytes], spared: set[bytes]) -> Victim:
        """`pages` and, since they are of no use without them, all pages below; but none of `spared`."""
        found: dict[bytes, None] = {}
        depth = self._depths_of(pages)
        pending = sorted(pages - spared, key=lambda key: -depth[key])
        while pending:
            key = pending.pop()
            if key not in found:
                found[key] = None
                pending += [child for _, child in self._children.get(key, ()) if child not in spared]
        return Victim(used, session, tuple(found))

    def _reach(self, session: _Session) -> set[bytes]:
        found: set[bytes] = set()
        for key in session.last_pages:
            self._climb(key, found)
        return found

    def _unreached(self, but: str | None = None) -> set[bytes]:
        """Pages that no session reaches; with `but`, none but that one."""
        others = (session for name, session in self._sessions.items() if name != but)
        return set(self.pages).difference(*(self._reach(session) for session in others))

    def _climb(self, key: bytes, found: set[bytes]) -> None:
        while key not in found and (page := self.pages.get(key)) is not None:
            found.add(key)
            key = page.parent

    def _depths(self) -> dict[bytes, int]:
        return self._depths_of(self.pages)

    def _depths_of(self, keys: Iterable[bytes]) -> dict[bytes, int]:
        """Pages on disk before each of `keys`. Keys are hashes of their parents, so there is no cycle."""
        depths: dict[bytes, int] = {}
        for start in keys:
            path = []
            key = start
            while key not in depths and key in self.pages:
                path.append(key)
                key = self.pages[key].parent
            depth = depths.get(key, -1)
            for key in reversed(path):
                depth += 1
                depths[key] = depth
        return depths

    def _last_uses(self) -> dict[bytes, float]:
        """When each page, or one below it, was used last."""
        depths = self._depths()
        used = {key: page.used for key, page in self.pages.items()}
        for key in sorted(depths, key=lambda key: -depths[key]):
            parent = self.pages[key].parent
            if parent in used:
                used[parent] = max(used[parent], used[key])
        return used
