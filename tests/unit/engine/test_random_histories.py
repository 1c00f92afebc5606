"""Any order of submits, cancels, failures, steps: results stay right, every job ends once, pages add up."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from k2hybrid.config import RuntimeConfig
from k2hybrid.engine.engine import Engine, JobHandle
from k2hybrid.errors import CapacityError
from tests.unit.engine.fakes import VOCAB, Collector, FakeModel, FakePages, FakeState, expected_tokens, job


class Histories(RuleBasedStateMachine):
    """A small pool, prompts over two tokens so that prefixes are often shared, all that can happen."""

    def __init__(self) -> None:
        super().__init__()
        self.model = FakeModel(FakePages(14))
        config = RuntimeConfig(max_step_tokens=6, max_running=3, max_queue=8)
        self.engine = Engine(self.model, self.model.pages, vocab_size=VOCAB, context_tokens=64, config=config)
        self.jobs: list[tuple[list[int], int, Collector, JobHandle]] = []

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
        while self.engine.tick():
            pass
        assert all(sink.done is not None for _, _, sink, _ in self.jobs)
        self.tokens_are_right()
        self.engine.check()
        # Only the tree holds pages now, and it gives all of them back.
        self.engine._memory.tree.clear()
        assert self.model.pages.free_pages == 14


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
