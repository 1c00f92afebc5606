"""The scheduler over integers: budget, order, turns."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from k2hybrid.engine.scheduler import Candidate, Scheduler, Share, pages_for


def decode(number: int) -> Candidate:
    return Candidate(number, 1, True)


def prefill(number: int, pending: int) -> Candidate:
    return Candidate(number, pending, False)


def test_nothing_runs() -> None:
    assert Scheduler(8).plan([]).shares == ()


def test_decodes_run_together_and_prefill_fills_the_rest() -> None:
    plan = Scheduler(8).plan([prefill(2, 100), decode(0), decode(1), prefill(3, 5)])
    assert plan.shares == (Share(0, 1, True), Share(1, 1, True), Share(2, 6, False))
    assert plan.tokens == 8


def test_the_oldest_prefill_goes_first_and_the_next_takes_what_is_left() -> None:
    plan = Scheduler(16).plan([prefill(5, 30), prefill(4, 10)])
    assert plan.shares == (Share(4, 10, True), Share(5, 6, False))


def test_a_fully_cached_prompt_runs_its_last_token() -> None:
    assert Scheduler(16).plan([prefill(1, 1)]).shares == (Share(1, 1, True),)


def test_more_decodes_than_rows_take_turns() -> None:
    scheduler = Scheduler(3)
    running = [decode(n) for n in range(7)]
    seen = [share.number for _ in range(7) for share in scheduler.plan(running).shares]
    assert sorted(seen) == sorted(list(range(7)) * 3)


def test_decodes_leave_room_for_a_prefill() -> None:
    plan = Scheduler(16).plan([*(decode(n) for n in range(40)), prefill(99, 50)])
    assert plan.shares[-1] == Share(99, 2, False)
    assert plan.tokens == 16


def test_a_step_of_one_row_still_serves_everybody_in_turn() -> None:
    scheduler = Scheduler(1)
    assert scheduler.plan([prefill(0, 3)]).shares == (Share(0, 1, False),)
    assert scheduler.plan([decode(0), decode(1)]).shares == (Share(0, 1, True),)
    assert scheduler.plan([decode(0), decode(1)]).shares == (Share(1, 1, True),)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 20),
    st.lists(st.tuples(st.booleans(), st.integers(1, 50)), max_size=30),
    st.integers(1, 60),
)
def test_plans_are_within_budget_and_complete_everything(
    budget: int, kinds: list[tuple[bool, int]], output: int
) -> None:
    scheduler = Scheduler(budget)
    left = {
        n: (1, output) if is_decode else (pending, output) for n, (is_decode, pending) in enumerate(kinds)
    }
    decoding = {n for n, (is_decode, _) in enumerate(kinds) if is_decode}
    bound = sum(pending + out for pending, out in left.values()) + len(left) + 1
    for _ in range(bound):
        running = [Candidate(n, pending, n in decoding) for n, (pending, _) in left.items()]
        plan = scheduler.plan(running)
        if not running:
            assert plan.shares == ()
            break
        assert 1 <= plan.tokens <= budget
        assert len({share.number for share in plan.shares}) == len(plan.shares)
        for share in plan.shares:
            pending, out = left[share.number]
            assert 1 <= share.tokens <= pending
            assert share.last == (share.tokens == pending)
            if share.last:
                decoding.add(share.number)
                left[share.number] = (1, out - 1)
                if out == 1:
                    del left[share.number]
            else:
                left[share.number] = (pending - share.tokens, out)
    assert not left


def test_pages_for() -> None:
    assert [pages_for(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
