"""The engine against a model over integers: results, sharing, limits, ends; see test_room too."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from k2hybrid.config import RuntimeConfig
from k2hybrid.engine import engine as engine_module
from k2hybrid.engine.archive import Archive, Fetch, Fetched
from k2hybrid.engine.engine import MAX_BACKGROUND, Engine
from k2hybrid.engine.handle import JobHandle
from k2hybrid.engine.memory import PageMemory
from k2hybrid.engine.metrics import PageTraffic
from k2hybrid.engine.scheduler import Candidate, Chunk, TickPlan
from k2hybrid.engine.sequence import Sequence
from k2hybrid.errors import (
    EngineError,
    ExpertReadError,
    RequestError,
    TimeLimitError,
)
from k2hybrid.types import EngineEvent, SamplingParams, TokenEvent
from tests.unit.engine.engines import CONTEXT, build, drain, ended, run
from tests.unit.engine.fakes import (
    LAYERS,
    SIZES,
    VOCAB,
    Collector,
    FakeModel,
    FakePages,
    FakeState,
    StopAt,
    expected_tokens,
    job,
)


def test_one_request_in_chunks() -> None:
    engine, model = build(max_step_tokens=7)
    prompt = [(3 * i) % VOCAB for i in range(40)]
    sink = run(engine, prompt, 6)
    assert sink.tokens == expected_tokens(prompt, 6)
    assert ended(sink) == "length"
    assert sink.done is not None
    assert (sink.done.usage.prompt_tokens, sink.done.usage.completion_tokens) == (40, 6)
    assert sink.done.usage.cached_tokens == 0
    assert max(len(batch.ids) for batch in model.batches) == 7
    assert engine.metrics.completion_tokens == 6
    # Each token is counted once, however a chunk was cut into layers.
    assert sum(record.prefill_tokens for record in engine.metrics.recent) == 40
    assert sum(record.decode_tokens for record in engine.metrics.recent) == 5


def test_the_stop_rule_ends_a_request_after_its_token() -> None:
    engine, _ = build()
    tokens = expected_tokens([1, 2, 3], 8)
    sink = Collector()
    engine.submit(job([1, 2, 3], sink, 8, stop=tokens[2]))
    drain(engine)
    assert sink.tokens == tokens[: tokens.index(tokens[2]) + 1]
    assert ended(sink) == "stop"


def test_requests_run_together_as_each_would_alone() -> None:
    engine, model = build(pages=200, max_running=4)
    prompts = [[n, 2 * n, 5, *range(n)] for n in range(1, 10)]
    sinks = [Collector() for _ in prompts]
    for prompt, sink in zip(prompts, sinks, strict=True):
        engine.submit(job(prompt, sink, 7))
    drain(engine)
    for prompt, sink in zip(prompts, sinks, strict=True):
        assert sink.tokens == expected_tokens(prompt, 7)
    sizes = [len(batch.spans) for batch in model.batches]
    assert max(sizes) == 4


def test_decoding_goes_on_between_the_layers_of_a_long_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, model = build(pages=200)
    now = 0.0
    forward = model.forward

    def timed(state: FakeState, until: int) -> FakeState:
        nonlocal now
        now += 1e-3 * len(state.batch.ids) * (until - state.part) / 2
        return forward(state, until)

    monkeypatch.setattr(model, "forward", timed)
    monkeypatch.setattr("k2hybrid.engine.engine.time", SimpleNamespace(perf_counter=lambda: now))
    first, second = Collector(), Collector()
    engine.submit(job([1, 2], first, 100))
    while not first.tokens:
        engine.tick()
    engine.submit(job(list(range(60)), second, 2))
    before = len(first.tokens)
    while not second.tokens:
        engine.tick()
    # Each row costs the same, and prefill gets 10/11 of the time of decoding: 66 steps for 60 tokens.
    assert 64 <= len(first.tokens) - before <= 72
    drain(engine)
    assert first.tokens == expected_tokens([1, 2], 100)
    assert second.tokens == expected_tokens(list(range(60)), 2)
    assert set(model.slices) == {1, 2 * LAYERS}


def test_a_known_prefix_is_not_run_again() -> None:
    engine, model = build()
    prompt = list(range(30))
    first = run(engine, prompt, 6)
    ran = model.tokens_run
    # The next turn of a conversation: the history and something new.
    history = prompt + first.tokens
    assert engine.cached_prefix(history) == 35  # all but the last, whose latents nobody needed yet
    second = run(engine, [*history, 50, 51], 3)
    assert second.tokens == expected_tokens([*history, 50, 51], 3)
    assert second.done is not None
    assert second.done.usage.cached_tokens == 35
    assert model.tokens_run - ran == 38 - 35 + 2


def test_an_identical_prompt_still_runs_its_last_token() -> None:
    engine, model = build()
    prompt = list(range(32))
    run(engine, prompt, 4)
    ran = model.tokens_run
    again = run(engine, prompt, 1)
    assert again.tokens == expected_tokens(prompt, 1)
    assert again.done is not None
    assert again.done.usage.cached_tokens == 31
    assert model.tokens_run - ran == 1


@pytest.mark.parametrize(
    ("ids", "max_tokens", "param"),
    [([], 1, "prompt"), ([1, VOCAB], 1, "prompt"), ([-1], 1, "prompt"), ([1], 0, "max_tokens")],
)
def test_impossible_jobs_are_refused(ids: list[int], max_tokens: int, param: str) -> None:
    engine, _ = build()
    with pytest.raises(RequestError) as refused:
        engine.submit(job(ids, Collector(), max_tokens))
    assert refused.value.param == param
    with pytest.raises(RequestError):
        engine.submit(job([1], Collector(), 1, sampling=SamplingParams(top_p=2.0)))


def test_cancel_while_waiting_prefilling_and_decoding_frees_everything() -> None:
    engine, model = build(pages=40, max_running=2, max_step_tokens=8)
    sinks = [Collector() for _ in range(3)]
    handles = [engine.submit(job([1] * 24, sinks[0], 20))]
    while not sinks[0].tokens:
        engine.tick()
    handles += [engine.submit(job([n + 1] * 24, sinks[n], 20)) for n in (1, 2)]
    while model.slices[-1] != 1:  # a chunk of the second is between two parts; the third waits for a row
        engine.tick()
    assert not sinks[1].tokens
    for handle in handles:
        handle.cancel()
        handle.cancel()
    drain(engine)
    assert [ended(sink) for sink in sinks] == ["cancelled"] * 3
    held = 40 - model.pages.free_pages
    assert held == len([page for page in range(40) if model.pages.refcount(page)])
    assert engine.cached_prefix([1] * 24) == 24  # what was computed is kept for later
    assert engine.metrics.running == 0


def test_a_request_that_is_cancelled_in_a_shared_chunk_leaves_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, model = build(pages=60, max_step_tokens=8)
    plan = engine._scheduler.plan

    def one_part(running: list[Candidate], chunk: Chunk | None) -> TickPlan:
        planned = plan(running, chunk)
        return replace(planned, advance=min(planned.advance, 1))

    monkeypatch.setattr(engine._scheduler, "plan", one_part)
    decoding, stays, leaves = Collector(), Collector(), Collector()
    engine.submit(job([9], decoding, 60))
    engine.tick()
    engine.submit(job([1] * 4, stays, 3))
    handle = engine.submit(job([2] * 4, leaves, 3))
    while len(model.batches[-1].spans) != 2:
        engine.tick()
    handle.cancel()
    engine.tick()
    assert leaves.done is None  # the layers to come still write into its pages
    drain(engine)
    assert ended(leaves) == "cancelled"
    assert stays.tokens == expected_tokens([1] * 4, 3)
    assert decoding.tokens == expected_tokens([9], 60)


def test_a_cancelled_resumable_job_goes_on_where_it_was() -> None:
    engine, model = build()
    before, after = Collector(), Collector()
    sampling = SamplingParams(temperature=1.5, seed=3, frequency_penalty=0.5)
    alone = Collector()
    engine.submit(job([1, 2, 3], alone, 12, sampling=sampling))
    drain(engine)
    handle = engine.submit(replace(job([1, 2, 3], before, 12, sampling=sampling), resumable=True))
    while len(before.tokens) < 5:
        engine.tick()
    handle.cancel()
    engine.tick()
    ran = model.tokens_run
    again = handle.resume(after)
    drain(engine)
    assert after.tokens == alone.tokens
    assert ended(before) == "cancelled"
    assert ended(after) == "length"
    assert model.tokens_run - ran == 12 - 5  # nothing is computed twice
    assert after.done is not None
    assert (after.done.usage.prompt_tokens, after.done.usage.completion_tokens) == (3, 12)
    finished = Collector()
    again.resume(finished)
    drain(engine)
    assert finished.tokens == alone.tokens  # what has ended is given again, without running anything
    assert ended(finished) == "length"
    assert model.tokens_run - ran == 12 - 5


def test_a_job_can_be_resumed_before_its_cancellation_was_noticed() -> None:
    engine, _ = build()
    before, after = Collector(), Collector()
    handle = engine.submit(replace(job([5, 6], before, 9), resumable=True))
    while len(before.tokens) < 3:
        engine.tick()
    handle.cancel()
    handle.resume(after)
    drain(engine)
    assert ended(before) == "cancelled"
    assert after.tokens == expected_tokens([5, 6], 9)


def test_only_resumable_jobs_can_be_resumed() -> None:
    engine, _ = build()
    handle = engine.submit(job([5, 6], Collector(), 9))
    with pytest.raises(EngineError, match="cannot be resumed"):
        handle.resume(Collector())


def test_a_background_job_runs_when_nothing_else_does_and_leaves_at_once() -> None:
    engine, _ = build(max_step_tokens=8)
    quiet, loud = Collector(), Collector()
    prefill = replace(job(list(range(40)), quiet, 0), background=True)
    engine.submit(prefill)
    engine.submit(job([1, 2, 3], loud, 4))
    while not loud.done:
        engine.tick()
    assert quiet.done is None
    assert engine.cached_prefix(list(range(40))) == 0
    engine.tick()  # idle again: a chunk of the background job
    assert engine.cached_prefix(list(range(40))) == 8
    late = Collector()
    engine.submit(job([7, 8], late, 4))
    drain(engine)
    assert ended(quiet) == "cancelled"
    assert late.tokens == expected_tokens([7, 8], 4)
    engine.submit(replace(prefill, sink=(done := Collector())))
    drain(engine)
    assert ended(done) == "length"
    assert not done.tokens
    assert engine.cached_prefix(list(range(40))) == 40
    assert engine.metrics.finished == {"length": 2}  # requests, not what the machine did by itself


def test_nothing_is_shared_between_scopes_or_with_who_asks_for_no_reuse() -> None:
    engine, _ = build()
    prompt = list(range(20))
    for scope, reuse, cached in (("a", True, 0), ("b", True, 0), ("a", True, 19), ("a", False, 0)):
        sink = Collector()
        engine.submit(replace(job(prompt, sink, 3), scope=scope, reuse=reuse))
        drain(engine)
        assert sink.tokens == expected_tokens(prompt, 3)
        assert sink.done is not None
        assert sink.done.usage.cached_tokens == cached


def test_a_request_that_takes_too_long_ends_with_a_named_error() -> None:
    model = FakeModel(FakePages(64))
    config = RuntimeConfig(max_step_tokens=16, request_seconds=1e-6)
    engine = Engine(model, model.pages, sizes=SIZES, vocab_size=VOCAB, context_tokens=CONTEXT, config=config)
    sink = Collector()
    engine.submit(job([1, 2], sink, 100))
    drain(engine)
    assert ended(sink) == "error"
    assert sink.done is not None
    assert isinstance(sink.done.error, TimeLimitError)


def test_a_step_that_fails_ends_its_requests_and_no_others() -> None:
    engine, model = build(max_running=2)
    first, second, third = Collector(), Collector(), Collector()
    engine.submit(job([1, 2, 3], first))
    engine.submit(job([4, 5, 6], second))
    engine.submit(job([7, 8, 9], third))

    def fail(state: FakeState) -> None:
        model.before_step = lambda state: None
        raise ValueError("the machine is on fire")

    model.before_step = fail
    drain(engine)
    for sink in (first, second):
        assert ended(sink) == "error"
        assert sink.done is not None
        assert "on fire" in str(sink.done.error)
    assert third.tokens == expected_tokens([7, 8, 9], 5)
    assert engine.metrics.failed_steps == 1


def test_failed_rows_end_only_the_request_concerned() -> None:
    engine, model = build()
    first, second = Collector(), Collector()
    engine.submit(job([1] * 5, first))
    engine.submit(job([2] * 6, second))

    def fail_row(state: FakeState) -> None:
        model.before_step = lambda state: None
        state.failed_rows.add(7)  # the third row of the second sequence

    model.before_step = fail_row
    drain(engine)
    assert first.tokens == expected_tokens([1] * 5, 5)
    assert ended(second) == "error"
    assert second.done is not None
    assert isinstance(second.done.error, ExpertReadError)
    assert engine.cached_prefix([2] * 6) == 0  # what may be wrong is not offered to others


def test_logits_that_are_not_finite_end_only_their_request() -> None:
    engine, model = build()
    first, second = Collector(), Collector()
    model.poison = lambda context: context[:4] == [2] * 4 and len(context) == 8
    engine.submit(job([1] * 6, first))
    engine.submit(job([2] * 6, second))
    drain(engine)
    assert first.tokens == expected_tokens([1] * 6, 5)
    assert second.tokens == expected_tokens([2] * 6, 2)
    assert ended(second) == "error"
    assert second.done is not None
    assert "not finite" in str(second.done.error)


def test_a_sink_that_raises_has_its_job_cancelled() -> None:
    engine, _ = build()
    calls: list[EngineEvent] = []

    def bad(event: EngineEvent) -> None:
        calls.append(event)
        raise RuntimeError("the reader is gone")

    good = Collector()
    engine.submit(job([1, 2], bad, 20))
    engine.submit(job([3, 4], good, 5))
    drain(engine)
    assert len(calls) == 2  # one token, one end
    assert good.tokens == expected_tokens([3, 4], 5)


def test_a_stop_rule_that_raises_ends_only_its_request() -> None:
    engine, _ = build()

    class Bad:
        paused = False

        def push(self, token: int) -> bool:
            raise KeyError("stop")

    bad, good = Collector(), Collector()
    broken = job([1, 2], bad)
    engine.submit(type(broken)(broken.ids, broken.sampling, 5, Bad(), bad))
    engine.submit(job([3, 4], good))
    drain(engine)
    assert ended(bad) == "error"
    assert good.tokens == expected_tokens([3, 4], 5)


def test_the_integrity_check_sees_a_lost_and_a_surplus_reference() -> None:
    engine, model = build()
    run(engine, list(range(20)))
    page = next(p for p in range(64) if model.pages.refcount(p))
    model.pages.retain([page])
    with pytest.raises(EngineError, match=rf"page {page}: 2 references, 1 expected"):
        engine.check()
    model.pages.release([page, page])
    with pytest.raises(EngineError, match="do not add up"):
        engine.check()
    assert engine.metrics.integrity_errors == 2


def test_usage_counts_what_ran_and_what_did_not() -> None:
    engine, _ = build()
    run(engine, list(range(16)), 4)
    sink = run(engine, list(range(16)), 4)
    assert sink.done is not None
    usage = sink.done.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (16, 4, 15)
    assert usage.prefill_ms > 0
    assert usage.decode_ms > 0
    snapshot = engine.metrics.snapshot()
    assert snapshot["finished"] == {"length": 2}
    assert snapshot["cached_tokens"] == 15
    # 19 tokens of the second are kept, 4 a page; the last one was never computed.
    assert engine.latents == {"page_tokens": 4, "pages": 64, "used": 0, "kept": 5, "free": 59}


class TestThread:
    """The same engine with its thread running."""

    def test_submit_from_many_threads(self) -> None:
        engine, _ = build(pages=200)
        engine.start()
        sinks: dict[int, Collector] = {n: Collector() for n in range(24)}

        def client(n: int) -> None:
            engine.submit(job([n, n + 1], sinks[n], 6))

        threads = [threading.Thread(target=client, args=(n,)) for n in sinks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for n, sink in sinks.items():
            assert sink.finished.wait(20)
            assert sink.tokens == expected_tokens([n, n + 1], 6)
        engine.stop()

    def test_stop_ends_everything_with_cancelled(self) -> None:
        engine, model = build(max_running=1)
        engine.start()
        began, go_on = threading.Event(), threading.Event()

        def block(state: FakeState) -> None:
            began.set()
            assert go_on.wait(20)

        model.before_step = block
        running, waiting = Collector(), Collector()
        engine.submit(job([1], running, 100))
        assert began.wait(20)
        engine.submit(job([2], waiting, 100))
        stopper = threading.Thread(target=engine.stop)
        stopper.start()
        go_on.set()
        stopper.join(20)
        assert not stopper.is_alive()
        assert ended(running) == ended(waiting) == "cancelled"
        with pytest.raises(EngineError, match="stopped"):
            engine.submit(job([1], Collector()))
        engine.stop()

    def test_an_idle_engine_answers_a_cancel_and_a_later_request(self) -> None:
        engine, _ = build()
        engine.start()
        first = Collector()
        handle = engine.submit(job([1, 2], first, 3))
        assert first.finished.wait(20)
        handle.cancel()
        second = Collector()
        engine.submit(job([1, 2], second, 3))
        assert second.finished.wait(20)
        assert ended(second) == "length"
        engine.stop()

    def test_a_cancel_from_within_a_sink(self) -> None:
        engine, _ = build()
        engine.start()
        sink = Collector()
        ready = threading.Event()
        handles: list[JobHandle] = []

        def cancel(token: int) -> None:
            ready.wait(20)
            handles[0].cancel()

        sink.on_token = cancel
        handles.append(engine.submit(job([1, 2], sink, 50)))
        ready.set()
        assert sink.finished.wait(20)
        assert ended(sink) == "cancelled"
        assert len(sink.tokens) == 1
        engine.stop()

    def test_the_engine_survives_an_inconsistency_and_says_so(self) -> None:
        engine, model = build()
        engine.start()
        first = Collector()
        engine.submit(job(list(range(20)), first, 3))
        assert first.finished.wait(20)
        page = next(p for p in range(64) if model.pages.refcount(p))
        model.pages.retain([page])
        second = Collector()
        engine.submit(job([1, 2], second, 3))
        assert second.finished.wait(20)
        deadline = time.monotonic() + 20
        while not engine.metrics.integrity_errors and time.monotonic() < deadline:
            time.sleep(0.005)
        assert engine.metrics.integrity_errors >= 1
        third = Collector()
        engine.submit(job([1, 2], third, 3))
        assert third.finished.wait(20)
        assert third.tokens == expected_tokens([1, 2], 3)
        engine.stop()

    def test_engines_start_once(self) -> None:
        engine, _ = build()
        engine.start()
        with pytest.raises(EngineError, match="started before"):
            engine.start()
        engine.stop()

    def test_stop_without_start_ends_what_was_submitted(self) -> None:
        engine, _ = build()
        sink = Collector()
        engine.submit(job([1], sink))
        engine.stop()
        assert ended(sink) == "cancelled"


def test_sampled_tokens_depend_on_the_seed_alone() -> None:
    sampling = SamplingParams(temperature=3.0, seed=11)

    def tokens(crowd: int, max_step_tokens: int) -> list[int]:
        engine, _ = build(pages=200, max_step_tokens=max_step_tokens)
        for n in range(crowd):
            engine.submit(job([9, n + 40] * 4, Collector(), 9, sampling=SamplingParams(temperature=3.0)))
        sink = Collector()
        engine.submit(job([1, 2, 3, 4, 5, 6], sink, 12, sampling=sampling))
        drain(engine)
        return sink.tokens

    alone = tokens(0, 16)
    assert len(set(alone)) > 3
    assert tokens(3, 16) == alone
    assert tokens(3, 5) == alone


def test_token_events_carry_logprobs() -> None:
    engine, _ = build()
    events: list[EngineEvent] = []
    engine.submit(job([1, 2], events.append, 2, sampling=SamplingParams(temperature=0.0, logprobs=2)))
    drain(engine)
    first = events[0]
    assert isinstance(first, TokenEvent)
    assert first.logprob is not None
    assert first.logprob.top[0] == (first.token, first.logprob.logprob)
    assert len(first.logprob.top) == 2


class FetchingArchive:
    """An archive that never finishes reading by itself, or fails to begin."""

    spill = None

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails
        self.traffic = PageTraffic()
        self.under_way: list[Fetch] = []
        self.then: Callable[[Fetched], None] | None = None

    def keep(self, *_: object, **__: object) -> None:
        pass

    def find(self, sequence: Sequence, least: int = 1) -> Fetch | None:
        if not sequence.computed < 8 < len(sequence.ids):
            return None
        fetch = Fetch(0, (), 8)
        self.under_way.append(fetch)
        return fetch

    def read(self, _: Sequence, fetch: Fetch, memory: PageMemory, then: Callable[[Fetched], None]) -> None:
        if self.fails:
            raise RuntimeError("can't start new thread")
        self.then = then

    def end(self, fetch: Fetch, fetched: Fetched | None = None) -> None:
        self.under_way.remove(fetch)

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass


def with_archive(archive: FetchingArchive, **options: Any) -> Engine:
    model = FakeModel(FakePages(64))
    return Engine(
        model,
        model.pages,
        sizes=SIZES,
        vocab_size=VOCAB,
        context_tokens=CONTEXT,
        config=RuntimeConfig(max_step_tokens=16, **options),
        archive=cast("Archive", archive),
    )


def test_a_request_whose_pages_are_read_waits_while_others_run() -> None:
    archive = FetchingArchive()
    engine = with_archive(archive)
    reading, other = Collector(), Collector()
    engine.submit(job(list(range(20)), reading, 2))
    engine.submit(job([1, 2], other, 3))
    drain(engine)
    assert ended(other) == "length"
    assert reading.done is None
    assert archive.then is not None
    archive.then(Fetched(0, 0))  # nothing was good: all is prefilled
    drain(engine)
    assert reading.tokens == expected_tokens(list(range(20)), 2)


def test_reading_that_cannot_begin_is_replaced_by_prefill() -> None:
    archive = FetchingArchive(fails=True)
    engine = with_archive(archive)
    sink = Collector()
    engine.submit(job(list(range(20)), sink, 2))
    drain(engine)
    assert archive.under_way == []
    assert sink.tokens == expected_tokens(list(range(20)), 2)


def test_a_time_limit_while_pages_are_read_is_told_as_such_once_they_are() -> None:
    archive = FetchingArchive()
    engine = with_archive(archive, request_seconds=0.01)
    sink = Collector()
    engine.submit(job(list(range(20)), sink, 2))
    engine.tick()
    time.sleep(0.02)
    engine.tick()
    assert sink.done is None  # its pages are still written to
    assert archive.then is not None
    archive.then(Fetched(0, 8))
    drain(engine)
    assert sink.done is not None
    assert isinstance(sink.done.error, TimeLimitError)


def test_a_failing_call_loses_nothing_that_came_with_it() -> None:
    engine, _ = build()
    sink = Collector()

    def fail(_: PageMemory) -> None:
        raise EngineError("planned")

    engine.call(fail)
    engine.submit(job([1, 2], sink, 3))
    drain(engine)
    assert sink.tokens == expected_tokens([1, 2], 3)
    assert engine.metrics.integrity_errors == 1


def test_background_jobs_beyond_the_few_that_may_wait_are_told() -> None:
    engine, _ = build()
    sinks = [Collector() for _ in range(MAX_BACKGROUND + 3)]
    for n, sink in enumerate(sinks):
        engine.submit(replace(job([n] * 6, sink, 0), background=True))
    drain(engine)
    assert [ended(sink) for sink in sinks] == ["cancelled"] * 3 + ["length"] * MAX_BACKGROUND


# --- tokens that a mask appends, pauses ---------------------------------------------------------------


class Forces:
    """A mask that forbids nothing, and puts `more` behind the token numbers in it; or others in its place."""

    def __init__(self, more: dict[int, list[int]], instead: bool = False) -> None:
        self.more = more
        self.instead = instead
        self.accepted = 0

    def apply(self, logits: Any) -> None:
        pass

    def accept(self, token: int) -> list[int]:
        self.accepted += 1
        forced = self.more.get(self.accepted, [])
        return forced if forced and self.instead else [token, *forced]


@pytest.mark.parametrize("instead", [False, True])
def test_forced_tokens_are_run_together_and_the_answer_goes_on_behind_them(instead: bool) -> None:
    engine, _ = build()
    sink, prompt = Collector(), [1, 2, 3]
    forced = [4, 5, 6, 7, 8, 9]
    engine.submit(replace(job(prompt, sink, 10), mask=Forces({2: forced}, instead)))
    steps = engine.metrics.steps
    drain(engine)
    first = expected_tokens(prompt, 2)
    begun = [*first[: 1 if instead else 2], *forced]
    assert sink.tokens == [*begun, *expected_tokens([*prompt, *begun], 10 - len(begun))]
    assert engine.metrics.steps - steps == 10 - len(forced) + (1 if instead else 0)
    assert sink.done is not None
    assert sink.done.usage.completion_tokens == 10
    assert run(engine, [*prompt, *begun], 3).tokens == expected_tokens([*prompt, *begun], 3)


def test_forced_tokens_end_where_the_rule_or_the_limit_says() -> None:
    engine, _ = build()
    stopped, cut = Collector(), Collector()
    engine.submit(replace(job([1, 2], stopped, 10, stop=6), mask=Forces({1: [5, 6, 7, 8]})))
    engine.submit(replace(job([1, 3], cut, 4), mask=Forces({1: [5, 6, 7, 8]})))
    drain(engine)
    assert stopped.tokens == [*expected_tokens([1, 2], 1), 5, 6]
    assert ended(stopped) == "stop"
    assert cut.tokens == [*expected_tokens([1, 3], 1), 5, 6, 7]
    assert ended(cut) == "length"


def test_the_logprob_of_a_forced_token_is_zero() -> None:
    engine, _ = build()
    seen: list[TokenEvent] = []
    asked = job([1, 2], lambda event: seen.append(event) if isinstance(event, TokenEvent) else None, 5)
    engine.submit(replace(asked, mask=Forces({1: [5, 6]}), sampling=SamplingParams(0.0, logprobs=1)))
    drain(engine)
    values = [event.logprob for event in seen]
    assert [value is not None and value.logprob == 0.0 for value in values] == [
        False,
        True,
        True,
        False,
        False,
    ]


def test_a_paused_job_goes_on_behind_what_is_kept() -> None:
    engine, model = build()
    prompt = [(5 * i) % VOCAB for i in range(30)]
    whole = expected_tokens(prompt, 12)
    first, second = Collector(), Collector()
    asked = job(prompt, first, 12)
    handle = engine.submit(replace(asked, stop=StopAt(whole[7], pause=True)))
    drain(engine)
    at = whole.index(whole[7]) + 1
    assert first.tokens == whole[:at]
    assert ended(first) == "paused"
    assert engine.metrics.completion_tokens == 0  # the request is not over
    before = model.tokens_run
    handle.go_on(second, 4, stop=StopAt())
    drain(engine)
    assert first.tokens[:4] + second.tokens == whole
    assert model.tokens_run - before <= 12 - 4 + 1  # nothing of the prompt was run again
    assert second.done is not None
    assert second.done.usage.completion_tokens == 12
    assert second.done.usage.prompt_tokens == 30
    assert second.done.usage.cached_tokens == 0  # as the request began


def test_a_resumed_job_that_went_on_gives_all_its_tokens() -> None:
    engine, _ = build()
    prompt, whole = [1, 2, 3], expected_tokens([1, 2, 3], 9)
    first, second, third = Collector(), Collector(), Collector()
    asked = replace(job(prompt, first, 9), stop=StopAt(whole[3], pause=True), resumable=True)
    handle = engine.submit(asked)
    drain(engine)
    again = handle.go_on(second, len(first.tokens), stop=StopAt())
    drain(engine)
    again.resume(third)
    drain(engine)
    assert third.tokens == whole
    assert ended(third) == "length"


def test_what_runs_cannot_go_on() -> None:
    engine, _ = build()
    handle = engine.submit(job([1, 2], Collector(), 9))
    engine.tick()
    with pytest.raises(EngineError, match="has not ended"):
        handle.go_on(Collector(), 1)


def test_progress_of_a_prompt_is_told_if_asked_for() -> None:
    engine, _ = build(max_step_tokens=8)
    sink, silent = Collector(), Collector()
    prompt = [(7 * i) % VOCAB for i in range(30)]
    engine.submit(replace(job(prompt, sink, 3), progress=True))
    drain(engine)
    engine.submit(job([*prompt, 1], silent, 3))
    drain(engine)
    told = [entry.processed for entry in sink.progress]
    assert told == sorted(told)
    assert told[-1] == 30
    assert len(told) > 2
    assert {entry.total for entry in sink.progress} == {30}
    assert not silent.progress


def test_a_step_takes_what_its_decodes_wait_for_and_no_time_of_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes with every step is learnt; what the engine waited for, and what failed, is not."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    engine, model = build()
    forward, fails = model.forward, [False]

    def timed(state: FakeState, until: int) -> FakeState:
        clock.now += 0.002
        if fails[0]:
            clock.now += 30
            raise RuntimeError("a stall")
        return forward(state, until)

    model.forward = timed  # type: ignore[method-assign]

    class Slow(Collector):
        def __call__(self, event: EngineEvent) -> None:
            clock.now += 0.0005
            super().__call__(event)

    rests: list[float] = []
    engine.costs.observe_rest = rests.append  # type: ignore[method-assign]
    for _ in range(2):
        engine.submit(job([1, 2, 3], Slow(), 6))
        drain(engine)
        clock.now += 1000
    assert len(rests) >= 10
    assert max(rests) <= 1001  # the last token comes with the end: two events
    assert min(rests) >= 499
    rests.clear()
    fails[0] = True
    engine.submit(job([4, 5, 6], Slow(), 6))
    drain(engine)
    assert rests == []
