"""What a card must hold: integers of Kimi-K2-Thinking, exact budgets, true advice, and real passes."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from k2hybrid.cache.rows import row_format
from k2hybrid.checkpoint.presets import published_config
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.errors import ConfigError
from k2hybrid.experts.dispatch import Dispatcher
from k2hybrid.experts.placement import place_experts
from k2hybrid.experts.plan import CardPlan, Need, expert_needs, ram_needs
from k2hybrid.experts.prediction import ModelSizes
from k2hybrid.experts.store import ExpertStore
from k2hybrid.model import card_memory, flash, layers, mla
from k2hybrid.model.card_memory import (
    CHUNK_STEP,
    MIB,
    CardWishes,
    card_plan,
    largest_chunk,
    largest_context,
    require_card,
    taken,
    weight_bytes,
)
from k2hybrid.model.paged import TorchDecode
from k2hybrid.model.scratch import Cut
from k2hybrid.native.machine import Machine
from tests.golden_model.tiny import CONFIGS, batch_of, config, random_ids, tiny_checkpoint, tiny_model

K2 = ModelSpec.from_config(published_config())
CARD_24 = 24_564 * MIB
CARD_48 = 48 * 10**9
WHOLE_CONTEXT = CardWishes(dense="int8", rows="fp8", context=262_144, chunk=16_384)
AT_128K = CardWishes(dense="int8", rows="fp8", context=131_072, chunk=16_384)
HALF_CONTEXT = CardWishes(context=131_072)
LEAST = CardWishes(dense="int8", rows="fp8", context=64, chunk=CHUNK_STEP, graph_rows=1)
EXPERT = 24_772_608
DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "memory.md"


def by_name(plan: CardPlan) -> dict[str, int]:
    return {need.name: need.nbytes for need in plan.needs}


# --- integers -------------------------------------------------------------------------------------


def test_latents_that_move_pass_through_two_pages() -> None:
    without = by_name(card_plan(K2, 1 << 40, CardWishes(rows="fp8")))
    moved = by_name(card_plan(K2, 1 << 40, CardWishes(rows="fp8", moved=True)))
    assert moved.pop("pages on their way") == 2 * 64 * 61 * 656
    assert moved == without


# Shapes as published, [out, in].
ATTENTION = [(1536, 7168), (12288, 1536), (576, 7168), (7168, 8192)]
SHARED = [(2048, 7168), (2048, 7168), (7168, 2048)]
DENSE = [(18432, 7168), (18432, 7168), (7168, 18432)]
MATRICES = [*ATTENTION * 61, *SHARED * 60, *DENSE, (163_840, 7168)]


@pytest.mark.parametrize("dense", ["bf16", "int8", "fp8"])
def test_weights_are_those_of_the_published_shapes(dense: Any) -> None:
    found = dict(weight_bytes(K2, CardWishes(dense=dense)))
    values = sum(rows * columns for rows, columns in MATRICES)
    rows = sum(rows for rows, _ in MATRICES)
    assert found == {
        "matrices": 2 * values if dense == "bf16" else values + 4 * rows,
        "kv_b": 61 * 2 * 16_384 * 512,
        "router": 60 * (2 * 384 * 7168 + 4 * 384),
        "norms": 4 * (61 * (2 * 7168 + 1536 + 512) + 7168),
    }
    embedded = dict(weight_bytes(K2, CardWishes(dense=dense, embedding=True)))
    assert embedded == {**found, "embedding": 2 * 163_840 * 7168}


def test_weights_in_bf16_are_what_the_plan_counts() -> None:
    """Apart from norms, which are kept in fp32: twice the bytes of the file."""
    sizes = ModelSizes.of(K2)
    found = dict(weight_bytes(K2, CardWishes()))
    assert sum(found.values()) - found["norms"] // 2 == sizes.dense_bytes + sizes.head_bytes


def test_the_whole_context_fits_beside_24_gb() -> None:
    plan = require_card(K2, CARD_24, WHOLE_CONTEXT)
    needs = by_name(plan)
    assert needs["latents, 262,144 tokens"] == 262_144 * 61 * 656
    assert needs["weights: matrices"] == 9_878_715_648
    assert needs["a chunk of 16,384 rows"] == 16_384 * (10 * 7168 + 24 + 4 * 64 + 48 * 8)
    assert needs["ring of a streamed prefill"] == 8 * EXPERT <= 10**9
    assert sum(needs.values()) + plan.spare == CARD_24
    assert plan.spare >= 0


def test_a_chunk_of_16k_fits_beside_24_gb_at_128k() -> None:
    plan = require_card(K2, CARD_24, AT_128K)
    assert plan.hot > 100
    assert by_name(plan)[f"hot experts, {plan.hot} of 23,040"] == plan.hot * EXPERT + 12 * 61 * 384
    assert 0 <= plan.spare < EXPERT
    assert sum(by_name(plan).values()) + plan.spare == CARD_24
    # Absorbed attention: queries and room for the result in bf16; 512 queries in latent space in fp32 and in
    # bf16, what they found, and its values; blocks and tiles.
    row, absorbed = 2 * 64 * 192 + 2 * 64 * 128, 8 * 64 * 512 + 4 * 64 * 128
    assert by_name(plan)["scratch of a layer"] == 16_384 * row + 512 * absorbed + (456 << 20)
    wished = dataclasses.replace(WHOLE_CONTEXT, chunk=32_768)
    assert largest_chunk(K2, CARD_24, wished) == 16_384
    with pytest.raises(ConfigError, match="a prefill chunk of 16,384 rows; or a context of 202,752 tokens"):
        require_card(K2, CARD_24, wished)


def test_half_the_context_in_bf16_fits_beside_48_gb() -> None:
    plan = require_card(K2, CARD_48, HALF_CONTEXT)
    needs = by_name(plan)
    assert needs["latents, 131,072 tokens"] == 131_072 * 70_272
    assert needs["weights: matrices"] + needs["weights: kv_b"] + needs["weights: router"] > 21.0e9
    assert sum(needs.values()) + plan.spare == CARD_48


def test_a_model_without_experts_needs_no_ring() -> None:
    spec = ModelSpec.from_config(config(**CONFIGS["no_moe"]))
    names = list(by_name(card_plan(spec, 4 << 30, CardWishes(context=64))))
    assert not [name for name in names if "expert" in name or "ring" in name]
    assert by_name(card_plan(K2, 1 << 50, CardWishes()))["hot experts, 23,040 of 23,040"] > 23_040 * EXPERT


# --- what fits ------------------------------------------------------------------------------------

WISHES = [
    CardWishes(),
    HALF_CONTEXT,
    WHOLE_CONTEXT,
    CardWishes(rows="fp8", context=100_000, longest=50_000, chunk=4096, embedding=True),
    CardWishes(dense="fp8", context=1_000_000, longest=262_144, graph_rows=4),
]


@pytest.mark.parametrize("gib", [12, 16, 23.99, 32, 48, 80])
@pytest.mark.parametrize("wishes", WISHES, ids=str)
def test_the_largest_are_the_largest(wishes: CardWishes, gib: float) -> None:
    budget = int(gib * 2**30)
    context = largest_context(K2, budget, wishes)
    chunk = largest_chunk(K2, budget, wishes)
    longest = wishes.longest

    def with_context(tokens: int) -> int:
        least = None if longest is None else min(longest, tokens)
        return taken(K2, dataclasses.replace(wishes, context=tokens, longest=least))

    assert context % 64 == 0
    assert not context or with_context(context) <= budget
    assert with_context(context + 64) > budget or context == 262_144 * wishes.graph_rows
    assert not chunk or taken(K2, dataclasses.replace(wishes, chunk=chunk)) <= budget
    more = dataclasses.replace(wishes, chunk=chunk + CHUNK_STEP)
    assert taken(K2, more) > budget or chunk == wishes.chunk // CHUNK_STEP * CHUNK_STEP


@pytest.mark.parametrize("gib", [12, 13, 16, 20, 24, 32])
@pytest.mark.parametrize("wishes", WISHES, ids=str)
def test_advice_is_true(wishes: CardWishes, gib: int) -> None:
    """Each alternative that a refusal names fits once it is followed; what fits is not refused."""
    budget = gib << 30
    plan = card_plan(K2, budget, wishes)
    if taken(K2, wishes) <= budget:
        assert not plan.problem
        assert plan.spare >= 0
        return
    assert plan.spare < 0
    with pytest.raises(ConfigError, match="lack") as refused:
        require_card(K2, budget, wishes)
    assert str(refused.value) == plan.problem
    advice = plan.problem.partition("what would fit: ")[2]
    if advice.startswith("nothing"):
        assert taken(K2, LEAST) > budget
        return
    assert advice
    for alternative in advice.split("; or "):
        changed = wishes
        if found := re.search(r"chunk of ([\d,]+)", alternative):
            changed = dataclasses.replace(changed, chunk=int(found[1].replace(",", "")))
        if found := re.search(r"context of ([\d,]+)", alternative):
            tokens = int(found[1].replace(",", ""))
            longest = None if wishes.longest is None else min(wishes.longest, tokens)
            changed = dataclasses.replace(changed, context=tokens, longest=longest)
        if "--latent-rows fp8" in alternative:
            changed = dataclasses.replace(changed, rows="fp8")
        if "--dense-weights int8" in alternative:
            changed = dataclasses.replace(changed, dense="int8")
        if "one graph" in alternative:
            changed = dataclasses.replace(changed, graph_rows=1, embedding=False)
        assert changed != wishes
        assert taken(K2, changed) <= budget


def test_a_card_that_can_hold_nothing_is_told_the_least() -> None:
    plan = card_plan(K2, 8 << 30, CardWishes())
    found = re.search(r"least that this model takes is ([\d.]+) GiB", plan.problem)
    assert found is not None
    assert float(found[1]) == pytest.approx(taken(K2, LEAST) / 2**30, abs=0.05)


# --- real passes ----------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Bytes of tensors that were made under it and are still there; the most that there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, int] = {}
        self._now = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(one) for one in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if id(storage) not in given and id(storage) not in self._live:
                self._live[id(storage)] = storage.nbytes()
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._gone, id(storage))
        return out

    def _gone(self, number: int) -> None:
        self._now -= self._live.pop(number)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def unseen(work: Callable[..., None]) -> Callable[..., None]:
    """The same, but what it makes for the moment is not counted: a kernel has that in registers."""

    def hidden(*args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():  # type: ignore[no-untyped-call]
            work(*args, **kwargs)

    return hidden


class OnCard:
    """As `DeviceLinears`: of what is between products, the rows' kernels make their results alone."""

    def __init__(self, machine: Machine) -> None:
        self.rows = machine.rows
        self.linear = machine.linear
        self.head_linear = machine.head_linear
        self.head_linear_t = machine.head_linear_t


