"""Pages in RAM: found by scope and tokens alone, bounded, oldest first, leases last, held ones never."""

from __future__ import annotations

from collections import Counter
from itertools import takewhile

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from k2hybrid.cache.host_pages import HostPage, HostPages
from k2hybrid.cache.page_keys import next_key, pack_ids, page_keys, root_key
from k2hybrid.errors import EngineError

SIZE = 4
NEVER = float("-inf")
Page = HostPage[str]


def host(capacity: int) -> HostPages[str]:
    return HostPages([f"buffer {n}" for n in range(capacity)])


def put(
    pages: HostPages[str], ids: list[int], scope: str = "s", *, until: float = NEVER, now: float = 0.0
) -> list[Page]:
    """All pages of a history, first to last, as far as there is room."""
    added = []
    for key in page_keys(scope, ids, SIZE):
        chunk = tuple(ids[key.start : key.stop])
        if not pages.known(key.parent, chunk, until):
            page = pages.add(key.key, key.parent, chunk, until, now)
            if page is not None:
                pages.release(page)
                added.append(page)
    return added


def rows(pages: HostPages[str], ids: list[int], scope: str = "s") -> list[int]:
    """Rows found of each page of a history."""
    found = []
    parent = root_key(scope)
    for start in range(0, len(ids), SIZE):
        chunk = ids[start : start + SIZE]
        closest = pages.closest(parent, chunk)
        found.append(closest.rows if closest else 0)
        parent = next_key(parent, pack_ids(chunk))
    return found


def test_a_page_is_found_for_its_own_prefix_and_scope_alone() -> None:
    pages = host(8)
    put(pages, [1, 2, 3, 4, 5, 6, 7, 8])
    assert rows(pages, [1, 2, 3, 4, 5, 6, 7, 8]) == [4, 4]
    assert rows(pages, [1, 2, 3, 4, 5, 6, 9]) == [4, 2]
    assert rows(pages, [9, 2, 3, 4, 5, 6, 7, 8]) == [0, 0]
    assert rows(pages, [5, 6, 7, 8]) == [0]
    assert rows(pages, [1, 2, 3, 4, 5, 6, 7, 8], "another key's") == [0, 0]
    assert rows(pages, [1, 2, 3, 4], "") == [0]


def test_the_page_with_most_in_common_is_found() -> None:
    pages = host(8)
    for last in ([1, 1, 1, 1], [1, 2, 1, 1], [1, 2, 3, 1], [2, 2, 3, 4]):
        put(pages, last)
    parent = root_key("s")
    for wanted, ids, count in (
        ([1, 2, 3, 4], (1, 2, 3, 1), 3),
        ([1, 2, 2, 2], (1, 2, 1, 1), 2),
        ([1, 0, 0, 0], (1, 1, 1, 1), 1),
        ([2, 2, 3, 4], (2, 2, 3, 4), 4),
    ):
        found = pages.closest(parent, wanted)
        assert found is not None
        assert found.rows == count
        assert found.ids[:count] == ids[:count]
    assert pages.closest(parent, [3]) is None


def test_a_longer_page_takes_the_place_of_its_beginning_and_of_its_lease() -> None:
    pages = host(8)
    put(pages, [1, 2], until=50.0)
    assert put(pages, [1]) == []
    (longer,) = put(pages, [1, 2, 3])
    assert len(pages) == 1
    assert longer.until == 50.0
    assert rows(pages, [1, 2, 3, 4]) == [3]
    put(pages, [1, 2, 4])
    assert len(pages) == 2


def test_a_beginning_that_is_read_stays_beside_the_longer_page() -> None:
    pages = host(8)
    (shorter,) = put(pages, [1, 2])
    pages.hold(shorter)
    put(pages, [1, 2, 3])
    assert shorter.here
    assert rows(pages, [1, 2, 3]) == [3]
    pages.release(shorter)
    assert pages.check(Counter()) == []


def test_the_least_recently_used_goes_first() -> None:
    pages = host(3)
    for token in (1, 2, 3):
        put(pages, [token])
    assert pages.known(root_key("s"), (1,), NEVER)
    put(pages, [4])
    assert [rows(pages, [token]) for token in (1, 2, 3, 4)] == [[1], [0], [1], [1]]
    assert pages.lost == 1


