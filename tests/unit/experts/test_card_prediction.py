"""What a card is predicted to do, counted by hand from the published sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from k2hybrid.experts.card_prediction import (
    BUS_SHARE,
    CARD_SHARE,
    LAYER_S,
    CardPredictor,
    CardRates,
)
from k2hybrid.experts.placement import Place
from k2hybrid.experts.prediction import ModelSizes, Predictor, Rates
from k2hybrid.experts.split import HANDOFF_S, LAUNCH_S, PLAN_S
from tests.k2_rates import K2, RATES, SPEC

EXPERT = 24_772_608  # bytes
SHARED = 60 * 3 * 7168 * 2048
MEMORY, FLOP, BUS = CARD_SHARE * 1000e9, CARD_SHARE * 200e12, BUS_SHARE * 25e9
CROSSING = (6 * 7168 + 8 * 8) / BUS  # of a row, there and back


def predictor(
    hot: int = 0, chunk: int = 16384, place: Place = "resident", rates: Rates = RATES, **cpu: Any
) -> CardPredictor:
    return CardPredictor(
        Predictor(K2, rates, place, **cpu), CardRates(1000.0, 25.0, 200.0), chunk=chunk, hot=hot
    )


def test_the_published_model() -> None:
    assert K2.experts.expert_bytes == EXPERT
    assert (K2.shared_bytes, K2.shared_ops) == (2 * SHARED, SHARED)
    assert 2 * K2.absorbed_ops == 139_264  # a row and token of context, a layer
    assert K2.expanded_ops == 64 * (192 + 128)


def test_a_step_waits_for_the_cpu_and_reads_the_rest_on_the_card() -> None:
    found = predictor().decode(1, 32768)
    experts = 60 * 8 * EXPERT / 85e9
    read = (K2.dense_bytes - K2.shared_bytes + K2.head_bytes + 32768 * 70_272) / MEMORY
    assert found.parts["RAM bandwidth"] == pytest.approx(experts)
    assert found.parts["GPU memory"] == pytest.approx(read)
    assert found.parts["PCIe"] == pytest.approx(60 * CROSSING)
    assert found.parts["overhead"] == pytest.approx(61 * LAYER_S + 60 * HANDOFF_S + RATES.sample_s)
    assert found.seconds == pytest.approx(sum(found.parts.values()))
    assert found.limit == "RAM bandwidth"


def test_the_shared_expert_counts_where_the_cpu_is_faster() -> None:
    fast = dataclasses.replace(RATES, arena_gb_s=1e6, expert_ops=1e18)
    slow = CardPredictor(Predictor(K2, fast, "resident"), CardRates(10.0, 25.0, 200.0), chunk=512, hot=0)
    found = slow.decode(1, 1)
    assert found.parts["RAM bandwidth"] == 0
    assert found.parts["GPU memory"] == pytest.approx(
        (K2.dense_bytes + K2.head_bytes + K2.latent_bytes) / (CARD_SHARE * 10e9)
    )


def test_attention_of_many_long_contexts_is_arithmetic() -> None:
    """139,264 operations beside 1,152 bytes: 8-bit rows make it bound by them on this card."""
    narrow = ModelSizes.of(SPEC, 656)
    cpu = Predictor(narrow, RATES, "resident")
    found = CardPredictor(cpu, CardRates(1000.0, 25.0, 100.0), chunk=512, hot=0).decode(8, 32768)
    assert found.parts["GPU arithmetic"] == pytest.approx(8 * 32768 * 61 * 139_264 / (CARD_SHARE * 100e12))


def test_hot_experts_are_the_cards() -> None:
    """A third of them is there, so a third of the step's, and the CPU takes longer still."""
    all_, third = predictor().decode(1, 1), predictor(hot=23040 // 3).decode(1, 1)
    assert third.parts["RAM bandwidth"] == pytest.approx(2 / 3 * all_.parts["RAM bandwidth"])
    # All of them are there: of 8 the card takes what lets both end soonest, and takes longer itself.
    every = predictor(hot=23040).decode(1, 1)
    card = {n: 2 * SHARED / 60 / MEMORY + LAUNCH_S + n * EXPERT / MEMORY for n in range(1, 9)}
    cpu = {n: (8 - n) * EXPERT / 85e9 + HANDOFF_S for n in card}
    best = min(card, key=lambda n: max(card[n], cpu[n]))
    assert card[best] > cpu[best]
    assert every.parts["RAM bandwidth"] == 0
    alone = all_.parts["GPU memory"]
    assert every.parts["GPU memory"] == pytest.approx(alone + 60 * card[best])


def test_a_large_chunk_goes_over_the_bus() -> None:
    """With a CPU that computes nothing all 384 experts of a layer are streamed."""
    hopeless = dataclasses.replace(RATES, expert_ops=1e6)
    found = predictor(rates=hopeless).prefill(16384)
    assert found.parts["PCIe"] == pytest.approx(60 * 384 * EXPERT / BUS)
    assert found.parts["overhead"] == pytest.approx(61 * LAYER_S + 60 * PLAN_S + RATES.sample_s)
    weights = 2 * 16384 * (K2.dense_ops - K2.shared_ops - K2.kv_b_ops)
    seen = 2 * 16384 * K2.kv_b_ops + 2 * 16384 * 8192 * 61 * K2.expanded_ops
    assert found.parts["GPU arithmetic"] == pytest.approx((weights + seen) / FLOP)
    half = predictor(rates=hopeless, chunk=8192).prefill(16384)
    assert half.parts["PCIe"] == pytest.approx(2 * found.parts["PCIe"])
    # Of a layer's experts a quarter lies on the card.
    hot = predictor(rates=hopeless, hot=23040 // 4).prefill(16384)
    assert hot.parts["PCIe"] == pytest.approx(0.75 * found.parts["PCIe"])


def test_a_short_prompt_is_handed_to_the_cpu() -> None:
    found = predictor().prefill(16)
    same = Predictor(K2, RATES, "resident").experts(16)
    for name in ("RAM bandwidth", "arithmetic"):
        assert found.parts[name] == pytest.approx(same[name])
    assert found.parts["PCIe"] == pytest.approx(60 * 16 * CROSSING)


def test_missed_experts_of_a_large_chunk_wait_for_the_disk() -> None:
    found = predictor(place="streamed", disk_gb_s=2.0, hit_rate=0.25).prefill(16384)
    assert found.parts["disk"] == pytest.approx(60 * 384 * 0.75 * EXPERT / 2e9)
    assert found.parts["PCIe"] == 0


def test_buffers_cost_what_the_ram_has_left() -> None:
    """Mapped experts pass the RAM three times on their way, resident ones once."""
    slow = dataclasses.replace(RATES, expert_ops=1e6, mapped_gb_s=30.0, arena_gb_s=30.0)
    mapped, resident = (predictor(place=place, rates=slow).prefill(16384) for place in ("mapped", "resident"))
    assert resident.limit == "PCIe"
    assert mapped.parts["RAM bandwidth"] == pytest.approx(3 * 60 * 384 * EXPERT / 30e9)


def test_a_model_without_routed_experts() -> None:
    for experts in (0, 384):  # a config may name some that no layer has
        sizes = dataclasses.replace(K2, experts=dataclasses.replace(K2.experts, layers=0, experts=experts))
        cpu = Predictor(sizes, RATES, "mapped")
        card = CardPredictor(cpu, CardRates(1000.0, 25.0, 200.0), chunk=512, hot=0)
        assert card.decode(1, 1).parts["PCIe"] == 0
        assert card.prefill(2048).parts["PCIe"] == 0
