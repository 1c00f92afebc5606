"""Pages that left the pool come back from RAM or disk: what is prefilled is what is new, to the token."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from k2hybrid.cache.page_keys import page_keys
from k2hybrid.config import RuntimeConfig
from k2hybrid.engine import archive, spill
from k2hybrid.engine.archive import Archive
from k2hybrid.engine.engine import Engine
from k2hybrid.types import Job
from tests.unit.engine.fakes import (
    GREEDY,
    SIZES,
    VOCAB,
    Collector,
    Deferred,
    FakeJournal,
    FakeModel,
    FakeMover,
    FakePages,
    StopAt,
    archive_for,
    expected_tokens,
)

CONTEXT = 256
POOL = 16


class Bench:
    """An engine over a small pool, whose copies and reads are made when they are told to."""

    def __init__(
        self, ram_pages: int | None = 64, journal: FakeJournal | None = None, pool: int = POOL, **options: Any
    ) -> None:
        self.pages = FakePages(pool)
        self.model = FakeModel(self.pages)
        self.mover = FakeMover(self.pages)
        self.archive = archive_for(self.pages, ram_pages, journal, self.mover)
        self.worker = Deferred()
        self.archive._worker.shutdown()
        self.archive._worker = self.worker  # type: ignore[assignment]
        self.engine = Engine(
            self.model,
            self.pages,
            sizes=SIZES,
            vocab_size=VOCAB,
            context_tokens=CONTEXT,
            config=RuntimeConfig(max_step_tokens=8, max_running=3, **options),
            archive=self.archive,
        )

    def submit(self, ids: list[int], max_tokens: int = 1, **options: Any) -> tuple[Collector, Any]:
        sink = Collector()
        return sink, self.engine.submit(Job(tuple(ids), GREEDY, max_tokens, StopAt(), sink, **options))

    def drain(self) -> None:
        """Until nothing is left to do."""
        while self.engine.tick() or self.worker.tasks:
            self.engine.check()
            self.worker.run()
        self.engine.check()

    def run(self, ids: list[int], max_tokens: int = 1, **options: Any) -> int:
        """Have a request answered rightly; tokens that it prefilled."""
        before = self.model.tokens_run
        sink, _ = self.submit(ids, max_tokens, **options)
        self.drain()
        assert sink.tokens == expected_tokens(ids, max_tokens)
        assert sink.done is not None
        assert sink.done.usage.cached_tokens == len(ids) - (self.model.tokens_run - before - max_tokens + 1)
        return self.model.tokens_run - before - max_tokens + 1

    def crowd(self) -> None:
        """Other requests, that take the whole pool."""
        for begin in (50, 60):
            assert self.run([begin, *range(POOL * 4 - 3)], scope="crowd") > 0


@pytest.fixture(autouse=True, params=[1, 3, 8])
def batch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Pages that are copied together."""
    pages: int = request.param
    monkeypatch.setattr(archive, "BATCH", pages)
    monkeypatch.setattr(spill, "BATCH", pages)
    return pages


HISTORY = [(7 * n) % VOCAB for n in range(30)]  # seven pages of 4, and half a page


def test_a_session_that_was_pushed_out_costs_what_is_new() -> None:
    bench = Bench()
    assert bench.run(HISTORY) == 30
    bench.crowd()
    assert bench.engine.cached_prefix(HISTORY) == 0
    assert bench.run([*HISTORY, 1, 2, 3]) == 3
    figures = bench.engine.metrics.snapshot()
    assert figures["cached_ram_tokens"] == 30
    assert figures["pages_from_ram"] == 8
    assert figures["bytes_from_ram"] == 80
    assert figures["pages_to_ram"] >= 8
    assert figures["ram_pages"] == len(bench.archive.spill.host)  # type: ignore[union-attr]


def test_without_ram_the_same_session_is_computed_again() -> None:
    bench = Bench(ram_pages=None)
    bench.run(HISTORY)
    bench.crowd()
    assert bench.run([*HISTORY, 1, 2, 3]) == 33


