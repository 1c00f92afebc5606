"""Predicted passes: sizes against the published files and a traced model, times against sums by hand."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from k2hybrid.cache.pages import LatentPages
from k2hybrid.cache.rows import Bf16Rows
from k2hybrid.checkpoint.loader import open_checkpoint
from k2hybrid.checkpoint.presets import changed_config
from k2hybrid.checkpoint.spec import ModelSpec, read_spec
from k2hybrid.config import MINI_MODEL
from k2hybrid.experts.prediction import (
    CHUNK_ROWS,
    RESOURCES,
    ModelSizes,
    Predictor,
    Rates,
    arithmetic_rates,
)
from k2hybrid.experts.reference import ReferenceExperts
from k2hybrid.model.batch import Batch, Span
from k2hybrid.model.kimi import Kimi
from k2hybrid.model.layers import TorchLinears
from tests.k2_rates import K2, RATES


def test_sizes_are_those_of_the_published_checkpoint() -> None:
    # Bytes of all files without the `weight_shape` tensors, and of one token in the cache.
    assert K2.resting_bytes + K2.experts.total_bytes == 594_205_351_936
    assert K2.latent_bytes == 70_272
    assert K2.dense_bytes + K2.head_bytes == pytest.approx(21.09e9, rel=1e-3)


class _Counting(TorchLinears):
    """Counts multiply-adds of products with weights."""

    def __init__(self) -> None:
        self.ops = 0

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        self.ops += x.shape[0] * weight.numel()
        return super().linear(x, weight)

    def head_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        self.ops += x.shape[0] * weight.numel()
        return super().head_linear(x, weight)

    def head_linear_t(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        self.ops += x.shape[0] * weight.numel()
        return super().head_linear_t(x, weight)


def test_operations_are_those_that_the_model_does() -> None:
    spec = read_spec(MINI_MODEL)
    sizes = ModelSizes.of(spec)
    kernels = _Counting()
    pages = LatentPages(spec.num_layers, 1, Bf16Rows(spec.latent_dim))
    table = torch.tensor(pages.allocate(1))
    with open_checkpoint(MINI_MODEL, experts := ReferenceExperts()) as checkpoint:
        network = Kimi(spec, checkpoint, experts, kernels, pages)
        batch = Batch(torch.tensor([5]), torch.tensor([0]), (Span(0, 1, table),), torch.tensor([0]))
        network.logits(network.forward(network.begin(batch)))
        del network
    # The first token attends over itself: a score over the whole row, per head.
    context = spec.num_layers * spec.num_heads * spec.latent_dim
    assert kernels.ops == sizes.dense_ops + spec.vocab_size * spec.hidden_size + context
    assert sizes.kv_b_ops == spec.num_layers * spec.num_heads * spec.kv_lora_rank * (
        spec.qk_nope_head_dim + spec.v_head_dim
    )


def test_distinct_experts_are_those_of_even_routing() -> None:
    draw = random.Random(3)
    rows, trials = 20, 300
    counted = sum(len({e for _ in range(rows) for e in draw.sample(range(384), 8)}) for _ in range(trials))
    assert K2.distinct(rows) == pytest.approx(counted / trials, rel=0.01)


def test_a_mapped_decode_step_is_the_sum_of_its_reads_and_the_rest() -> None:
    found = Predictor(K2, RATES, "mapped").decode(1, 1000)
    dense = (K2.dense_bytes + K2.head_bytes) / 90e9
    experts = 60 * 8 * 24_772_608 / 80e9
    assert found.parts["RAM bandwidth"] == pytest.approx(dense + experts)
    assert found.parts["attention"] == pytest.approx(61 * 1000 * 1e-7)
    assert found.parts["overhead"] == pytest.approx(61 * 1e-4 + 1e-3)
    assert found.seconds == pytest.approx(sum(found.parts.values()))
    assert found.tokens_s == pytest.approx(1 / found.seconds)
    assert found.limit == "RAM bandwidth"


def test_more_sequences_share_reads_and_pay_arithmetic() -> None:
    one, eight = (Predictor(K2, RATES, "resident").decode(n, 0) for n in (1, 8))
    distinct = K2.distinct(8)
    each = 24_772_608 / 85e9 + 0.25 * (64 / distinct - 1) * 3 * 7168 * 2048 / 1.5e12
    dense = K2.dense_bytes / 90e9 + 0.25 * 7 * K2.dense_ops / 2e12
    head = K2.head_bytes / 90e9 + 0.25 * 7 * K2.head_bytes / 2 / 2e12
    assert eight.parts["RAM bandwidth"] == pytest.approx(60 * distinct * each + dense + head)
    assert eight.parts["overhead"] == pytest.approx(61 * (1e-4 + 7 * 2e-5) + 8e-3)
    assert one.tokens_s < eight.tokens_s < 8 * one.tokens_s


def test_a_prefill_is_its_chunks() -> None:
    rates = dataclasses.replace(RATES, overlap=1.0, sample_s=0.0)
    found = Predictor(K2, rates, "mapped").prefill(CHUNK_ROWS + 100)
    first, rest = (K2.distinct(n) for n in (CHUNK_ROWS, 100))
    dense = (K2.dense_ops - K2.kv_b_ops) / 2e12
    ops = 3 * 7168 * 2048 / 1.5e12
    read = 24_772_608 / 80e9
    chunk = 60 * first * max(read, (8 * CHUNK_ROWS / first - 1) * ops) + 511 * dense
    last = 60 * rest * max(read, (800 / rest - 1) * ops)
    last += max(99 * dense, K2.dense_bytes / 90e9) + K2.head_bytes / 90e9
    assert found.parts["arithmetic"] + found.parts["RAM bandwidth"] == pytest.approx(chunk + last)
    assert found.parts["overhead"] == pytest.approx(61 * 0.02 * (1 + 100 / 512))
    assert found.parts["attention"] == pytest.approx(61 * 1e-5 * (512 + 100 / 512 * 612))


def test_streamed_experts_wait_for_the_disk_and_compute_what_comes_last_after_it() -> None:
    found = Predictor(K2, RATES, "streamed", disk_gb_s=5.0, hit_rate=0.5).decode(1, 0)
    one, fetch = 24_772_608 / 85e9, 24_772_608 / 5e9
    layer = 4 * fetch + one / 3  # down of the last one
    dense = (K2.dense_bytes + K2.head_bytes) / 90e9
    assert found.parts["disk"] + found.parts["RAM bandwidth"] == pytest.approx(60 * layer + dense)
    assert found.limit == "disk"


def test_a_disk_that_keeps_up_costs_nothing() -> None:
    fast = Predictor(K2, RATES, "streamed", disk_gb_s=1e4, hit_rate=0.5).decode(1, 0)
    assert fast.parts["disk"] == 0.0
    assert fast.seconds == pytest.approx(Predictor(K2, RATES, "resident").decode(1, 0).seconds)


@given(
    field=st.sampled_from(
        ["dense_gb_s", "mapped_gb_s", "arena_gb_s", "dense_ops", "expert_ops", "overlap", "disk", "hits"]
    ),
    place=st.sampled_from(["mapped", "resident", "streamed"]),
    sequences=st.integers(1, 64),
    tokens=st.integers(1, 3000),
    hits=st.floats(0, 1),
)
@settings(max_examples=60)
def test_nothing_better_makes_it_slower(
    field: str, place: Any, sequences: int, tokens: int, hits: float
) -> None:
    def predict(rates: Rates, disk: float, hit_rate: float) -> tuple[float, float]:
        predictor = Predictor(K2, rates, place, disk_gb_s=disk, hit_rate=hit_rate)
        return predictor.decode(sequences, tokens).seconds, predictor.prefill(tokens).seconds

    before = predict(RATES, 6.0, hits)
    if field == "disk":
        after = predict(RATES, 12.0, hits)
    elif field == "hits":
        after = predict(RATES, 6.0, (1 + hits) / 2)
    else:
        better = 1.0 if field == "overlap" else 2 * getattr(RATES, field)
        after = predict(dataclasses.replace(RATES, **{field: better}), 6.0, hits)
    assert all(a <= b * (1 + 1e-12) for a, b in zip(after, before, strict=True))


def test_another_machine_keeps_shares_of_its_ram_and_scales_with_its_cores() -> None:
    there = RATES.at(ram_gb_s=400.0, cores=32)
    assert (there.dense_gb_s, there.mapped_gb_s, there.arena_gb_s) == (360.0, 320.0, 340.0)
    assert (there.dense_ops, there.expert_ops) == (8e12, 6e12)
    assert (there.chunk_s, there.chunk_context_s) == (0.005, 2.5e-6)
    assert there.context_s == RATES.context_s / 4
    assert (there.step_s, there.sample_s) == (RATES.step_s, RATES.sample_s)
    assert RATES.at(ram_gb_s=100.0, cores=8) == RATES


@given(
    gb_s=st.floats(10, 600),
    rate=st.floats(1e11, 2e13),
    overlap=st.floats(0.3, 1.0),
    experts=st.sampled_from([16, 64, 384]),
)
@example(gb_s=300.0, rate=5.733788e12, overlap=0.33, experts=384)  # of a chunk read as quickly as computed
def test_rates_are_found_again_in_times_made_from_them(
    gb_s: float, rate: float, overlap: float, experts: int
) -> None:
    spec = ModelSpec.from_config(changed_config("kimi-k2-thinking", {"experts": experts}, None))
    sizes = ModelSizes.of(spec)
    one = sizes.experts.expert_bytes / (gb_s * 1e9)

    def seconds(rows: float) -> float:
        compute = (rows - 1) * sizes.expert_ops / rate
        return max(one, compute) + (1 - overlap) * min(one, compute)

    distinct = sizes.distinct(CHUNK_ROWS)
    chunk = distinct * seconds(CHUNK_ROWS * sizes.top_k / distinct)
    found = arithmetic_rates(sizes, one=one, few=(4, seconds(4)), full=(64, seconds(64)), chunk=chunk)
    if 63 * sizes.expert_ops / rate < 2 * one:
        return  # never bound by arithmetic: its rate cannot be seen, and does not matter
    assert found[0] == pytest.approx(rate, rel=0.05)
    compute = (4 - 1) * sizes.expert_ops / found[0]
    assert max(one, compute) + (1 - found[1]) * min(one, compute) == pytest.approx(seconds(4), rel=0.05)


def test_all_resources_are_named() -> None:
    assert set(Predictor(K2, RATES, "mapped").prefill(3).parts) == set(RESOURCES)
