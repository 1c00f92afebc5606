"""The bench of a card's memory, with the CPU as the card: every row comes, and counts what is there."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from bench.device_memory import Counters, fitted, planned
from bench.device_slice import published_spec
from bench.gpu_memory import CAP_MIB, Filled
from bench.gpu_memory import CONTEXT as CONTEXT_TOKENS
from k2hybrid.checkpoint.spec import ModelSpec, read_spec
from k2hybrid.config import MINI_MODEL
from k2hybrid.experts.prediction import ModelSizes
from k2hybrid.model.card_memory import MIB, CardWishes
from k2hybrid.runtime.device import Device, open_device
from k2hybrid.runtime.random_bytes import arena_bytes
from tests.mini_sizes import ROUTED_EXPERTS

CONTEXT, CAP = 1024, 2 << 30
WISHES = CardWishes(dense="int8", rows="fp8", context=CONTEXT, chunk=512, graph_rows=2)


def tensor_bytes() -> int:
    """Of all tensors that Python has, each storage once."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Played:
    """Counters of a card that is the CPU: tensors are counted, what a driver keeps is made up."""

    def __init__(self) -> None:
        self.most = self.resets = 0
        self.outside = iter([610 * MIB, 615 * MIB, 612 * MIB, 612 * MIB])

    def counters(self) -> Counters:
        return Counters(
            allocated=tensor_bytes,
            most_allocated=lambda: tensor_bytes() + 5 * MIB,
            reserved=lambda: tensor_bytes() + 1 * MIB,
            most_reserved=lambda: tensor_bytes() + 9 * MIB,
            taken=lambda: tensor_bytes() + 1 * MIB + next(self.outside),
            reset=self.reset,
        )

    def reset(self) -> None:
        self.resets += 1


@pytest.fixture
def spec() -> ModelSpec:
    return read_spec(MINI_MODEL)


@pytest.fixture
def device() -> Device:
    found = open_device("emulated")
    assert found is not None
    return found


def filled(spec: ModelSpec, device: Device, cap: int) -> tuple[dict[str, dict[str, Any]], Any, Played]:
    plan, wishes = fitted(spec, cap, WISHES)
    played = Played()
    made = Filled(device, spec, plan, wishes, played.counters(), arena_bytes(8 << 20))
    with torch.no_grad():
        return {row["row"]: row for row in made.rows()}, plan, played


def test_every_row_of_the_table_is_measured(spec: ModelSpec, device: Device) -> None:
    rows, plan, played = filled(spec, device, CAP)
    assert sum(row["planned"] for name, row in rows.items() if name != "all together") == sum(
        need.nbytes for need in plan.needs
    )
    assert rows["latents"]["measured"] == rows["latents"]["planned"]
    assert rows["all together"]["hot_experts"] == plan.hot == ROUTED_EXPERTS
    # Page-locked buffers, which here are tensors like others: twelve, and one for what comes to stay.
    buffers = 13 * ModelSizes.of(spec).experts.expert_bytes
    there = rows["hot experts and ring"]
    assert 0 <= there["measured"] - there["planned"] - buffers < 4096  # tables on the host
    # Embedding, kv_b, router and norms come from the arena: what is in 8 bits has memory of its own here.
    matrices = planned(plan, "weights: matrices")
    assert 0.98 * matrices <= rows["weights"]["measured"] <= 1.02 * planned(plan, "weights")
    assert played.resets == 1
    assert rows["a chunk, and scratch of a layer"]["measured"] == pytest.approx(5 * MIB, abs=64 << 10)
    assert rows["allocator"]["measured"] == 4 * MIB


def test_what_the_driver_keeps_of_a_graph_is_counted_for_all_layers(spec: ModelSpec, device: Device) -> None:
    """Those of two layers are 5 MiB when recorded again; what came with the first was kernels' code."""
    rows, plan, _ = filled(spec, device, CAP)
    assert 0 <= rows["decode graphs"]["measured"] - 5 * MIB * spec.num_layers // 2 < MIB // 4  # and buffers
    assert rows["CUDA context"]["measured"] == 607 * MIB
    whole = rows["all together"]
    assert whole["measured"] > (612 + 7 + 9) * MIB + rows["latents"]["measured"]
    assert whole["planned"] == plan.budget == CAP
    assert whole["holds"] == (whole["measured"] <= CAP)


def test_the_table_is_that_of_the_documents() -> None:
    plan, wishes = fitted(
        published_spec(), CAP_MIB * MIB, CardWishes(dense="int8", rows="fp8", context=CONTEXT_TOKENS)
    )
    assert wishes.chunk == 16_384
    assert planned(plan, "weights") == 9_878_715_648 + 1_023_410_176 + 330_393_600 + 4_026_368
    assert planned(plan, "a chunk", "scratch") == 1_185_284_096 + 1_300_234_240