def test_what_is_in_the_pool_again_goes_before_others_its_end_first() -> None:
    pages = host(4)
    old = put(pages, [9, 9])
    chain = put(pages, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    pages.spare(chain)
    put(pages, [7])
    assert rows(pages, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == [4, 4, 0]
    put(pages, [8])
    assert rows(pages, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == [4, 0, 0]
    assert old[0].here


def test_leases_go_last_the_first_to_end_first_and_not_for_what_is_leased_for_less() -> None:
    pages = host(2)
    put(pages, [1], until=20.0)
    put(pages, [2], until=30.0)
    put(pages, [3])  # no room
    put(pages, [4], until=10.0)  # none either
    assert [rows(pages, [token]) for token in (1, 2, 3, 4)] == [[1], [1], [0], [0]]
    put(pages, [5], until=25.0)
    assert [rows(pages, [token]) for token in (1, 2, 5)] == [[0], [1], [1]]
    assert pages.broken_leases == 1
    put(pages, [6], now=27.0)  # that lease is over
    assert [rows(pages, [token]) for token in (2, 5, 6)] == [[1], [0], [1]]
    assert pages.broken_leases == 1


def test_a_lease_is_prolonged_and_never_cut() -> None:
    pages = host(2)
    chain = put(pages, [1, 2, 3, 4, 5])
    pages.lease(chain, 50.0)
    pages.lease(chain, 40.0)
    put(pages, [7], now=45.0)
    assert rows(pages, [1, 2, 3, 4, 5]) == [4, 1]
    put(pages, [7], now=50.0)
    assert rows(pages, [1, 2, 3, 4, 5]) == [4, 0]  # its end is the first to go


def test_a_held_page_stays_and_its_buffer_too_when_it_is_forgotten() -> None:
    pages = host(1)
    (page,) = put(pages, [1])
    pages.hold(page)
    assert put(pages, [2]) == []
    pages.drop(page)
    assert rows(pages, [1]) == [0]
    assert put(pages, [2]) == []
    assert pages.check(Counter({page: 1})) == []
    pages.release(page)
    (other,) = put(pages, [2])
    assert other.buffer == page.buffer
    with pytest.raises(EngineError, match="more often"):
        pages.release(other)


def test_a_page_that_was_held_can_go_again() -> None:
    pages = host(2)
    (page,) = put(pages, [1])
    pages.hold(page)
    put(pages, [2])
    put(pages, [3])
    assert page.here
    pages.release(page)
    put(pages, [4])
    assert not page.here


def test_check_tells_who_is_wrong() -> None:
    pages = host(2)
    (page,) = put(pages, [1])
    assert pages.check(Counter()) == []
    pages.hold(page)
    assert pages.check(Counter()) == ["a page in RAM: 1 holds, 0 expected"]
    pages.release(page)
    pages._free.pop()
    assert "0 free + 1 used ≠ 2" in pages.check(Counter())[0]


class Histories(RuleBasedStateMachine):
    """Against a plain list of pages, searched whole each time."""

    CAPACITY = 4

    def __init__(self) -> None:
        super().__init__()
        self.pages = host(self.CAPACITY)
        self.now = 0.0
        self.known: list[Page] = []  # as they ought to be found, in the order of their use
        self.held: list[Page] = []

    ids = st.lists(st.integers(0, 1), min_size=1, max_size=SIZE).map(tuple)
    parents = st.sampled_from([root_key("a"), root_key("b"), b"some page"])
    leases = st.sampled_from([NEVER, NEVER, 3.0, 6.0])

    @rule(parent=parents, ids=ids, lease=leases)
    def enter(self, parent: bytes, ids: tuple[int, ...], lease: float) -> None:
        until = self.now + lease
        longer = [p for p in self.known if p.parent == parent and p.ids[: len(ids)] == ids]
        assert self.pages.known(parent, ids, until) == bool(longer)
        if longer:
            used = max(longer, key=lambda p: p.used)
            self.known.remove(used)
            self.known.append(used)
            return
        before = list(self.known)
        page = self.pages.add(next_key(parent, pack_ids(ids)), parent, ids, until, self.now)
        gone = [p for p in before if not p.here]
        for p in gone:
            self.known.remove(p)
            assert p not in self.held
        victims = [p for p in gone if not (p.parent == parent and ids[: len(p.ids)] == p.ids)]
        assert len(victims) <= 1
        loose = [p for p in before if p not in self.held]
        idle = [p for p in loose if p.until <= self.now]
        if victims:
            assert len(before) + len({*self.held} - {*before}) == self.CAPACITY
            if idle:
                assert victims == idle[:1]
            else:
                assert victims[0].until == min(p.until for p in loose) <= until
        elif page is None:
            assert not idle
            assert all(p.until > until for p in loose)
        if page is not None:
            assert page.buffer not in {p.buffer for p in [*self.known, *self.held]}
            self.known.append(page)
            self.held.append(page)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.known))
        self.pages.hold(page)
        self.held.append(page)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), times=st.integers(1, 3))
    def release(self, data: st.DataObject, times: int) -> None:
        for _ in range(min(times, len(self.held))):
            page = data.draw(st.sampled_from(self.held))
            self.held.remove(page)
            self.pages.release(page)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.known))
        self.pages.drop(page)
        self.known.remove(page)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), spare=st.booleans(), lease=leases)
    def use(self, data: st.DataObject, spare: bool, lease: float) -> None:
        chain = data.draw(st.lists(st.sampled_from(self.known), unique=True, max_size=3))
        rest = [page for page in self.known if page not in chain]
        if spare:
            self.pages.spare(chain)
            self.known = chain[::-1] + rest
        else:
            self.pages.lease(chain, self.now + lease)
            self.known = rest + chain[::-1]

    @rule(seconds=st.integers(1, 4))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule(parent=parents, ids=ids)
    def look(self, parent: bytes, ids: tuple[int, ...]) -> None:
        found = self.pages.closest(parent, ids)
        common = [
            len(list(takewhile(lambda pair: pair[0] == pair[1], zip(p.ids, ids, strict=False))))
            for p in self.known
            if p.parent == parent
        ]
        assert (found.rows if found else 0) == max(common, default=0)

    @invariant()
    def counts_add_up(self) -> None:
        assert self.pages.check(Counter(self.held)) == []
        assert len(self.pages) == len(self.known)
        assert all(self.pages.get(page.key) is page for page in self.known)


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