@pytest.mark.parametrize("known", [*range(24, 30)])
def test_part_of_a_page_is_taken_to_the_token(known: int) -> None:
    bench = Bench()
    bench.run(HISTORY)
    bench.crowd()
    other = [*HISTORY[:known], 96, 95, 94]
    assert bench.run(other) == 3


def test_what_is_asked_again_costs_its_last_token() -> None:
    bench = Bench()
    bench.run(HISTORY)
    bench.crowd()
    assert bench.run(HISTORY) == 1


def test_generated_tokens_come_back_too() -> None:
    bench = Bench()
    bench.run(HISTORY, 12)
    said = expected_tokens(HISTORY, 12)
    bench.crowd()
    assert bench.run([*HISTORY, *said, 5]) == 2  # the last token that was said was never run


def test_other_scopes_and_requests_that_take_nothing_find_nothing() -> None:
    bench = Bench()
    bench.run(HISTORY, scope="a key")
    bench.crowd()
    assert bench.run([*HISTORY, 1], scope="another key") == 31
    bench.crowd()
    assert bench.run([*HISTORY, 1], scope="a key", reuse=False) == 31
    bench.crowd()
    assert bench.run([*HISTORY, 1, 2], scope="a key") == 1


def test_begin_in_the_pool_middle_in_ram_and_end_on_disk() -> None:
    journal = FakeJournal()
    bench = Bench(journal=journal)
    bench.run(HISTORY)
    bench.crowd()
    host = bench.archive.spill.host  # type: ignore[union-attr]
    chain = [page for page in host._pages.values() if page.ids[0] in HISTORY[::4]]
    for page in host._pages.copy().values():
        if page.ids in {tuple(HISTORY[12:16]), tuple(HISTORY[20:24]), tuple(HISTORY[28:30])}:
            host.drop(page)
    assert len(chain) > 3
    assert bench.run(HISTORY[:9]) == 1  # from now on in the pool
    reads = journal.reads
    assert bench.run([*HISTORY, 1, 2]) == 2
    assert journal.reads == reads + 3
    figures = bench.engine.metrics.snapshot()
    assert figures["cached_journal_tokens"] == 10


def computed(known: int, chunk: int = 8) -> int:
    """Of the 31 tokens of `[*HISTORY, 1]`, if so many came back and the next ones did not."""
    rest = 31 - known
    behind = 30 - known - chunk  # tokens that may come back behind the first piece that is computed
    return rest if rest <= chunk or behind < 4 else chunk + 1


def test_where_a_file_is_bad_its_piece_is_computed() -> None:
    journal = FakeJournal()
    bench = Bench(ram_pages=None, journal=journal)
    bench.run(HISTORY)
    bench.crowd()
    journal.broken = {key for key, (_, ids, _) in journal.files.items() if ids == tuple(HISTORY[12:16])}
    assert bench.run([*HISTORY, 1]) == computed(12)


def test_what_left_for_ram_is_in_the_journal_all_the_same() -> None:
    journal = FakeJournal()
    bench = Bench(journal=journal)
    bench.run(HISTORY)
    bench.crowd()
    assert {tuple(HISTORY[n : n + 4]) for n in range(0, 30, 4)} <= {
        ids for _, ids, _ in journal.files.values()
    }
    bench.run([*HISTORY, 1], store=False)
    assert not any(ids[-1:] == (1,) and len(ids) == 3 for _, ids, _ in journal.files.values())


def test_ram_that_is_too_small_keeps_the_beginning() -> None:
    bench = Bench(ram_pages=POOL + 3)
    bench.run(HISTORY)
    bench.run([50, *range(POOL * 4 - 3)], scope="crowd")
    bench.run([60, *range(8)], scope="crowd")
    assert bench.run([*HISTORY, 1]) < 31


def test_what_came_back_makes_room_in_ram_first() -> None:
    bench = Bench()
    older = [90, *HISTORY]
    for ids in (older, HISTORY):
        bench.run(ids)
        bench.crowd()
    assert bench.run([*HISTORY, 1]) == 1
    while bench.archive.spill.wait():  # type: ignore[union-attr]
        pass
    host = bench.archive.spill.host  # type: ignore[union-attr]
    for n in range(host.capacity - len(host) + 3):
        assert host.add(bytes([n]), b"else", (n,), float("-inf"), 0.0) is not None
    there = [[host.get(key.key) is not None for key in page_keys("", ids, 4)] for ids in (older, HISTORY)]
    assert there == [[True] * 8, [True] * 5 + [False] * 3]