@pytest.mark.parametrize("rows", ["bf16", "fp8"])
@pytest.mark.parametrize("name", ["k2", "no_moe", "wide_latent", "beta_fast_32_odd_sizes"])
def test_a_chunk_takes_no_more_than_its_two_rows_say(
    name: str, rows: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefills of this code on the CPU, all of whose tensors are counted; attention's part made small.

    One long sequence, and many short ones, whose queries go to latent space.
    """
    count, before = 384, 128
    small = Cut(block_bytes=1 << 16, tile_bytes=1 << 15, rounded=True)
    monkeypatch.setattr(mla, "HEAD_GROUPS", 1)  # as on a device
    monkeypatch.setattr(flash, "attend_block", unseen(flash.attend_block))
    monkeypatch.setattr(card_memory, "EXPERT_TILE_ROWS", 0)  # experts are in RAM, their tensors nobody's
    for module in (mla, card_memory):
        monkeypatch.setattr(module, "ON_DEVICE", small)
        monkeypatch.setattr(module, "ABSORBED_ROWS", 64)
    for module in (layers, card_memory):
        monkeypatch.setattr(module, "MLP_ROWS", 128)
    checkpoint = tiny_checkpoint(name)
    spec = checkpoint.spec
    store = ExpertStore(
        layers=spec.num_layers,
        experts=spec.num_experts,
        hidden=spec.hidden_size,
        inter=spec.moe_intermediate_size,
    )
    checkpoint.fill(store)
    dispatcher = Dispatcher(store, machine, max_rows=count, top_k=spec.top_k)
    stored = row_format(rows, spec.kv_lora_rank, spec.qk_rope_head_dim)
    kernels = OnCard(machine)
    model = tiny_model(checkpoint, torch.bfloat16, kernels=kernels, experts=dispatcher, rows=stored)
    for layer in model.model.layers:
        layer.attention.decode = TorchDecode(model.pages)  # as on a device; no span has one token
    ids, table = random_ids(spec, before + count), model.table(before + count)
    model.run(batch_of([(ids[:before], 0, table)]))
    short = math.ceil(model.model.sizes.absorbed_below) - 1
    peaks = []
    for spans in (
        [(ids[before:], before, table)],
        [(ids[:short], 0, model.table(short)) for _ in range(count // short)],
    ):
        with LiveBytes() as live:
            batch = dataclasses.replace(batch_of(spans), logit_rows=torch.tensor([0]))
            model.model.forward(model.model.begin(batch))
            del batch
        peaks.append(live.peak)
    needs = by_name(card_plan(spec, 4 << 30, CardWishes(context=512, chunk=count)))
    counted = needs[f"a chunk of {count} rows"] + needs["scratch of a layer"]
    assert 0.6 * counted <= max(peaks) <= counted, peaks


# --- the document ---------------------------------------------------------------------------------


def table_of(needs: Iterable[Need], spare: int | None = None) -> str:
    """As it stands in docs/memory.md."""
    lines = ["| row | bytes | |", "|---|---:|---|"]
    lines += [f"| {need.name} | {need.nbytes:,} | {need.where} |" for need in needs]
    return "\n".join(lines if spare is None else [*lines, f"| left | {spare:,} | |"])


def card_table(budget: int, wishes: CardWishes) -> str:
    plan = card_plan(K2, budget, wishes)
    return table_of(plan.needs, plan.spare)


def ram_table() -> str:
    sizes = ModelSizes.of(K2, 656)
    placed = place_experts(
        sizes.experts, node_memory={0: 384 << 30, 1: 384 << 30}, reserved_bytes=sizes.resting_bytes
    )
    needs = ram_needs(sizes, "131,072 tokens in fp8", 131_072 * sizes.latent_bytes)
    return table_of([*needs, *expert_needs(sizes.experts, placed)])


@pytest.mark.parametrize(
    "table",
    [
        card_table(CARD_24, WHOLE_CONTEXT),
        card_table(CARD_24, AT_128K),
        card_table(CARD_48, HALF_CONTEXT),
        ram_table(),
    ],
    ids=["24 GB", "24 GB, 128k", "48 GB", "RAM"],
)
def test_the_document_has_the_same_tables(table: str) -> None:
    assert table in DOCUMENT.read_text(encoding="utf-8"), f"docs/memory.md should have\n\n{table}"


def test_planning_memory_needs_no_torch() -> None:
    code = (
        "import sys, k2hybrid.model.card_memory; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'k2hybrid._native')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
