"""The predicted time of a pass: bytes, operations, and what it learns from passes that were run."""

from __future__ import annotations

import random

import pytest

from k2hybrid.engine.cost import LARGE_ROWS, CostModel, NetworkSizes, Rows
from tests.unit.engine.fakes import K2


def test_distinct_experts_are_those_of_even_routing() -> None:
    rng = random.Random(1)
    rows, trials = 48, 400
    counted = sum(len({e for _ in range(rows) for e in rng.sample(range(384), 8)}) for _ in range(trials))
    assert CostModel(K2).experts_read(rows) == pytest.approx(counted / trials, rel=0.01)
    assert CostModel(K2).experts_read(1) == pytest.approx(8)
    assert CostModel(K2).experts_read(100_000) == pytest.approx(384)


def test_a_decode_step_reads_what_the_design_says() -> None:
    # 21.1 GB dense and 60·8 experts, 33 GB in all, at 10 GB/s.
    assert CostModel(K2, bytes_per_us=10_000, ops_per_us=1e9).pass_us([Rows(1, 1)]) == pytest.approx(
        3.3e6, rel=0.01
    )


def test_a_chunk_of_512_reads_as_many_expert_bytes_as_48_decode_steps() -> None:
    cost = CostModel(K2)
    assert cost.experts_read(512) / cost.experts_read(1) == pytest.approx(48, rel=0.01)


def test_large_passes_are_bound_by_operations() -> None:
    cost = CostModel(K2, bytes_per_us=200_000, ops_per_us=1_000)
    experts = K2.shared.row_ops + K2.top_k * K2.expert.row_ops
    row_ops = 61 * K2.attention.row_ops + K2.mlp.row_ops + 60 * experts
    attending = 2048 * 2049 // 2 * K2.pair_ops + 2048 * K2.key_ops
    assert cost.pass_us([Rows(2048, 2048)]) == pytest.approx(
        (2048 * row_ops + 61 * attending + K2.head.row_ops) / 1_000, rel=1e-6
    )


@pytest.mark.parametrize("rows", [1, 40, 4 * LARGE_ROWS])
def test_a_pass_is_its_parts_and_the_head(rows: int) -> None:
    cost = CostModel(K2, bytes_per_us=100, ops_per_us=1e9)
    parts = cost.parts_us([Rows(rows, 5000)])
    assert len(parts) == 61 * 5
    assert parts[:4] * 60 == [us for at, us in enumerate(parts[5:]) if at % 5 < 4]
    assert len(set(parts[9::5])) == 1
    assert cost.pass_us([Rows(rows, 5000)]) == pytest.approx(sum(parts) + K2.head.bytes / 100, rel=1e-6)
    assert cost.layer_us([Rows(rows, 5000)]) == sum(parts[:4]) + max(parts[4], parts[9])


def test_a_few_rows_attend_in_the_first_part_and_many_by_groups_of_heads() -> None:
    cost = CostModel(K2, bytes_per_us=1e9, ops_per_us=1_000)
    few, many, both = (
        cost.parts_us(rows)
        for rows in ([Rows(100, 90_000)], [Rows(200, 90_000)], [Rows(100, 90_000), Rows(200, 90_000)])
    )
    pairs = 100 * 90_000 - 50 * 99
    assert few[:4] == [
        pytest.approx((100 * K2.attention.row_ops / 2 + pairs * K2.context_ops) / 1_000), 1, 1,
        pytest.approx(100 * K2.attention.row_ops / 2_000),
    ]  # fmt: skip
    expanded = (200 * 90_000 - 100 * 199) * K2.pair_ops + 90_000 * K2.key_ops
    assert many[1] == many[2] == pytest.approx(expanded / 4_000)
    assert many[0] == many[3] == pytest.approx(many[1] + 200 * K2.attention.row_ops / 2_000)
    assert both[:4] == pytest.approx([a + b for a, b in zip(few[:4], many[:4], strict=True)], abs=2)


def test_no_rows_cost_nothing_and_any_row_costs_something() -> None:
    none = NetworkSizes(1)
    assert CostModel(none).pass_us([]) == 0
    assert CostModel(none).pass_us([Rows(1, 1)]) == 1
    CostModel(none).observe([Rows(1, 1)], 0, 2, 10.0)  # nothing to learn from, nothing to divide by


@pytest.mark.parametrize("rows", [4, 4 * LARGE_ROWS])
def test_it_learns_the_machine_from_passes_and_from_slices(rows: int) -> None:
    cost = CostModel(K2)
    shape = [Rows(rows, 100)]
    other = [Rows(5 * LARGE_ROWS if rows < LARGE_ROWS else 1, 100)]
    before = cost.pass_us(other)
    truth = 7 * cost.pass_us(shape)
    cost_of = [7 * us for us in cost.parts_us(shape)]
    head = truth - sum(cost_of)
    for step in range(100):
        first = step % 20 * 15
        parts = range(first, first + 15) if step % 2 and rows >= LARGE_ROWS else range(61 * 5)
        us = sum(cost_of[part] for part in parts) + (head if len(parts) == 61 * 5 else 0)
        cost.observe(shape, parts.start, parts.stop, us)
    assert cost.pass_us(shape) == pytest.approx(truth, rel=0.01)
    assert cost.pass_us(other) == before  # small and large passes are learnt apart
    cost.observe([Rows(LARGE_ROWS - 1, 100)], 3, 4, 1e9)
    assert cost.pass_us(shape) == pytest.approx(truth, rel=0.01)  # parts of small ones teach nothing


def test_it_learns_the_parts_of_a_chunk_apart() -> None:
    cost, shape = CostModel(K2), [Rows(512, 9000)]
    before = cost.parts_us(shape)
    for _ in range(50):
        cost.observe(shape, 10, 14, 3 * sum(before[10:14]))
        cost.observe(shape, 14, 15, before[14] / 2)
    after = cost.parts_us(shape)
    assert after[:4] == pytest.approx([3 * us for us in before[:4]], rel=0.02)
    assert after[9::5] == pytest.approx([us / 2 for us in before[9::5]], rel=0.02)
    assert after[4] == before[4]  # the dense layer's


def test_what_comes_with_every_pass_is_a_time_of_its_own() -> None:
    cost, few, many = CostModel(K2), [Rows(1, 1)], [Rows(512, 512)]
    before = cost.pass_us(few), cost.pass_us(many), cost.parts_us(many)
    for _ in range(100):
        cost.observe_rest(400.0)
    assert cost.pass_us(few) == pytest.approx(before[0] + 400, abs=2)
    assert cost.pass_us(many) == pytest.approx(before[1] + 400, abs=2)
    assert cost.parts_us(many) == before[2]
    cost.observe_rest(1e9)  # a stall
    assert cost.pass_us(few) < before[0] + 2 * 400
    for _ in range(100):
        cost.observe_rest(-1.0)  # clocks
    assert cost.pass_us(few) == pytest.approx(before[0], abs=2)


def test_one_outlier_changes_little() -> None:
    cost = CostModel(K2)
    before = cost.pass_us([Rows(1, 1)])
    cost.observe([Rows(1, 1)], 0, 61 * 5, before * 1_000)
    assert cost.pass_us([Rows(1, 1)]) < 2.1 * before