def test_leases_hold_in_ram() -> None:
    results = {}
    for leased in (False, True):
        bench = Bench(ram_pages=18)
        clock = [100.0]
        bench.engine._memory.now = lambda clock=clock: clock[0]
        _, handle = bench.submit(HISTORY)
        bench.drain()
        if leased:
            handle.lease(60.0)
        for round_ in range(4):
            bench.run([50 + round_, *range(POOL * 4 - 3)], scope="crowd")
        results[leased] = bench.run([*HISTORY, 1])
    assert results == {False: 31, True: 1}


def test_a_lease_counts_for_what_left_before() -> None:
    bench = Bench(ram_pages=18)
    clock = [100.0]
    bench.engine._memory.now = lambda: clock[0]
    _, handle = bench.submit(HISTORY)
    bench.drain()
    bench.run([50, *range(POOL * 4 - 3)], scope="crowd")
    handle.lease(60.0)
    for round_ in range(4):
        bench.run([60 + round_, *range(POOL * 4 - 3)], scope="crowd")
    assert bench.run([*HISTORY, 1]) == 1


def test_pages_leave_before_the_pool_is_full() -> None:
    bench = Bench(pool=64)
    bench.run(HISTORY)
    assert bench.archive.traffic.pages_out == 0
    for begin in range(40, 46):
        bench.run([begin, *range(60)])
    bench.engine.tick()
    assert bench.pages.free_pages + len(bench.archive.spill.leaving) >= 64 // 8  # type: ignore[union-attr]
    while bench.mover.waiting:
        bench.mover.run(1)
    bench.engine.tick()
    assert bench.pages.free_pages >= 64 // 8
    waited: list[str] = []
    bench.mover.fails = lambda way: bool(waited.append(way))
    bench.submit([1, 2, 3])
    bench.engine.tick()
    assert waited == []


def test_a_return_waits_for_nothing_in_the_engines_thread() -> None:
    """Neither for the copies that make room, nor for its own."""
    bench = Bench()
    bench.run(HISTORY)
    bench.crowd()
    bench.drain()
    copied = bench.mover.copied
    sink, _ = bench.submit([*HISTORY, 1])
    bench.engine.tick()
    assert bench.mover.copied == copied
    assert bench.mover.waiting
    bench.engine.check()
    bench.drain()
    assert sink.tokens == expected_tokens([*HISTORY, 1], 1)


def test_others_run_while_pages_come_back() -> None:
    bench = Bench(pool=24)
    bench.run(HISTORY)
    bench.run([50, *range(90)])
    returning, _ = bench.submit([*HISTORY, 1])
    other, _ = bench.submit([3, 4], 4)
    while bench.engine.tick():
        bench.engine.check()
    assert other.tokens == expected_tokens([3, 4], 4)
    assert returning.tokens == []
    bench.drain()
    assert returning.tokens == expected_tokens([*HISTORY, 1], 1)


