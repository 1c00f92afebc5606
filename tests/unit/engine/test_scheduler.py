"""The scheduler over integers: time, order, turns, and a chunk that gives way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2hybrid.engine.cost import CostModel, Rows
from k2hybrid.engine.scheduler import (
    ALONE_US,
    MOST_CREDIT,
    MOST_DEBT,
    Candidate,
    Chunk,
    Scheduler,
    Share,
    TickPlan,
    pages_for,
)
from tests.unit.engine.fakes import K2

LAYERS = 10


@dataclass
class Layers:
    """A pass takes `cost`, of it each layer a tenth, of which feed-forward takes so many of a hundred."""

    cost: Callable[[list[Rows]], int]
    feed_percent: int = 50

    def pass_us(self, rows: list[Rows]) -> int:
        return self.cost(rows)

    def layer_us(self, rows: list[Rows]) -> int:
        return sum(self.parts_us(rows)[:2])

    def parts_us(self, rows: list[Rows]) -> list[int]:
        layer_us = self.cost(rows) // LAYERS
        feed_us = layer_us * self.feed_percent // 100
        return [max(1, layer_us - feed_us), max(1, feed_us)] * LAYERS


def per_row(us: int, feed_percent: int = 50) -> Scheduler:
    return Scheduler(512, Layers(lambda rows: us * sum(r.count for r in rows), feed_percent))


def decode(number: int) -> Candidate:
    return Candidate(number, 1, True, 100)


def prefill(number: int, pending: int) -> Candidate:
    return Candidate(number, pending, False)


def flat(us: int, rows_free: int = 0, per: int = 0) -> Scheduler:
    """A pass costs `us`, and `per` for each row beyond `rows_free`."""

    def cost(rows: list[Rows]) -> int:
        return us + per * max(0, sum(r.count for r in rows) - rows_free) if rows else 0

    return Scheduler(512, Layers(cost))


def test_nothing_runs() -> None:
    assert not per_row(10).plan([])
    assert per_row(10).plan([]) == TickPlan()


def test_decodes_run_together() -> None:
    assert per_row(10).plan([decode(1), decode(0)]).shares == (Share(0, 1, True), Share(1, 1, True))


def test_a_small_prefill_rides_along_with_decodes() -> None:
    # 8 rows cost what one does; 60 more cost half as much again.
    plan = flat(1000, 8, 10).plan([decode(0), prefill(1, 57)])
    assert plan == TickPlan((Share(0, 1, True), Share(1, 57, True)))


def test_a_larger_one_becomes_a_chunk_that_takes_nearly_as_long_as_the_decodes() -> None:
    # A chunk of 351 rows costs 4,430 µs, 221 a part: four parts in 10/11 of a decode step of 1,000 µs.
    plan = flat(1000, 8, 10).plan([decode(0), prefill(1, 351)])
    assert plan == TickPlan((Share(0, 1, True),), (Share(1, 351, True),), 4)


def test_a_part_longer_than_the_decodes_waits_until_it_is_owed() -> None:
    # A decode step of 1,000 µs earns 909, a part of the chunk costs 2,000: after 2,200 µs of decoding.
    scheduler = per_row(1000)
    plan = scheduler.plan([decode(0), prefill(1, 40)])
    assert plan == TickPlan((Share(0, 1, True),), (Share(1, 40, True),), 0)
    assert _advances(scheduler, 10, pass_us=1000, part_us=2000) == [0, 0, 1, 0, 1, 0, 1, 0, 1, 0]


def test_what_a_chunk_is_owed_is_what_was_measured() -> None:
    # Predicted as above, but a part took twice as long: half as often. And a fifth: one beside every pass.
    slow = _advances(per_row(1000), 100, pass_us=1000, part_us=4000)
    assert abs(sum(slow) * 4000 - 100 * 1000 * 10 // 11) <= 4000
    assert _advances(per_row(1000), 5, pass_us=10_000, part_us=2000) == [0, 1, 1, 1, 1]


def test_however_much_a_chunk_is_owed_no_gap_is_longer_than_two_steps() -> None:
    scheduler = flat(1000, 8, 10)
    running = [decode(0), prefill(1, 100)]
    chunk = Chunk((Rows(100, 100),), 0, frozenset({1}))  # 96 µs a part
    assert scheduler.plan(running, chunk).advance == 9
    scheduler.ran(1_000_000, 0)
    assert scheduler.plan(running, chunk).advance == 10
    # And of what it is owed no more is kept than a step's time.
    parts = 0
    for _ in range(50):
        advance = scheduler.plan(running, chunk).advance
        scheduler.ran(1000, advance * 96)
        parts += advance
    assert parts <= (50 * 909 + MOST_CREDIT * 1000) // 96 + 1


@pytest.mark.parametrize(("step_us", "feed_percent", "together"), [(3000, 50, 1), (5000, 80, 3)])
def test_nor_longer_than_a_step_and_a_part_where_a_layer_is_longer(
    step_us: int, feed_percent: int, together: int
) -> None:
    # 40 rows take 4,000 µs a layer. Beside 3,000 a step both parts would be 7,000, more than two steps.
    costs = Layers(lambda rows: step_us if rows[0].context == 101 else 40_000, feed_percent)
    scheduler = Scheduler(512, costs)
    chunk = Chunk((Rows(40, 40),), 0, frozenset({1}))
    scheduler.plan([decode(0), prefill(1, 40)], chunk)
    scheduler.ran(1_000_000, 0)
    assert scheduler.plan([decode(0), prefill(1, 40)], chunk).advance == together


def test_a_stall_of_the_chunk_is_made_good_within_some_slices() -> None:
    scheduler = per_row(1000)
    running, chunk = [decode(0), prefill(1, 40)], Chunk((Rows(40, 40),), 0, frozenset({1}))
    scheduler.plan(running, chunk)
    scheduler.ran(1000, 60_000_000)
    advances = []
    while not sum(advances):
        advances.append(scheduler.plan(running, chunk).advance)
        scheduler.ran(1000, advances[-1] * 2000)
    longest = 3000  # a layer of 4,000 µs less a step
    assert (MOST_DEBT * longest + 2000) // 909 <= len(advances) <= (MOST_DEBT * longest + 2000) // 909 + 2


def test_another_requests_chunk_begins_without_credit_or_debt() -> None:
    scheduler = per_row(1000)
    owed = Chunk((Rows(40, 40),), 0, frozenset({1}))
    for _ in range(4):
        scheduler.plan([decode(0), prefill(1, 40)], owed)
        scheduler.ran(1000, 0)
    assert scheduler.plan([decode(0), prefill(1, 40)], owed).advance == 1  # by its credit
    other = Chunk((Rows(40, 40),), 0, frozenset({2}))
    assert scheduler.plan([decode(0), prefill(2, 40)], other).advance == 0


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(5_000, 3_000_000), st.integers(50, 150), st.integers(50, 150), st.integers(30, 80))
def test_a_chunk_gets_its_share_of_the_time_whatever_it_and_a_step_take(
    step_us: int, step_percent: int, chunk_percent: int, feed_percent: int
) -> None:
    """Steps from a fraction of a part to many layers, both predicted wrongly by up to a half."""

    def cost(rows: list[Rows]) -> int:
        return sum(step_us if r.context == 101 else 2_000_000 for r in rows)

    costs = Layers(cost, feed_percent)
    scheduler = Scheduler(512, costs)
    running = [decode(0), prefill(1, 100_000_000)]
    chunk: Chunk | None = None
    decoding = chunking = 0
    for _ in range(400):
        plan = scheduler.plan(running, chunk)
        assert 0 < len(plan.shares) == 1
        if plan.begin:
            chunk = Chunk((Rows(plan.begin[0].tokens, 5000),), 0, frozenset({1}))
        assert chunk is not None
        parts = costs.parts_us(list(chunk.rows))
        slice_us = sum(parts[chunk.part : chunk.part + plan.advance])
        assert step_us + slice_us <= max(2 * step_us, parts[0] + parts[1]) or (
            plan.advance == 1 and min(parts) + 2 < step_us  # one part that is all but the whole of its layer
        ), "two steps, or a layer"
        took = slice_us * chunk_percent // 100
        scheduler.ran(step_us * step_percent // 100, took)
        decoding, chunking = decoding + step_us * step_percent // 100, chunking + took
        part = chunk.part + plan.advance
        chunk = Chunk(chunk.rows, part, chunk.numbers) if part < 2 * LAYERS else None
    share = chunking / decoding
    # Never more than its share, but for the last slice. Less, where whole parts use nine tenths of it, where
    # they or the end of a chunk leave more of the time between two steps, where steps are shorter than was
    # predicted and it may do no more at once, and by a slice that is not owed yet.
    a_slice = max(step_us, *parts) * max(1.0, chunk_percent / 100) / decoding
    assert share <= 10 / 11 + 2 * a_slice
    most = max(step_us * 98 // 100, parts[0] + parts[1] - step_us, *parts)
    fitting = sum(parts) / _slices(parts, most) / step_us
    assert share >= 0.95 * 0.9 * min(10 / 11, fitting) * min(1.0, chunk_percent / step_percent) - a_slice


def _slices(parts: list[int], most: int) -> int:
    """In how many slices of whole parts that take `most` at most all of them fit."""
    slices = left = 0
    for part in parts:
        if part > left:
            slices, left = slices + 1, most
        left -= part
    return slices


def _advances(scheduler: Scheduler, ticks: int, *, pass_us: int, part_us: int) -> list[int]:
    """Parts of a chunk of 40 rows, predicted at 2,000 µs each in `per_row(1000)`, beside a decode."""
    chunk = Chunk((Rows(40, 40),), 0, frozenset({1}))
    advances = []
    for _ in range(ticks):
        advances.append(scheduler.plan([decode(0), prefill(1, 40)], chunk).advance)
        scheduler.ran(pass_us, advances[-1] * part_us)
    return advances


@pytest.mark.parametrize(
    ("gb_per_s", "gops", "decodes", "context"),
    [
        (400, 10_000, 4, 0),
        (50, 10_000, 1, 20_000),
        (100, 3_000, 4, 0),
        (400, 30_000, 1, 0),
        (400, 10_000, 1, 0),
    ],
)
def test_at_true_size_a_prefill_beside_decodes_takes_about_twice_as_long(
    gb_per_s: int, gops: int, decodes: int, context: int
) -> None:
    """Few rows read nearly all experts: so a chunk keeps many, whatever fits beside a step exactly."""
    costs = CostModel(K2, bytes_per_us=gb_per_s * 1e3, ops_per_us=gops * 1e3)
    running = [Candidate(n, 1, True, 1000) for n in range(decodes)]
    scheduler, tokens = Scheduler(512, costs), 4096
    alone = sum(costs.pass_us([Rows(512, context + done + 512)]) for done in range(0, tokens, 512))
    took = done = 0
    chunk: Chunk | None = None
    while done < tokens:
        prompt = Candidate(99, tokens - done, False, context + done)
        plan = scheduler.plan([*running, prompt], chunk)
        if plan.begin:
            chunk = Chunk((prompt.rows(plan.begin[0].tokens),), 0, frozenset({99}))
        assert chunk is not None
        parts, step_us = costs.parts_us(list(chunk.rows)), costs.pass_us([c.rows(1) for c in running])
        slice_us = sum(parts[chunk.part : chunk.part + plan.advance])
        assert step_us + slice_us <= max(2 * step_us, costs.layer_us(list(chunk.rows)))
        scheduler.ran(step_us, slice_us)
        took += step_us + slice_us
        chunk = Chunk(chunk.rows, chunk.part + plan.advance, chunk.numbers)
        if chunk.part == K2.parts:
            done, chunk = done + chunk.rows[0].count, None
    # 2.1, and more where whole parts leave a rest: two feed-forwards of a third of a step each.
    assert took <= 2.4 * alone


def test_what_rides_along_waits_until_no_slice_lies_before_it() -> None:
    # A step and what rides take 1,500 µs; behind a slice of 900 that would be more than two steps.
    scheduler = flat(1000, 8, 10)
    chunk = Chunk((Rows(351, 351),), 0, frozenset({1}))  # 221 µs a part
    running = [decode(0), prefill(1, 351)]
    assert scheduler.plan(running, chunk) == TickPlan((Share(0, 1, True),), (), 4)
    scheduler.ran(1000, 884)
    arrived = [*running, prefill(2, 57)]
    assert scheduler.plan(arrived, chunk) == TickPlan((Share(0, 1, True),), (), 0)
    scheduler.ran(1000, 0)
    riding = scheduler.plan(arrived, chunk)
    assert riding.shares == (Share(0, 1, True), Share(2, 57, True))
    assert riding.advance == 4


def test_what_rides_along_waits_behind_the_last_slice_of_a_chunk_as_well() -> None:
    scheduler = flat(1000, 8, 10)
    last = Chunk((Rows(351, 351),), 2 * LAYERS - 4, frozenset({1}))
    assert scheduler.plan([decode(0), prefill(1, 351)], last).advance == 4
    scheduler.ran(1000, 884)
    arrived = [decode(0), prefill(2, 57)]  # the chunk is over
    assert scheduler.plan(arrived) == TickPlan((Share(0, 1, True),))
    scheduler.ran(1000, 0)
    assert Share(2, 57, True) in scheduler.plan(arrived).shares


def test_a_chunk_under_way_goes_on_and_its_sequences_wait() -> None:
    chunk = Chunk((Rows(9, 512),), 14, frozenset({1}))
    plan = per_row(10).plan([decode(0), prefill(1, 9000), prefill(2, 9000)], chunk)
    assert plan == TickPlan((Share(0, 1, True),), (), 2)
    assert per_row(10).plan([prefill(1, 9000)], chunk) == TickPlan((), (), 6)  # alone, to its end


def test_alone_a_chunk_advances_for_a_moment() -> None:
    scheduler = Scheduler(512, Layers(lambda rows: LAYERS * ALONE_US // 2 if rows else 0))
    assert scheduler.plan([prefill(0, 5000)]) == TickPlan((), (Share(0, 512, False),), 4)


def test_a_prompt_is_cut_the_same_whatever_runs_beside_it() -> None:
    alone = pieces([700], decodes=0)
    for others, decodes in (([], 3), ([40], 0), ([40, 900, 300], 2), ([1300, 511, 512, 513], 1)):
        assert pieces([700, *others], decodes)[0] == alone[0] == [512, 188]


def pieces(prompts: list[int], decodes: int) -> list[list[int]]:
    """How each of `prompts` is cut beside so many decodes."""
    scheduler = flat(1000, 8, 10)
    found: list[list[int]] = [[] for _ in prompts]
    while any(sum(cut) < prompt for cut, prompt in zip(found, prompts, strict=True)):
        running = [decode(100 + n) for n in range(decodes)]
        running += [
            prefill(n, prompt - sum(cut))
            for n, (cut, prompt) in enumerate(zip(found, prompts, strict=True))
            if sum(cut) < prompt
        ]
        plan = scheduler.plan(running)  # each chunk is over at once
        for share in (*plan.shares, *plan.begin):
            if share.number < 100:
                found[share.number].append(share.tokens)
    return found


def test_short_prompts_share_a_chunk_as_they_came_and_what_does_not_fit_waits() -> None:
    plan = per_row(1).plan([prefill(3, 400), prefill(4, 113), prefill(5, 50), prefill(6, 62)])
    assert plan.begin == (Share(3, 400, True), Share(5, 50, True), Share(6, 62, True))


def test_long_prompts_take_turns_with_each_other_and_with_short_ones() -> None:
    scheduler = per_row(1)
    running = [*(prefill(n, 30_000) for n in range(3)), prefill(99, 40)]
    begun = [scheduler.plan(running).begin for _ in range(6)]
    first = (Share(99, 40, True),)
    assert begun == [
        first,
        (Share(0, 512, False),),
        first,
        (Share(1, 512, False),),
        first,
        (Share(2, 512, False),),
    ]
    del running[-1]
    assert [scheduler.plan(running).begin[0].number for _ in range(4)] == [0, 1, 2, 0]


def test_a_fully_cached_prompt_runs_its_last_token() -> None:
    assert per_row(1).plan([prefill(1, 1)]).begin == (Share(1, 1, True),)


def test_more_decodes_than_rows_take_turns() -> None:
    scheduler = Scheduler(3, Layers(lambda rows: 1))
    running = [decode(n) for n in range(7)]
    seen = [share.number for _ in range(7) for share in scheduler.plan(running).shares]
    assert sorted(seen) == sorted(list(range(7)) * 3)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(0, 300),
    st.integers(0, 30),
    st.lists(st.tuples(st.booleans(), st.integers(1, 50)), max_size=20),
    st.integers(1, 30),
)
def test_every_plan_is_within_bounds_and_everything_is_completed(
    max_rows: int, base_us: int, row_us: int, kinds: list[tuple[bool, int]], output: int
) -> None:
    def cost(rows: list[Rows]) -> int:
        return base_us + row_us * sum(r.count for r in rows) if rows else 0

    scheduler = Scheduler(max_rows, Layers(cost))
    left = {n: (1 if decodes else pending, output) for n, (decodes, pending) in enumerate(kinds)}
    decoding = {n for n, (decodes, _) in enumerate(kinds) if decodes}
    chunk: tuple[tuple[Share, ...], Chunk] | None = None
    last_decoded = dict.fromkeys(decoding, 0)

    def commit(share: Share) -> None:
        pending, out = left[share.number]
        assert 1 <= share.tokens <= pending
        assert share.last == (share.tokens == pending)
        if not share.last:
            left[share.number] = (pending - share.tokens, out)
        elif out == 1:
            del left[share.number]
        else:
            decoding.add(share.number)
            left[share.number] = (1, out - 1)

    bound = (sum(pending + out for pending, out in left.values()) + 1) * (2 * LAYERS + 1) * max_rows + 1
    for tick in range(bound):
        running = [Candidate(n, pending, n in decoding) for n, (pending, _) in left.items()]
        plan = scheduler.plan(running, chunk[1] if chunk else None)
        if not running:
            assert not plan
            break
        assert plan, "something runs, and nothing is planned"
        assert sum(s.tokens for s in plan.shares) <= max_rows
        assert sum(s.tokens for s in plan.begin) <= max_rows
        taken = chunk[1].numbers if chunk else frozenset()
        assert not (plan.begin and chunk)
        numbers = [s.number for s in (*plan.shares, *plan.begin)]
        assert len(set(numbers)) == len(numbers)
        assert not taken & set(numbers)
        decodes = sorted(decoding & left.keys())
        for n in decodes[:max_rows] if len(decodes) <= max_rows else []:
            assert n in numbers, "a decode waits though there is room"
        for share in plan.shares:
            last_decoded[share.number] = tick
            commit(share)
        if plan.begin:
            rows = tuple(Rows(s.tokens, s.tokens) for s in plan.begin)
            chunk = (plan.begin, Chunk(rows, 0, frozenset(s.number for s in plan.begin)))
        if chunk:
            part = chunk[1].part + plan.advance
            assert (0 if plan.shares else 1) <= plan.advance <= 2 * LAYERS - chunk[1].part
            chunk = (chunk[0], Chunk(chunk[1].rows, part, chunk[1].numbers))
            scheduler.ran(
                cost([Rows(s.tokens, s.tokens) for s in plan.shares]),
                plan.advance * cost(list(chunk[1].rows)) // (2 * LAYERS),
            )
            if part == 2 * LAYERS:
                for share in chunk[0]:
                    commit(share)
                chunk = None
    assert not left


def test_pages_for() -> None:
    assert [pages_for(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
