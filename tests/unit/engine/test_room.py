"""Who may enter, who makes room, and who is passed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from k2hybrid.engine import memory
from k2hybrid.engine.sequence import Sequence
from k2hybrid.errors import CapacityError, ContextLengthError, EngineError
from k2hybrid.types import SamplingParams
from tests.unit.engine.engines import build, drain, ended, run
from tests.unit.engine.fakes import Collector, FakeJournal, expected_tokens, job


def test_equal_prompts_submitted_together_are_prefilled_once() -> None:
    engine, model = build(pages=200)
    prompt = list(range(40))
    sinks = [Collector() for _ in range(4)]
    for sink in sinks:
        engine.submit(job(prompt, sink, 3))
    drain(engine)
    assert all(sink.tokens == expected_tokens(prompt, 3) for sink in sinks)
    assert model.tokens_run <= 40 + 3 * 4 + 4 * 2
    assert [s.done.usage.cached_tokens for s in sinks if s.done] == [0, 39, 39, 39]


def test_pages_are_evicted_when_needed_and_results_stay_right() -> None:
    engine, model = build(pages=12)  # 48 tokens
    for n in range(12):
        prompt = [n] * 20 + [5, n]
        assert run(engine, prompt, 9).tokens == expected_tokens(prompt, 9)
    again = run(engine, [11] * 20 + [5, 11], 9)
    assert again.done is not None
    assert again.done.usage.cached_tokens == 21
    assert model.pages.free_pages < 12


def test_admission_waits_for_pages_and_nobody_overtakes() -> None:
    engine, _ = build(pages=10)  # 40 tokens
    order: list[int] = []
    sinks = [Collector() for _ in range(3)]
    for n, (length, output) in enumerate([(8, 20), (10, 20), (2, 2)]):
        sinks[n].on_token = lambda token, n=n: order.append(n)  # type: ignore[misc]
        engine.submit(job([n + 1] * length, sinks[n], output))
    drain(engine)
    assert [ended(sink) for sink in sinks] == ["length"] * 3
    assert order[:20] == [0] * 20  # 7 pages for the first: the second must wait, and the third behind it
    assert sinks[1].tokens == expected_tokens([2] * 10, 20)


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    engine, _ = build(pages=10)
    with pytest.raises(
        ContextLengthError, match=r"200 prompt tokens \+ 100 output tokens = 300 tokens > 256"
    ):
        engine.submit(job([1] * 200, Collector(), 100))
    with pytest.raises(CapacityError, match=r"= 41 tokens, but the latent pages hold 40"):
        engine.submit(job([1] * 40, Collector(), 1))
    assert engine.capacity_tokens == 40


def test_a_full_queue_is_refused() -> None:
    engine, _ = build(max_queue=2)
    for _ in range(2):
        engine.submit(job([1], Collector()))
    with pytest.raises(CapacityError, match="2 requests are waiting"):
        engine.submit(job([1], Collector()))
    drain(engine)
    engine.submit(job([1], Collector()))


def test_who_shares_a_page_with_a_long_prefill_waits_for_that_page_only() -> None:
    engine, model = build(pages=200, max_step_tokens=8)
    long, short, other = Collector(), Collector(), Collector()
    engine.submit(job([7] * 4 + [1] * 150, long, 2))
    engine.submit(job([7] * 4 + [2, 3], short, 2))
    engine.submit(job([5, 6], other, 2))
    while not (short.done and other.done):
        engine.tick()
    assert not long.tokens
    assert model.tokens_run < 100
    assert short.done.usage.cached_tokens >= 4
    drain(engine)
    assert long.tokens == expected_tokens([7] * 4 + [1] * 150, 2)


def test_who_waits_for_a_prefix_is_passed_by_those_behind() -> None:
    engine, model = build(pages=200, max_step_tokens=8)
    long, twin, other = Collector(), Collector(), Collector()
    engine.submit(job([1] * 150, long, 2))
    engine.tick()
    engine.submit(job([1] * 150, twin, 2))
    engine.submit(job([5, 6], other, 2))
    while not other.done:
        engine.tick()
    assert model.tokens_run < 100
    assert not long.tokens
    drain(engine)
    assert long.tokens == twin.tokens == expected_tokens([1] * 150, 2)
    assert twin.done is not None
    assert twin.done.usage.cached_tokens == 149


def test_answers_that_may_be_long_run_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of four could fill all pages; so much is promised only as far as it comes."""
    monkeypatch.setattr(memory, "OUTPUT_AHEAD", 8)
    engine, model = build(pages=20)  # 80 tokens
    sinks = [Collector() for _ in range(4)]
    for n, sink in enumerate(sinks):
        engine.submit(job([n], sink, 79, stop=expected_tokens([n], 12)[-1]))
    wide = 0
    while engine.tick():
        wide = max(wide, *(len(batch.spans) for batch in model.batches[-2:]))
        engine.check()
    assert wide == 4
    for n, sink in enumerate(sinks):
        known = expected_tokens([n], 12)
        assert sink.tokens == known[: known.index(known[-1]) + 1]
    assert engine.metrics.put_back == 0