def test_a_page_that_is_still_on_its_way_out_can_come_back(batch: int) -> None:
    bench = Bench()
    bench.run(HISTORY)
    bench.engine._memory.tree.evict(5)
    bench.archive.spill.begin()  # type: ignore[union-attr]
    assert bench.mover.waiting == -(-5 // batch)
    assert bench.run([*HISTORY, 1]) == 1


@pytest.mark.parametrize("fails_at", range(8))
def test_a_copy_that_fails_on_its_way_back_costs_its_piece(fails_at: int, batch: int) -> None:
    if fails_at * batch >= 8:
        return
    bench = Bench()
    bench.run(HISTORY)
    bench.crowd()
    bench.mover.run(100)
    ways: list[str] = []

    def fails(way: str) -> bool:
        ways.append(way)
        return way == "in" and ways.count("in") == fails_at + 1

    bench.mover.fails = fails
    assert bench.run([*HISTORY, 1]) == computed(4 * batch * fails_at)
    assert bench.archive.traffic.copy_errors == 1
    bench.crowd()
    assert bench.run([*HISTORY, 1, 2]) == 1


def test_a_copy_that_cannot_begin_costs_its_piece(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bench.run(HISTORY)
    bench.crowd()
    into = bench.mover.into
    begun: list[None] = []

    def refuse(*args: Any) -> Any:
        begun.append(None)
        if len(begun) == 2:
            raise RuntimeError("pages are no longer moved")
        return into(*args)

    monkeypatch.setattr(bench.mover, "into", refuse)
    assert bench.run([*HISTORY, 1]) == (computed(4 * batch) if batch < 8 else 1)
    assert bench.archive.traffic.copy_errors == (batch < 8)


def test_a_copy_that_fails_on_its_way_out_loses_its_pages_alone(batch: int) -> None:
    bench = Bench()
    bench.run(HISTORY)
    failed: list[str] = []
    bench.mover.fails = lambda way: way == "out" and not failed and not failed.append(way)  # type: ignore[func-returns-value]
    bench.engine._memory.tree.evict(8)
    bench.engine._memory.make_room(0)
    bench.mover.run(8)
    assert bench.run([*HISTORY, 1]) == {1: 3, 3: 11, 8: 31}[batch]  # the last ones leave first, two rows too
    assert bench.archive.traffic.copy_errors == 1
    assert bench.pages.free_pages > 0


def test_a_copy_out_that_fails_while_it_is_waited_for_to_come_back() -> None:
    bench = Bench()
    bench.run(HISTORY)
    bench.engine._memory.tree.evict(8)
    bench.mover.fails = lambda way: way == "out"
    sink, _ = bench.submit([*HISTORY, 1])
    bench.engine.tick()
    bench.drain()
    assert sink.tokens == expected_tokens([*HISTORY, 1], 1)
    assert len(bench.archive.spill.host) == 0  # type: ignore[union-attr]


def test_a_mover_that_takes_nothing_loses_pages_and_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bench.run(HISTORY)

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(bench.mover, "out", refuse)
    bench.crowd()
    assert bench.run([*HISTORY, 1]) == 31
    assert bench.archive.traffic.copy_errors > 0


def test_reading_that_cannot_begin_frees_what_it_held(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bench.run(HISTORY)
    bench.crowd()

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(bench.worker, "submit", refuse)
        assert bench.run([*HISTORY, 1]) == 31
    bench.crowd()
    assert bench.run([*HISTORY, 1, 2]) == 1


@pytest.mark.parametrize("when", ["before it begins", "in its middle"])
def test_a_request_cancelled_while_its_pages_come_back(
    when: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench()
    bench.run(HISTORY)
    bench.crowd()
    bench.mover.run(100)
    sink, handle = bench.submit([*HISTORY, 1])
    bench.engine.tick()
    if when == "in its middle":
        copies: list[str] = []

        def cancel(way: str) -> bool:
            copies.append(way)
            if len(copies) == (3 if batch == 1 else 1):
                handle.cancel()
            return False

        bench.mover.fails = cancel
        begin = bench.mover.into

        def into(page: int, buffer: list[Any], after: None = None) -> Any:
            copy = begin(page, buffer, after)
            copy.result()
            return copy

        monkeypatch.setattr(bench.mover, "into", into)
    else:
        handle.cancel()
    bench.engine.tick()
    assert sink.done is None  # its pages are written to
    bench.drain()
    assert sink.done is not None
    assert sink.done.reason == "cancelled"
    if when == "in its middle":
        assert copies.count("in") * batch < 8 or batch > 1
        assert bench.engine.cached_prefix(HISTORY) == min(30, 4 * batch * copies.count("in"))
    assert bench.run([*HISTORY, 1, 2]) == 2


def test_stopping_in_the_middle_of_copies_leaves_nothing_held() -> None:
    bench = Bench()
    bench.run(HISTORY)
    bench.crowd()
    sink, _ = bench.submit([*HISTORY, 1])
    bench.engine.tick()
    assert bench.mover.waiting
    bench.engine.stop()
    assert sink.done is not None
    assert sink.done.reason == "cancelled"
    assert not bench.mover.waiting
    assert not bench.archive.spill.leaving  # type: ignore[union-attr]
    bench.engine._memory.check()


def test_what_is_prefilled_ahead_comes_back_first() -> None:
    bench = Bench()
    bench.run(HISTORY)
    bench.crowd()
    before = bench.model.tokens_run
    bench.submit([*HISTORY, 1, 2, 3], 0, background=True)
    bench.drain()
    assert bench.model.tokens_run - before == 3


def test_check_finds_a_page_in_ram_that_nobody_reads_held() -> None:
    bench = Bench()
    bench.run(HISTORY)
    bench.crowd()
    bench.drain()
    bench.mover.run(100)
    bench.engine.tick()
    page = next(iter(bench.archive.spill.host._pages.values()))  # type: ignore[union-attr]
    page.holds += 1
    with pytest.raises(Exception, match="1 holds, 0 expected"):
        bench.engine.check()


def test_with_threads_of_its_own() -> None:
    """The same with the real worker, and copies from other threads."""

    class Threaded(FakeMover):
        def _later(self, *args: Any) -> Any:
            copy = super()._later(*args)
            self.ways[copy._way].remove(copy)
            done = threading.Event()
            copy._force = done.wait
            copy.add_done_callback(lambda _: done.set())
            threading.Timer(0.001, copy.make).start()
            return copy

    pages = FakePages(POOL)
    model = FakeModel(pages)
    threaded: Archive = archive_for(pages, 64, None, Threaded(pages))
    engine = Engine(
        model, pages, sizes=SIZES, vocab_size=VOCAB, context_tokens=CONTEXT,
        config=RuntimeConfig(max_step_tokens=8, max_running=3), archive=threaded,
    )  # fmt: skip
    engine.start()

    def ask(ids: list[int]) -> int:
        sink, before = Collector(), model.tokens_run
        engine.submit(Job(tuple(ids), GREEDY, 1, StopAt(), sink))
        assert sink.finished.wait(30)
        assert sink.tokens == expected_tokens(ids, 1)
        return model.tokens_run - before

    asked: list[Callable[[], int]] = [lambda n=n: ask([*HISTORY, *range(n)]) for n in range(1, 8)]
    assert ask(HISTORY) == 30
    for again in asked:
        ask([50, *range(POOL * 4 - 3)])
        assert again() == 1
    engine.stop()
    engine.check()


def test_pages_that_the_journal_does_not_take_are_offered_again() -> None:
    """And none after them before: what follows a hole cannot be found."""
    journal = FakeJournal()
    bench = Bench(ram_pages=None, journal=journal)
    offers: list[tuple[int, ...]] = []
    offer = journal.offer

    def refusing(key: bytes, parent: bytes, ids: Sequence[int], *rest: Any) -> bool:
        offers.append(tuple(ids))
        return len(offers) > 2 and offer(key, parent, ids, *rest)

    journal.offer = refusing  # type: ignore[method-assign]
    bench.run(HISTORY, 8)
    assert offers[:3] == [tuple(HISTORY[:4])] * 3, "at each step, until it is taken"
    ids = [*HISTORY, *expected_tokens(HISTORY, 8)]
    written = {tokens for _, tokens, _ in journal.files.values()}
    assert {tuple(ids[n : n + 4]) for n in range(0, 36, 4)} <= written
    bench.crowd()
    assert bench.run([*HISTORY, 1]) == 1


def test_a_journal_that_takes_nothing_is_not_offered_anything() -> None:
    """What is refused anyway must not be pinned and marked at every step."""
    journal = FakeJournal()
    bench = Bench(ram_pages=None, journal=journal)
    marks: list[None] = []
    mark = bench.mover.mark
    bench.mover.mark = lambda: marks.append(None) or mark()  # type: ignore[func-returns-value,method-assign]
    journal.ready = False
    bench.run(HISTORY, 8)
    assert not journal.files
    assert len(marks) == 0
    journal.ready = True
    bench.run([*HISTORY, 1])
    assert {tuple(HISTORY[n : n + 4]) for n in range(0, 28, 4)} <= {
        ids for _, ids, _ in journal.files.values()
    }, "the next turn brings them"
