"""Any order of submits, cancels, failures, steps: results stay right, every job ends once, pages add up.

First the page memory alone, with rows that say which prefix they were computed for; then the whole engine.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from k2hybrid.cache.host_pages import HostPages
from k2hybrid.cache.page_keys import common_tokens, next_key, pack_ids, page_keys, root_key
from k2hybrid.cache.prefix import _Node
from k2hybrid.config import RuntimeConfig
from k2hybrid.engine import archive, memory, spill
from k2hybrid.engine.archive import Archive, Fetch, Fetched
from k2hybrid.engine.cost import Kind
from k2hybrid.engine.engine import Engine
from k2hybrid.engine.handle import JobHandle
from k2hybrid.engine.memory import PageMemory
from k2hybrid.engine.scheduler import pages_for
from k2hybrid.engine.sequence import Sequence
from k2hybrid.engine.spill import Spill
from k2hybrid.errors import CapacityError
from tests.unit.engine.fakes import (
    SIZES,
    VOCAB,
    Collector,
    Deferred,
    FakeJournal,
    FakeModel,
    FakeMover,
    FakePages,
    FakeState,
    archive_for,
    expected_tokens,
    job,
)

Row = tuple[str, tuple[int, ...]]  # scope, and the tokens up to the row's own
SIZE = 4
POOL = 7
HOST = 6


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "BATCH", 2)
    monkeypatch.setattr(spill, "BATCH", 2)
    monkeypatch.setattr(memory, "OUTPUT_AHEAD", 3)


class RowPages(FakePages):
    """Holds, where a real page holds a latent, all that the latent depends on; None: anything."""

    def __init__(self, pages: int) -> None:
        super().__init__(pages, SIZE)
        self.rows: list[list[Row | None]] = [[None] * SIZE for _ in range(pages)]

    def allocate(self, count: int) -> list[int]:
        pages = super().allocate(count)
        for page in pages:
            self.rows[page] = [None] * SIZE
        return pages

    def contents(self, page: int) -> list[Any]:
        return self.rows[page]

    def copy_rows(self, src: int, dst: int, rows: int) -> None:
        assert min(self.refcount(src), self.refcount(dst)) >= 1
        assert None not in self.rows[src][:rows]
        self.rows[dst][:rows] = self.rows[src][:rows]


class MemoryHistories(RuleBasedStateMachine):
    """Sequences compute, fail, publish, leave; leases end; pages are pinned with or without their path."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = RowPages(POOL)
        self.archive = self.make_archive()
        self.memory = PageMemory(self.pool, SIZE, self.archive.spill if self.archive else None)
        self.clock = 0.0
        self.memory.now = lambda: self.clock
        self.running: list[Sequence] = []
        self.histories: list[list[int]] = [[]]  # of all that were ever run
        self.pinned: list[tuple[int, list[Row | None]]] = []  # page, and the rows claimed when it was pinned

    def make_archive(self) -> Archive | None:
        return None

    @rule(
        data=st.data(),
        ids=st.lists(st.integers(0, 1), min_size=1, max_size=5),
        output=st.integers(0, 8),
        scope=st.sampled_from(["", "", "", "x"]),
        drops=st.sampled_from([False] * 7 + [True]),
        reuse=st.sampled_from([True] * 7 + [False]),
    )
    def admit(
        self, data: st.DataObject, ids: list[int], output: int, scope: str, drops: bool, reuse: bool
    ) -> None:
        """Often what begins as an earlier one did, or goes on where it ended."""
        begin = data.draw(st.sampled_from(self.histories))
        cut = data.draw(st.just(len(begin)) | st.integers(0, len(begin)))
        ids = [*begin[:cut], *ids][:20]
        sequence = Sequence(
            number=0,
            job=cast(Any, SimpleNamespace(scope=scope, reuse=reuse, request_id="test", background=False)),
            sampler=cast(Any, None),
            ids=list(ids),
            prompt_tokens=len(ids),
            most_pages=pages_for(len(ids) + output, SIZE),
        )
        known = {row for page in self.memory.tree.pages() for row in self._claimed(page)}
        longest = 0
        while reuse and longest < len(ids) - 1 and (scope, tuple(ids[: longest + 1])) in known:
            longest += 1
        available = self.memory.available_pages
        if not self.memory.admit(sequence):
            assert self.memory.available_pages == available
            assert sequence.pages == []
            return
        self.running.append(sequence)
        self.histories.append(sequence.ids)
        if sequence.computed != longest:  # there was no room to hold a page and its copy
            assert sequence.computed == longest // SIZE * SIZE
            assert self.memory.available_pages == 0
        assert len(sequence.pages) == pages_for(sequence.computed, SIZE)
        if drops:
            self.memory.drop_partial(sequence)
            assert len(sequence.pages) * SIZE == sequence.computed
        self.admitted(sequence)

    def admitted(self, sequence: Sequence) -> None:
        pass

    @precondition(lambda self: self.running)
    @rule(data=st.data(), tokens=st.integers(1, 9), fails=st.sampled_from([False, False, False, True]))
    def step(self, data: st.DataObject, tokens: int, fails: bool) -> None:
        """Compute rows; a step that fails has written them, but they do not count."""
        sequence = self._draw(data)
        room = sequence.most_pages * SIZE
        while len(sequence.ids) < min(sequence.computed + tokens, room):
            sequence.ids.append(data.draw(st.integers(0, 1)))
        available, promised = self.memory.available_pages, sequence.reserved_pages
        if self.memory.extend(sequence):
            assert len(sequence.ids) <= sequence.reserved_pages * SIZE <= room
        else:
            assert pages_for(len(sequence.ids), SIZE) - promised > available
            assert (sequence.reserved_pages, self.memory.available_pages) == (promised, available)
            del sequence.ids[promised * SIZE :]
        self._compute(sequence, min(sequence.computed + tokens, len(sequence.ids)), fails)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        """Compute all there is, and end."""
        sequence = self._draw(data)
        self._compute(sequence, len(sequence.ids))
        self._publish(sequence)
        self._leave(sequence)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        self._publish(self._draw(data))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        self._leave(self._draw(data))

    @rule(ids=st.lists(st.integers(0, 1), max_size=12), seconds=st.integers(0, 9))
    def lease(self, ids: list[int], seconds: int) -> None:
        self.memory.lease("", ids, seconds)

    @rule(seconds=st.integers(1, 9))
    def wait(self, seconds: int) -> None:
        self.clock += seconds

    @rule(pages=st.integers(1, 4))
    def evict(self, pages: int) -> None:
        alone = [page for page in self.memory.tree.pages() if self.pool.refcount(page) == 1]
        assert self.memory.tree.evict(pages, self.clock) == min(pages, len(alone))

    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        pages = sorted({*self.memory.tree.pages(), *(p for s in self.running for p in s.pages)})
        if pages:
            chosen = data.draw(st.lists(st.sampled_from(pages), min_size=1, max_size=3))
            try:
                self.memory.pin(chosen)
            except CapacityError:
                return
            self.pinned += [(page, self._claimed(page)) for page in chosen]

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        page, rows = self.pinned.pop(data.draw(st.integers(0, len(self.pinned) - 1)))
        assert self.pool.rows[page][: len(rows)] == rows
        self.memory.unpin([page])

    @invariant()
    def pages_add_up(self) -> None:
        self.memory.check()

    @invariant()
    def every_row_belongs_to_its_prefix(self) -> None:
        for sequence in self.running:
            for t in range(sequence.computed):
                row = self.pool.rows[sequence.pages[t // SIZE]][t % SIZE]
                assert row == (sequence.job.scope, tuple(sequence.ids[: t + 1]))
        tree = self.memory.tree
        seen = 0
        for scope, root in tree._roots.items():
            assert root.children
            nodes: list[tuple[_Node, tuple[int, ...]]] = [(child, ()) for child in root.children]
            while nodes:
                node, before = nodes.pop()
                seen += 1
                path = before + node.chunk
                assert 0 < len(node.chunk) <= SIZE
                for at, content in enumerate(self._claimed(node.page), len(before) + 1):
                    assert content == (scope, path[:at])
                assert not node.children or len(node.chunk) == SIZE
                assert node.queued or node.children
                assert all(child.until <= node.until or child.until <= self.clock for child in node.children)
                chunks = [child.chunk for child in node.children]
                assert chunks == sorted(set(chunks))
                nodes += [(child, path) for child in node.children]
        assert seen == len(tree)

    @invariant()
    def sequences_hold_whole_paths(self) -> None:
        for sequence in self.running:
            for page in sequence.pages:
                node = self.memory.tree._pages.get(page)
                above = node.parent if node else None
                assert above is None or above.page < 0 or above.page in sequence.pages

    def teardown(self) -> None:
        self.settle()
        # All can run to the end of what they were promised, pins or not.
        for sequence in self.running:
            self.memory.grow(sequence, sequence.reserved_pages * SIZE)
        self.memory.check()
        for sequence in self.running:
            self.memory.leave(sequence)
        self.memory.unpin([page for page, _ in self.pinned])
        self.memory.check()
        self.memory.tree.clear()
        assert self.pool.free_pages == POOL

    def settle(self) -> None:
        pass

    def _draw(self, data: st.DataObject) -> Sequence:
        return data.draw(st.sampled_from(self.running))

    def _compute(self, sequence: Sequence, stop: int, fails: bool = False) -> None:
        self.memory.grow(sequence, stop)
        for t in range(sequence.computed, stop):
            page, row = sequence.pages[t // SIZE], t % SIZE
            assert row >= self.memory.tree.rows(page)
            assert not any(page in other.pages for other in self.running if other is not sequence)
            self.pool.rows[page][row] = None if fails else (sequence.job.scope, tuple(sequence.ids[: t + 1]))
        if not fails:
            sequence.computed = stop

    def _publish(self, sequence: Sequence) -> None:
        room = self.memory.available_pages
        self.memory.publish(sequence)
        if room or not self.pinned:
            match = self.memory.tree.match(sequence.ids[: sequence.computed], sequence.job.scope)
            assert match.tokens == sequence.computed

    def _leave(self, sequence: Sequence) -> None:
        self.memory.leave(sequence)
        self.running.remove(sequence)

    def _claimed(self, page: int) -> list[Row | None]:
        return self.pool.rows[page][: self.memory.tree.rows(page)]


class SpillingHistories(MemoryHistories):
    """The same with RAM beside the pool: what left comes back to whoever is admitted, as copies are made."""

    def make_archive(self) -> Archive:
        self.mover = FakeMover(self.pool)
        self.worker = Deferred()
        self.coming: dict[Sequence, Fetch] = {}
        self.failing = False
        made = archive_for(self.pool, HOST, None, self.mover)
        made._worker.shutdown()
        made._worker = self.worker  # type: ignore[assignment]
        return made

    @property
    def outside(self) -> Archive:
        return cast(Archive, self.archive)

    @property
    def spill(self) -> Spill:
        return cast(Spill, self.outside.spill)

    @property
    def host(self) -> HostPages[Any]:
        return self.spill.host

    def admitted(self, sequence: Sequence) -> None:
        """As the engine does it."""
        if not sequence.job.reuse:
            return
        tokens = sequence.computed
        self.spill.settle()  # as `find` does: pages whose copy failed are in RAM no more
        longest = self._longest(sequence)
        fetch = self.outside.find(sequence)
        assert (fetch.tokens if fetch else tokens) == max(longest, tokens)
        if fetch is None:
            return
        self.memory.drop_partial(sequence)
        self.memory.grow(sequence, fetch.tokens, ready=False)
        sequence.fetching = True
        self.running.remove(sequence)
        self.coming[sequence] = fetch
        self.outside.read(
            sequence, fetch, self.memory, lambda fetched: self._fetched(sequence, fetch, fetched)
        )

    def _longest(self, sequence: Sequence) -> int:
        """How many tokens go on from what `sequence` has, in RAM alone."""
        ids, at = sequence.ids[:-1], sequence.computed // SIZE * SIZE
        while at < len(ids):
            key = page_keys(sequence.job.scope, ids[:at] or [0], SIZE)[-1].key if at else root_key(
                sequence.job.scope
            )  # fmt: skip
            chunk = ids[at : at + SIZE]
            rows = max(
                (
                    common_tokens(page.ids, tuple(chunk))
                    for page in self.host._pages.values()
                    if page.parent == key
                ),
                default=0,
            )
            at += rows
            if rows < SIZE:
                break
        return at

    def _fetched(self, sequence: Sequence, fetch: Fetch, fetched: Fetched) -> None:
        self.outside.end(fetch, fetched)
        del self.coming[sequence]
        self.running.append(sequence)
        sequence.fetching = False
        assert fetched.tokens == fetch.tokens or self.failing or sequence.cancelled
        sequence.computed = sequence.cached_tokens = fetched.tokens
        self._publish(sequence)

    @rule(copies=st.integers(1, 6), ways=st.sampled_from([("in", "out"), ("out", "in"), ("in",), ("out",)]))
    def copy(self, copies: int, ways: tuple[str, ...]) -> None:
        self.mover.run(copies, ways)

    @rule()
    def bring_back(self) -> None:
        self.worker.run()

    @rule(way=st.sampled_from(["in", "out"]))
    def fail_a_copy(self, way: str) -> None:
        if self.mover.waiting:
            self.mover.fails = lambda copy: True
            self.mover.run(1, [way])
            self.mover.fails = lambda copy: False
            self.failing = True

    @precondition(lambda self: self.coming)
    @rule(data=st.data())
    def give_up_what_comes(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(list(self.coming))).cancelled = True

    @rule(pages=st.integers(0, 4))
    def make_room(self, pages: int) -> None:
        before = {row for page in self.memory.tree.pages() for row in self._claimed(page)}
        lost, ready = self.host.lost, self.pool.free_pages + len(self.memory._leaving())
        self.memory.make_room(pages)
        assert self.pool.free_pages + len(self.memory._leaving()) >= ready
        if self.host.lost == lost:  # what is no longer in the pool is in RAM, to the row
            after = {row for page in self.memory.tree.pages() for row in self._claimed(page)}
            chain = {
                next_key(page.parent, pack_ids(page.ids[: rows + 1]))
                for page in self.host._pages.values()
                for rows in range(len(page.ids))
            }
            for scope, tokens in cast(set[tuple[str, tuple[int, ...]]], before - after):
                assert page_keys(scope, tokens, SIZE)[-1].key in chain

    @invariant()
    def copies_add_up(self) -> None:
        self.outside.check()

    @invariant()
    def every_row_in_ram_belongs_to_its_prefix(self) -> None:
        being_filled = {page for copy in self.spill._copies for page in copy.to}
        for page in {*self.host._pages.values()} - being_filled:
            scope, tokens = page.buffer[len(page.ids) - 1]
            keys = page_keys(scope, tokens, SIZE)
            assert (keys[-1].key, keys[-1].parent) == (page.key, page.parent)
            first = len(tokens) - len(page.ids)
            for row in range(len(page.ids)):
                assert page.buffer[row] == (scope, tokens[: first + row + 1])

    def settle(self) -> None:
        self.worker.run()
        assert not self.coming
        while self.spill.wait():
            pass
        assert not self.spill.leaving


TestSpillingHistories = SpillingHistories.TestCase
TestSpillingHistories.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)

TestMemoryHistories = MemoryHistories.TestCase
TestMemoryHistories.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


class Histories(RuleBasedStateMachine):
    """A small pool, prompts over two tokens so that prefixes are often shared, all that can happen."""

    def __init__(self) -> None:
        super().__init__()
        self.model = FakeModel(FakePages(14))
        config = RuntimeConfig(max_step_tokens=6, max_running=3, max_queue=8)
        self.engine = Engine(
            self.model,
            self.model.pages,
            sizes=SIZES,
            vocab_size=VOCAB,
            context_tokens=64,
            config=config,
            archive=self.make_archive(),
        )
        # Plans depend on no clock: nothing is learnt, and each pass and each slice of a chunk takes the same.
        self.engine._cost.observe = lambda *_, **__: None  # type: ignore[method-assign]
        self.engine._cost.observe_rest = lambda _: None  # type: ignore[method-assign]
        ran = self.engine._scheduler.ran
        self.engine._scheduler.ran = lambda pass_us, _: ran(1000 if pass_us else 0, 700)  # type: ignore[method-assign]
        self.jobs: list[tuple[list[int], int, Collector, JobHandle]] = []

    def make_archive(self) -> Archive | None:
        return None

    def bring_back(self) -> bool:
        return False

    @rule(ids=st.lists(st.integers(0, 1), min_size=1, max_size=24), max_tokens=st.integers(1, 16))
    def submit(self, ids: list[int], max_tokens: int) -> None:
        sink = Collector()
        if len(self.engine._inbox) + len(self.engine._waiting) >= 8:
            with pytest.raises(CapacityError, match="waiting"):
                self.engine.submit(job(ids, sink, max_tokens))
            return
        handle = self.engine.submit(job(ids, sink, max_tokens))
        self.jobs.append((ids, max_tokens, sink, handle))

    @rule(data=st.data())
    def follow_up(self, data: st.DataObject) -> None:
        """The next turn of a finished conversation."""
        done = [
            (ids, sink) for ids, _, sink, _ in self.jobs if sink.done and len(ids) + len(sink.tokens) < 30
        ]
        if done:
            ids, sink = data.draw(st.sampled_from(done))
            self.submit([*ids, *sink.tokens, 3], 4)

    @rule(steps=st.integers(1, 6))
    def tick(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.tick()

    @rule(small=st.sampled_from([0.01, 1.0, 100.0]), large=st.sampled_from([0.01, 1.0, 100.0]))
    def learn(self, small: float, large: float) -> None:
        """What passes of either size are thought to take."""
        self.engine._cost._factors = dict.fromkeys(Kind, large) | {Kind.SMALL: small}

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.jobs:
            data.draw(st.sampled_from(self.jobs))[3].cancel()

    @rule()
    def fail_a_step(self) -> None:
        def fail(state: FakeState) -> None:
            self.model.before_step = lambda state: None
            raise ValueError("planned")

        self.model.before_step = fail
        self.engine.tick()
        self.model.before_step = lambda state: None

    @rule(row=st.integers(0, 5))
    def fail_a_row(self, row: int) -> None:
        self.model.before_step = lambda state: state.failed_rows.add(row)
        self.engine.tick()
        self.model.before_step = lambda state: None

    @invariant()
    def pages_add_up(self) -> None:
        self.engine.check()

    @invariant()
    def tokens_are_right(self) -> None:
        for ids, max_tokens, sink, _ in self.jobs:
            assert sink.tokens == expected_tokens(ids, len(sink.tokens))
            assert len(sink.tokens) <= max_tokens
            assert sink.after_done == 0
            if sink.done and sink.done.reason == "length":
                assert len(sink.tokens) == max_tokens

    def teardown(self) -> None:
        while self.engine.tick() or self.bring_back():
            pass
        assert all(sink.done is not None for _, _, sink, _ in self.jobs)
        self.tokens_are_right()
        self.engine.check()
        # Only the tree holds pages now, and it gives all of them back.
        self.engine._memory.tree.clear()
        self.engine.stop()
        assert self.model.pages.free_pages == 14


class ArchivedHistories(Histories):
    """The same with RAM and a journal beside the pool, all of which may fail."""

    def make_archive(self) -> Archive:
        self.journal = FakeJournal()
        self.mover = FakeMover(self.model.pages)
        self.worker = Deferred()
        made = archive_for(self.model.pages, 10, self.journal, self.mover)
        made._worker.shutdown()
        made._worker = self.worker  # type: ignore[assignment]
        return made

    def bring_back(self) -> bool:
        """Whether there was something to do; the journal's thanks count too."""
        work = bool(self.worker.tasks)
        self.worker.run()
        return work or bool(self.engine._inbox._calls)

    @rule()
    def read(self) -> None:
        self.bring_back()

    @rule(copies=st.integers(1, 9))
    def copy(self, copies: int) -> None:
        self.mover.run(copies)

    @rule(copies=st.integers(1, 3))
    def fail_copies(self, copies: int) -> None:
        self.mover.fails = lambda way: True
        self.mover.run(copies)
        self.mover.fails = lambda way: False

    @precondition(lambda self: self.journal.files)
    @rule(data=st.data(), breaks=st.booleans())
    def lose_a_file(self, data: st.DataObject, breaks: bool) -> None:
        key = data.draw(st.sampled_from(list(self.journal.files)))
        if breaks:
            self.journal.broken.add(key)
        elif not self.worker.tasks:
            del self.journal.files[key]

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), seconds=st.integers(0, 9))
    def lease(self, data: st.DataObject, seconds: int) -> None:
        data.draw(st.sampled_from(self.jobs))[3].lease(seconds)


TestArchivedHistories = ArchivedHistories.TestCase
TestArchivedHistories.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