@pytest.mark.parametrize("ram_pages", [None, 30], ids=["pool alone", "with RAM"])
def test_the_youngest_makes_room_for_older_ones_and_comes_back(
    monkeypatch: pytest.MonkeyPatch, ram_pages: int | None
) -> None:
    monkeypatch.setattr(memory, "OUTPUT_AHEAD", 4)
    engine, _ = build(pages=20, ram_pages=ram_pages)  # 80 tokens: two of 51 do not fit
    sampling = SamplingParams(temperature=1.5, seed=5, frequency_penalty=0.4)
    alone: list[list[int]] = []
    for n in range(3):
        sink = Collector()
        engine.submit(job([n], sink, 50, sampling=sampling))
        drain(engine)
        alone.append(sink.tokens)
    sinks = [Collector() for _ in range(3)]
    for n, sink in enumerate(sinks):
        engine.submit(job([n], sink, 50, sampling=sampling))
    ends: list[int] = []
    while len(ends) < 3:
        engine.tick()
        engine.check()
        ends += [n for n, sink in enumerate(sinks) if sink.done and n not in ends]
    assert [sink.tokens for sink in sinks] == alone
    assert ends == [0, 1, 2]
    assert engine.metrics.put_back >= 2
    for sink in sinks:
        assert sink.after_done == 0
        assert sink.done is not None
        assert sink.done.usage.completion_tokens == 50
        assert sink.done.usage.cached_tokens <= 1  # what was its own before is not counted as cached


def test_who_was_put_back_can_be_cancelled_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "OUTPUT_AHEAD", 4)
    engine, _ = build(pages=20)
    sinks = [Collector() for _ in range(2)]
    handles = [engine.submit(job([n], sink, 70)) for n, sink in enumerate(sinks)]
    while not engine.metrics.put_back:
        engine.tick()
    handles[1].cancel()
    drain(engine)
    assert [ended(sink) for sink in sinks] == ["length", "cancelled"]
    assert sinks[0].tokens == expected_tokens([0], 70)
    engine.check()


def test_idle_prefill_leaves_leased_pages_alone() -> None:
    engine, _ = build(pages=10)  # 40 tokens
    sink = Collector()
    handle = engine.submit(job(list(range(30)), sink, 2))
    drain(engine)
    handle.lease(1000.0)
    ahead = Collector()
    engine.submit(replace(job([9] * 30, ahead, 0), background=True))
    drain(engine)
    assert ended(ahead) == "error"
    assert engine.cached_prefix(list(range(30))) == 30
    assert run(engine, [9] * 30, 2).tokens == expected_tokens([9] * 30, 2)  # a request may have them


@pytest.mark.parametrize("rows", [8, 6, 5])
def test_pages_behind_a_lost_one_are_not_computed_again(rows: int) -> None:
    """In pieces that end with a page, or within one."""
    journal, prompt = FakeJournal(), list(range(60))
    before, _ = build(max_step_tokens=rows, journal=journal)
    whole = run(before, prompt, 2)
    keys = list(journal.files)
    journal.broken = {keys[3], keys[9]}
    engine, model = build(pages=20, max_step_tokens=rows, journal=journal)
    sink = Collector()
    engine.submit(job(prompt, sink, 2))
    while not sink.done:
        engine.tick()
    engine.check()
    assert sink.tokens == whole.tokens == expected_tokens(prompt, 2)
    assert model.tokens_run <= 2 * 8 + 4 + 1  # a piece for each page that was lost, the last rows, an answer
    assert sink.done.usage.cached_tokens >= 60 - (model.tokens_run - 1) - 2 * (rows % 4)
    journal.broken.clear()
    for n in range(4):  # and all pages are there for others
        assert run(engine, [n + 60] * 50, 20).tokens == expected_tokens([n + 60] * 50, 20)


def test_an_error_in_admission_loses_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = build(pages=60, max_step_tokens=8)
    sinks = [Collector() for _ in range(4)]
    engine.submit(job([1] * 40, sinks[0], 3))
    engine.tick()
    for sink, ids in zip(sinks[1:], ([1] * 40, [2], [3]), strict=True):
        engine.submit(job(ids, sink, 3))
    admit = engine._memory.admit

    def broken(sequence: Sequence) -> bool:
        if sequence.ids == [2]:
            raise EngineError("planned")
        return admit(sequence)

    monkeypatch.setattr(engine._memory, "admit", broken)
    with pytest.raises(EngineError, match="planned"):
        engine.tick()
    engine._end_all("error", EngineError("the engine failed"))
    assert [ended(sink) for sink in sinks] == ["error"] * 4


def test_who_waits_for_the_prefix_of_one_that_was_put_back_is_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "OUTPUT_AHEAD", 4)
    engine, _ = build(pages=20, max_step_tokens=8)
    first, back, twin = Collector(), Collector(), Collector()
    engine.submit(job([9], first, 60))
    engine.submit(job([1] * 20, back, 40))
    while not engine.metrics.put_back:
        engine.tick()
    engine.submit(job([1] * 21, twin, 2))
    ticks = 0
    while not twin.done:
        engine.tick()
        ticks += 1
        assert ticks < 500
    drain(engine)
    assert twin.tokens == expected_tokens([1] * 21, 2)
    assert back.tokens == expected_tokens([1] * 20, 40)
    assert first.tokens == expected_tokens([9], 60)


def test_who_is_busy_is_spared_and_another_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "OUTPUT_AHEAD", 4)
    engine, _ = build(pages=20)
    sinks = [Collector() for _ in range(3)]
    for n, sink in enumerate(sinks):
        engine.submit(job([n], sink, 60))
    while not sinks[2].tokens:
        engine.tick()
    youngest = engine._running[2]
    youngest.fetching = True  # its pages are being read into
    while not sinks[0].done:
        engine.tick()
    assert engine.metrics.put_back == 1
    assert youngest.number in engine._running
    youngest.fetching = False
    drain(engine)
    for n, sink in enumerate(sinks):
        assert sink.tokens == expected_tokens([n], 60)
