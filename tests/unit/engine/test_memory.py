"""Pages of sequences: in place or copied, reserved, published, leased, pinned; and what `check` proves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from k2hybrid.cache.host_pages import HostPages
from k2hybrid.cache.page_keys import page_keys
from k2hybrid.engine.memory import PageMemory
from k2hybrid.engine.scheduler import pages_for
from k2hybrid.engine.sequence import Sequence
from k2hybrid.engine.spill import Spill
from k2hybrid.errors import CapacityError, EngineError
from tests.unit.engine.fakes import FakeMover, FakePages

SIZE = 4


class Rows(FakePages):
    """Remembers copies, and can be told to fail."""

    def __init__(self, pages: int) -> None:
        super().__init__(pages, SIZE)
        self.copies: list[tuple[int, int, int]] = []
        self.broken = False

    def copy_rows(self, src: int, dst: int, rows: int) -> None:
        if self.broken:
            raise OSError("planned")
        if min(self.refcount(src), self.refcount(dst)) < 1:
            raise EngineError("rows of a free page are copied")
        self.copies.append((src, dst, rows))
        self.tokens[dst][:rows] = self.tokens[src][:rows]


class Desk:
    """A memory whose sequences are run by hand."""

    def __init__(self, pages: int) -> None:
        self.pool = Rows(pages)
        self.memory = PageMemory(self.pool, SIZE)
        self.clock = 100.0
        self.memory.now = lambda: self.clock

    def sequence(self, ids: list[int], output: int = 1, scope: str = "", *, reuse: bool = True) -> Sequence:
        job = SimpleNamespace(scope=scope, reuse=reuse, request_id="test", background=False)
        return Sequence(
            number=0,
            job=cast(Any, job),
            sampler=cast(Any, None),
            ids=list(ids),
            prompt_tokens=len(ids),
            most_pages=pages_for(len(ids) + output, SIZE),
        )

    def admit(self, ids: list[int], output: int = 1, scope: str = "") -> Sequence:
        sequence = self.sequence(ids, output, scope)
        assert self.memory.admit(sequence)
        self.memory.check()
        return sequence

    def run(self, sequence: Sequence, tokens: int | None = None) -> Sequence:
        """Compute up to so many tokens, all if not told."""
        stop = len(sequence.ids) if tokens is None else tokens
        self.memory.grow(sequence, stop)
        for t in range(sequence.computed, stop):
            self.pool.tokens[sequence.pages[t // SIZE]][t % SIZE] = sequence.ids[t]
        sequence.computed = stop
        self.memory.check()
        return sequence

    def publish(self, sequence: Sequence) -> Sequence:
        self.memory.publish(sequence)
        self.memory.check()
        return sequence

    def leave(self, sequence: Sequence, *, publish: bool = True) -> None:
        if publish:
            self.memory.publish(sequence)
        self.memory.leave(sequence)
        self.memory.check()

    def done(self, ids: list[int], scope: str = "") -> list[int]:
        """A finished request with these tokens; its pages."""
        sequence = self.run(self.admit(ids, 1, scope))
        self.publish(sequence)
        pages = sequence.pages
        self.leave(sequence)
        return pages

    def reads(self, sequence: Sequence) -> list[int]:
        """The computed tokens, as they lie in the pages."""
        return [self.pool.tokens[sequence.pages[t // SIZE]][t % SIZE] for t in range(sequence.computed)]


# --- admission ----------------------------------------------------------------------------------------


def test_every_page_is_used_or_kept_or_free() -> None:
    desk = Desk(8)

    def dealt() -> tuple[int, int, int]:
        found = desk.memory.snapshot()
        assert (found["pages"], found["page_tokens"]) == (8, SIZE)
        return found["used"], found["kept"], found["free"]

    assert dealt() == (0, 0, 8)
    desk.done(list(range(2 * SIZE)))
    assert dealt() == (0, 2, 6)
    running = desk.run(desk.admit([*range(2 * SIZE), 50, 51]))  # reads the two that are kept
    assert dealt() == (3, 0, 5)
    desk.leave(running)
    assert dealt() == (0, 3, 5)


def test_a_conversation_goes_on_in_place() -> None:
    desk = Desk(8)
    pages = desk.done([1, 2, 3, 4, 5, 6])
    sequence = desk.admit([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert sequence.pages == pages
    assert (sequence.computed, sequence.cached_tokens) == (6, 6)
    assert desk.pool.copies == []
    desk.publish(desk.run(sequence))
    assert desk.reads(sequence) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert desk.memory.tree.match([1, 2, 3, 4, 5, 6, 7, 8, 9]).tokens == 9
    assert len(desk.memory.tree) == 3


def test_rows_that_somebody_else_claims_are_copied() -> None:
    desk = Desk(8)
    pages = desk.done([1, 2, 3, 4, 5, 6, 7])
    other = desk.admit([1, 2, 3, 4, 5, 9])
    assert other.pages[0] == pages[0]
    assert other.pages[1] not in pages
    assert other.computed == other.cached_tokens == 5
    assert desk.pool.copies == [(pages[1], other.pages[1], 1)]
    desk.publish(desk.run(other))
    assert desk.reads(other) == [1, 2, 3, 4, 5, 9]
    assert desk.pool.tokens[pages[1]][:3] == [5, 6, 7]
    for ids in ([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 9]):
        assert desk.memory.tree.match(ids).tokens == len(ids)


def test_a_full_page_that_agrees_in_part_is_copied_in_part() -> None:
    desk = Desk(8)
    pages = desk.done([1, 2, 3, 4])
    other = desk.admit([1, 2, 3, 9, 9])
    assert other.computed == 3
    assert desk.pool.copies == [(pages[0], other.pages[0], 3)]


def test_the_last_token_is_always_computed() -> None:
    desk = Desk(8)
    pages = desk.done([1, 2, 3, 4, 5, 6, 7, 8])
    again = desk.admit([1, 2, 3, 4, 5, 6, 7, 8])
    assert again.computed == 7
    assert desk.pool.copies == [(pages[1], again.pages[1], 3)]
    desk.publish(desk.run(again))
    assert again.pages == pages  # the tree's page won, the copy is free again
    assert desk.pool.free_pages == 6


def test_a_page_that_a_running_sequence_goes_on_writing_is_copied() -> None:
    desk = Desk(8)
    first = desk.publish(desk.run(desk.admit([1, 2, 3, 4, 5, 6], 8)))
    second = desk.admit([1, 2, 3, 4, 5, 6, 7], 8)
    assert second.computed == 6
    assert desk.pool.copies == [(first.pages[1], second.pages[1], 2)]
    first.ids += [8, 8]
    desk.publish(desk.run(first))
    desk.publish(desk.run(second))
    assert desk.reads(first) == [1, 2, 3, 4, 5, 6, 8, 8]
    assert desk.reads(second) == [1, 2, 3, 4, 5, 6, 7]


def test_two_that_go_on_from_the_same_end_take_place_and_copy() -> None:
    desk = Desk(8)
    pages = desk.done([1, 2])
    first, second = desk.admit([1, 2, 5]), desk.admit([1, 2, 6])
    assert first.pages == pages
    assert second.pages != pages
    assert desk.pool.copies == [(pages[0], second.pages[0], 2)]


def test_what_failed_leaves_the_claimed_rows_to_the_next() -> None:
    desk = Desk(8)
    pages = desk.done([1, 2])
    desk.leave(desk.run(desk.admit([1, 2, 5])), publish=False)
    follower = desk.run(desk.admit([1, 2, 6, 7]))
    assert follower.pages == pages
    assert desk.reads(follower) == [1, 2, 6, 7]


def test_scopes_share_nothing_and_reuse_can_be_declined() -> None:
    desk = Desk(8)
    desk.done([1, 2, 3, 4, 5], "one")
    assert desk.admit([1, 2, 3, 4, 5, 6], scope="other").computed == 0
    declined = desk.sequence([1, 2, 3, 4, 5, 6], scope="one", reuse=False)
    assert desk.memory.admit(declined)
    assert (declined.computed, declined.pages) == (0, [])
    assert desk.admit([1, 2, 3, 4, 5, 6], scope="one").computed == 5


# --- the promise --------------------------------------------------------------------------------------


def test_the_copy_takes_its_page_from_the_reservation() -> None:
    desk = Desk(4)
    desk.done([1, 2, 3, 4])
    before = desk.memory.available_pages
    sequence = desk.admit([1, 2, 9], 5)
    assert desk.memory.available_pages == before - sequence.reserved_pages == 2
    assert len(sequence.pages) == 1
    desk.leave(sequence, publish=False)
    assert desk.memory.available_pages == 4


def test_where_there_is_no_room_for_the_source_nothing_is_copied() -> None:
    desk = Desk(3)
    desk.done([1, 2, 3, 4, 5, 6, 7])
    # All three pages are reserved: the source and its copy cannot be held at once.
    sequence = desk.admit([1, 2, 3, 4, 5, 6, 9], 5)
    assert sequence.computed == 4
    assert desk.pool.copies == []
    desk.leave(desk.publish(desk.run(sequence)))
    # In place needs no second page.
    sequence = desk.admit([1, 2, 3, 4, 5, 6, 9, 9], 4)
    assert sequence.computed == 7


def test_neither_the_source_nor_the_matched_pages_make_room_for_the_copy() -> None:
    desk = Desk(4)
    old = desk.done([8, 8, 8, 8])
    pages = desk.done([1, 2, 3, 4, 5, 6, 7])
    sequence = desk.admit([9], 1)
    desk.run(sequence)
    assert desk.pool.free_pages == 0
    desk.memory.lease("", [8, 8, 8, 8], 60.0)  # it goes nevertheless, for the others are held
    copying = desk.admit([1, 2, 3, 4, 5, 6, 9], 1)
    assert copying.pages == [pages[0], old[0]]
    assert desk.pool.copies == [(pages[1], old[0], 2)]
    assert desk.reads(copying) == [1, 2, 3, 4, 5, 6]
    assert desk.memory.tree.broken_leases == 1


def test_who_must_wait_changes_nothing() -> None:
    desk = Desk(4)
    desk.done([1, 2, 3, 4, 5])
    running = desk.admit([7], 7)
    available = desk.memory.available_pages
    waiting = desk.sequence([1, 2, 3, 4, 5, 6], 8)
    assert not desk.memory.admit(waiting)
    desk.memory.check()
    assert desk.memory.available_pages == available
    assert waiting.pages == []
    assert waiting.computed == 0
    desk.leave(running, publish=False)
    assert desk.memory.admit(waiting)


def test_a_failing_copy_undoes_the_admission() -> None:
    desk = Desk(6)
    desk.done([1, 2, 3, 4, 5, 6])
    desk.pool.broken = True
    available, free = desk.memory.available_pages, desk.pool.free_pages
    sequence = desk.sequence([1, 2, 3, 4, 5, 9])
    with pytest.raises(OSError, match="planned"):
        desk.memory.admit(sequence)
    desk.memory.check()
    assert (desk.memory.available_pages, desk.pool.free_pages) == (available, free)
    assert sequence.pages == []


def test_growing_beyond_the_reservation_is_an_error() -> None:
    desk = Desk(4)
    sequence = desk.admit([1, 2, 3])
    with pytest.raises(EngineError, match="promised 1"):
        desk.memory.grow(sequence, 5)


@pytest.mark.parametrize(("running", "pinned"), [(False, False), (True, False), (False, True)])
def test_the_partly_filled_page_can_be_given_back(running: bool, pinned: bool) -> None:
    desk = Desk(4)
    first = desk.publish(desk.run(desk.admit([1, 2, 3, 4, 5, 6])))
    pages = first.pages
    if pinned:
        desk.memory.pin(pages[1:])
    if not running:
        desk.leave(first)
    sequence = desk.admit([1, 2, 3, 4, 5, 6, 7])
    available = desk.memory.available_pages
    desk.memory.drop_partial(sequence)
    desk.memory.check()
    assert desk.memory.available_pages == available
    assert (sequence.computed, sequence.cached_tokens, sequence.pages) == (4, 4, pages[:1])
    desk.memory.drop_partial(sequence)  # nothing is left to drop
    assert sequence.computed == 4
    desk.publish(desk.run(sequence))
    assert desk.reads(sequence) == [1, 2, 3, 4, 5, 6, 7]
    assert desk.pool.tokens[pages[1]][:2] == [5, 6]


# --- leases -------------------------------------------------------------------------------------------


def test_a_lease_outlives_newer_prefixes_until_it_ends() -> None:
    desk = Desk(4)
    desk.done([1, 2, 3, 4, 5], "s")
    desk.memory.lease("s", [1, 2, 3, 4, 5], 60.0)
    desk.done([7, 7])
    desk.done([8, 8])
    desk.leave(desk.run(desk.admit([9, 9, 9, 9, 9], 1)))
    assert desk.memory.tree.match([1, 2, 3, 4, 5], "s").tokens == 5
    assert desk.memory.tree.broken_leases == 0
    desk.clock += 60.0
    desk.memory.tree.match([9, 9, 9, 9, 9])
    desk.leave(desk.run(desk.admit([6], 1)))
    assert desk.memory.tree.match([1, 2, 3, 4, 5], "s").tokens == 4
    assert desk.memory.tree.broken_leases == 0


def test_a_running_sequence_breaks_leases_rather_than_fail() -> None:
    desk = Desk(2)
    desk.done([1, 2, 3, 4, 5])
    desk.memory.lease("", [1, 2, 3, 4, 5], 60.0)
    desk.leave(desk.run(desk.admit([9, 9, 9, 9, 9], 1)))
    assert desk.memory.tree.broken_leases == 2


# --- pins ---------------------------------------------------------------------------------------------


def test_pinned_pages_count_as_held() -> None:
    desk = Desk(4)
    pages = desk.done([1, 2, 3, 4, 5])
    assert desk.memory.available_pages == 4
    desk.memory.pin(pages)
    desk.memory.pin(pages[:1])
    desk.memory.check()
    assert desk.memory.available_pages == 2
    assert not desk.memory.admit(desk.sequence([9], 11))
    desk.memory.unpin(pages)
    desk.memory.check()
    assert desk.memory.available_pages == 3
    desk.memory.unpin(pages[:1])
    assert desk.memory.available_pages == 4
    with pytest.raises(EngineError, match="more often"):
        desk.memory.unpin(pages[:1])
    with pytest.raises(EngineError, match="free"):
        desk.memory.pin([3])
    desk.memory.check()


def test_a_pin_outlives_its_sequence() -> None:
    desk = Desk(2)
    sequence = desk.run(desk.admit([1, 2, 3]))
    pages = sequence.pages
    desk.memory.pin(pages)
    desk.leave(sequence, publish=False)
    assert desk.pool.free_pages == 1
    desk.memory.unpin(pages)
    desk.memory.check()
    assert desk.pool.free_pages == 2


def test_a_pinned_page_is_not_continued_in_place() -> None:
    desk = Desk(4)
    pages = desk.done([1, 2])
    desk.memory.pin(pages)
    sequence = desk.publish(desk.run(desk.admit([1, 2, 3])))
    assert desk.pool.copies == [(pages[0], sequence.pages[0], 2)]
    desk.leave(sequence)
    desk.memory.unpin(pages)
    desk.memory.check()


def test_pages_that_are_promised_cannot_be_pinned_unless_they_are_held() -> None:
    desk = Desk(3)
    pages = desk.done([1, 2, 3, 4])
    running = desk.run(desk.admit([9], 11))
    with pytest.raises(CapacityError, match="cannot be pinned"):
        desk.memory.pin([*running.pages, *pages])
    desk.memory.check()
    desk.memory.pin(running.pages)
    desk.memory.check()
    assert desk.memory.available_pages == 0


def test_a_page_pinned_without_its_path_does_not_break_the_promise() -> None:
    desk = Desk(3)
    pages = desk.done([1, 2, 3, 4, 5, 6, 7, 8, 9])
    desk.memory.pin(pages[2:])
    sequence = desk.run(desk.admit([7] * 7))  # takes the two pages above
    assert sorted(sequence.pages) == sorted(pages[:2])
    assert len(desk.memory.tree) == 0
    desk.leave(sequence)
    desk.memory.unpin(pages[2:])
    desk.memory.check()


def test_a_pinned_page_that_the_tree_has_elsewhere_is_given_up_only_where_there_is_room() -> None:
    desk = Desk(4)
    own = desk.publish(desk.run(desk.admit([1, 2, 3], 5)))
    desk.memory.pin(own.pages)
    desk.done([1, 2, 3, 4])
    blocker = desk.admit([9], 4)
    assert desk.memory.available_pages == 0
    own.ids += [4, 5]
    page = own.pages[0]
    desk.publish(desk.run(own))
    assert own.pages[0] == page  # the tree's page could not be held beside the pinned one
    desk.leave(blocker, publish=False)
    desk.publish(own)
    assert own.pages[0] != page
    assert desk.memory.tree.match([1, 2, 3, 4, 5]).pages == own.pages[:1]
    desk.memory.unpin([page])
    desk.memory.check()


# --- pages that leave for RAM --------------------------------------------------------------------------


class SpillDesk(Desk):
    """With RAM beside the pool; copies are made when they are waited for."""

    def __init__(self, pages: int, ram_pages: int = 16) -> None:
        super().__init__(pages)
        self.mover = FakeMover(self.pool)
        host = HostPages(self.mover.room(ram_pages))
        self.spill = Spill(host, self.mover, self.pool, page_tokens=SIZE)
        self.memory = PageMemory(self.pool, SIZE, self.spill)
        self.memory.now = lambda: self.clock


def test_a_page_is_free_once_it_is_copied_and_promised_before() -> None:
    desk = SpillDesk(4)
    desk.done([1, 2, 3, 4, 5, 6, 7, 8])
    desk.memory.make_room(4)
    desk.memory.check()
    assert (desk.pool.free_pages, len(desk.memory.tree), desk.memory.available_pages) == (2, 0, 4)
    desk.mover.run(1)
    desk.memory.make_room(0)
    desk.memory.check()
    assert desk.pool.free_pages == 4
    assert desk.spill.host.get(page_keys("", [1, 2, 3, 4], SIZE)[0].key) is not None


def test_who_needs_a_page_waits_for_its_copy_and_no_more_leave_than_that() -> None:
    desk = SpillDesk(4)
    desk.done([1, 2, 3, 4, 5, 6, 7, 8, 9])
    desk.memory.make_room(2)
    assert len(desk.memory.tree) == 2
    sequence = desk.run(desk.admit([7, 7, 7, 7, 7, 7, 7]))
    assert desk.mover.copied == 1
    assert len(desk.memory.tree) == 2
    assert desk.reads(sequence) == [7] * 7
    assert next(iter(desk.spill.host._pages.values())).buffer[0] == 9


def test_pages_that_are_still_copied_can_be_held_without_waiting() -> None:
    desk = SpillDesk(2)
    desk.done([1, 2, 3, 4, 5, 6, 7])
    sequence = desk.admit([9] * 7)
    sequence.fetching = True
    desk.memory.grow(sequence, 7, ready=False)
    desk.memory.check()
    assert desk.mover.copied == 0
    assert len(sequence.pages) == 2
    (copy,) = desk.memory.leaving(sequence.pages)
    assert desk.memory.available_pages == 0
    sequence.fetching = False
    with pytest.raises(EngineError, match="written while it is copied"):
        desk.memory.check()
    assert copy.exception() is None
    desk.memory.check()
    desk.run(sequence)
    assert sorted(page.buffer for page in desk.spill.host._pages.values()) == [[1, 2, 3, 4], [5, 6, 7, -1]]


def test_what_ram_has_already_leaves_without_a_copy() -> None:
    desk = SpillDesk(2)
    for _ in range(3):
        desk.done([1, 2, 3, 4, 5])
        desk.memory.make_room(2)
        desk.mover.run(9)
        desk.memory.make_room(2)
        assert desk.pool.free_pages == 2
    assert desk.mover.copied == 1


def test_where_ram_is_small_the_beginning_of_what_leaves_at_once_is_kept() -> None:
    desk = SpillDesk(5, 2)
    desk.done(list(range(14)))
    desk.memory.make_room(5)
    while desk.spill.wait():
        pass
    kept = [page_keys("", list(range(14)), SIZE)[n].key for n in (0, 1)]
    assert [desk.spill.host.get(key) is not None for key in kept] == [True, True]


def test_no_page_leaves_ahead_of_need_that_ram_does_not_take() -> None:
    desk = SpillDesk(4, 1)
    desk.done([1, 2])
    desk.memory.lease("", [1, 2], 60.0)
    desk.memory.make_room(4)
    desk.mover.run(9)
    desk.done([3, 4])
    desk.memory.make_room(4)
    desk.memory.check()
    assert desk.memory.tree.match([3, 4]).tokens == 2
    desk.run(desk.admit([9] * 15))  # need is another matter
    assert desk.memory.tree.match([3, 4]).tokens == 0


# --- check --------------------------------------------------------------------------------------------


def test_check_finds_two_that_write_the_same_page() -> None:
    desk = Desk(4)
    first, second = desk.run(desk.admit([1, 2])), desk.run(desk.admit([5, 6]))
    page = first.pages[0]
    desk.memory._hold([page])
    desk.memory._drop(second.pages)
    second.pages = [page]
    with pytest.raises(EngineError, match=rf"page {page}: one sequence writes it and 2 hold it"):
        desk.memory.check()


def test_check_finds_claims_on_rows_to_be_written() -> None:
    desk = Desk(4)
    sequence = desk.publish(desk.run(desk.admit([1, 2, 3])))
    sequence.computed = 2
    with pytest.raises(EngineError, match="3 rows claimed, 2 computed"):
        desk.memory.check()


def test_check_finds_lost_and_forgotten_pages() -> None:
    desk = Desk(4)
    sequence = desk.run(desk.admit([1, 2, 3], 9))
    page = sequence.pages[0]
    desk.pool.retain([page])
    with pytest.raises(EngineError, match="2 references, 1 expected"):
        desk.memory.check()
    desk.pool.release([page])
    desk.memory._owed -= 1
    with pytest.raises(EngineError, match="owed"):
        desk.memory.check()
    desk.memory._owed += 1
    sequence.pages = []
    with pytest.raises(EngineError, match="1 holders, 0 expected"):
        desk.memory.check()
    sequence.pages = [page]
    desk.pool.allocate(1)
    with pytest.raises(EngineError, match="≠ 4 pages"):
        desk.memory.check()
