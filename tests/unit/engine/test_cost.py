"""The predicted time of a pass: bytes, operations, and what it learns from passes that were run."""

from __future__ import annotations

import random

import pytest

from k2hybrid.engine.cost import LARGE_ROWS, CostModel, NetworkSizes, Rows

# Kimi-K2-Thinking: 60 of 61 layers have 384 experts of 24.8 MB; the dense part is 21.1 GB.
K2 = NetworkSizes(
    layers=61, moe_layers=60, dense_bytes=21_100_000_000, expert_bytes=24_772_608, experts=384, top_k=8,
    row_ops=32_000_000_000, context_ops=61 * 64 * 1088, latent_bytes=61 * 1152,
)  # fmt: skip


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
    assert cost.pass_us([Rows(2048, 2048)]) == pytest.approx(
        (2048 * K2.row_ops + 2048 * 2049 // 2 * K2.context_ops) / 1_000, rel=1e-6
    )


def test_no_rows_cost_nothing_and_any_row_costs_something() -> None:
    none = NetworkSizes(1, 0, 0, 0, 0, 0, 0, 0, 0)
    assert CostModel(none).pass_us([]) == 0
    assert CostModel(none).pass_us([Rows(1, 1)]) == 1
    CostModel(none).observe([Rows(1, 1)], 1, 10.0)  # nothing to learn from, nothing to divide by


@pytest.mark.parametrize("rows", [4, 4 * LARGE_ROWS])
def test_it_learns_the_machine_from_passes_and_from_slices(rows: int) -> None:
    cost = CostModel(K2)
    shape = [Rows(rows, 100)]
    other = [Rows(5 * LARGE_ROWS if rows < LARGE_ROWS else 1, 100)]
    before = cost.pass_us(other)
    truth = 7 * cost.pass_us(shape)
    for step in range(100):
        layers = 61 if step % 2 else 3
        cost.observe(shape, layers, truth * layers / 61)
    assert cost.pass_us(shape) == pytest.approx(truth, rel=0.01)
    assert cost.layer_us(shape) == pytest.approx(truth / 61, rel=0.01)
    assert cost.pass_us(other) == before  # small and large passes are learnt apart


def test_one_outlier_changes_little() -> None:
    cost = CostModel(K2)
    before = cost.pass_us([Rows(1, 1)])
    cost.observe([Rows(1, 1)], 61, before * 1_000)
    assert cost.pass_us([Rows(1, 1)]) < 2.1 * before
