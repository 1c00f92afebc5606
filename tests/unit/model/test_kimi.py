"""The whole model over its explicit state: chunks, pauses, batches, failures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from k2hybrid.cache.pages import LatentPages
from k2hybrid.cache.rows import Bf16Rows, row_format
from k2hybrid.errors import ConfigError
from k2hybrid.experts.dispatch import Dispatcher
from k2hybrid.experts.reference import ReferenceExperts, ReferenceTicket
from k2hybrid.experts.store import ExpertStore
from k2hybrid.model import attention, layers, mla
from k2hybrid.model.kimi import Kimi
from k2hybrid.model.layers import TorchLinears
from k2hybrid.native.machine import Machine
from tests.golden_model import compare
from tests.golden_model.tiny import (
    TinyModel,
    batch_of,
    random_ids,
    tiny_checkpoint,
    tiny_model,
)

NAMES = ["k2", "no_q_lora_groups_3_dense_no_yarn", "wide_latent"]
CHUNKINGS = {"1+rest": [1, 200], "sevens": [7], "page+rest": [64, 200], "60+ones": [60, 1]}
FORMS = ["absorbed", "expanded"]
ROWS = ["bf16", "fp8"]


def native_model(name: str, machine: Machine, rows: str = "bf16") -> TinyModel:
    """bf16 through the C++ kernels, with latent rows in the format `rows`."""
    checkpoint = tiny_checkpoint(name)
    spec = checkpoint.spec
    store = ExpertStore(
        layers=spec.num_layers,
        experts=spec.num_experts,
        hidden=spec.hidden_size,
        inter=spec.moe_intermediate_size,
    )
    checkpoint.fill(store)
    dispatcher = Dispatcher(store, machine, max_rows=200, top_k=spec.top_k)
    stored = row_format(rows, spec.kv_lora_rank, spec.qk_rope_head_dim)
    return tiny_model(checkpoint, torch.bfloat16, kernels=machine, experts=dispatcher, rows=stored)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunking", CHUNKINGS)
@pytest.mark.parametrize("name", NAMES)
def test_any_chunking_and_form_agrees_in_fp32(name: str, chunking: str, form: str) -> None:
    ids = compare.prompt(name)
    whole = tiny_model(compare.checkpoint(name), torch.float32).prefill(ids)
    with compare.forced_form(form):
        pieces = tiny_model(compare.checkpoint(name), torch.float32).prefill(ids, CHUNKINGS[chunking])
    assert compare.largest_error(pieces, whole) <= 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_either_form_agrees_with_the_oracle_in_bf16(name: str, form: str, machine: Machine) -> None:
    """So any two ways to compute a context, and any mix of them, differ by at most twice the bound."""
    assert compare.bf16_error(name, native_model(name, machine), form) <= 1


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("form", FORMS)
def test_blocks_and_tiles_merge_to_the_same(form: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny_checkpoint("k2")
    ids = random_ids(checkpoint.spec, 300)
    with compare.forced_form(form):
        whole = tiny_model(checkpoint, torch.float32).prefill(ids, [120, 300])
        monkeypatch.setattr(attention, "block_rows", lambda *_: block)
        monkeypatch.setattr(attention, "tile_rows", lambda *_: 37)
        blocks = tiny_model(checkpoint, torch.float32).prefill(ids, [120, 300])
    assert compare.largest_error(blocks, whole) <= 1e-5


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", NAMES)
def test_pausing_after_each_part_of_a_layer_changes_nothing(name: str, rows: str, machine: Machine) -> None:
    model = native_model(name, machine, rows)
    spec = model.model.spec
    ids, other = random_ids(spec, 70), random_ids(spec, 20, seed=8)
    whole = model.prefill(ids)
    table, other_table = model.table(70), model.table(20)
    state = model.model.begin(batch_of([(ids, 0, table)]))
    for part in range(model.model.parts):
        assert state.part == part
        model.model.forward(state, until=part + 1)
        model.run(batch_of([(other, 0, other_table)]))  # somebody else's pass in between
    assert torch.equal(model.model.logits(state), whole)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", NAMES)
def test_decode_logits_do_not_depend_on_the_batch(name: str, rows: str, machine: Machine) -> None:
    """Bit for bit: alone, or among decodes at other lengths and a chunk of prefill, before and behind."""
    model = native_model(name, machine, rows)
    spec = model.model.spec
    lengths = [70, 1, 33, 64]
    prompts = [random_ids(spec, n, seed=n) for n in lengths]
    tables = [model.table(n + 1) for n in lengths]
    for prompt, table in zip(prompts, tables, strict=True):
        model.run(batch_of([(prompt, 0, table)]))
    nexts = [torch.tensor([5 + n % 7]) for n in lengths]
    decodes = list(zip(nexts, lengths, tables, strict=True))
    alone = [model.run(batch_of([one])) for one in decodes]
    chunk = random_ids(spec, 90, seed=9)
    for before in (0, 2, 4):
        mixed = [*decodes[:before], (chunk, 0, model.table(90)), *decodes[before:]]
        logits = model.run(batch_of(mixed))
        rows = [*range(before), *range(before + 90, len(logits))]
        for row, wanted in zip(rows, alone, strict=True):
            assert torch.equal(logits[row : row + 1], wanted)


def test_only_the_wanted_rows_get_logits() -> None:
    model = tiny_model(tiny_checkpoint("k2"), torch.float32)
    ids = random_ids(model.model.spec, 12)
    every = model.prefill(ids)
    batch = batch_of([(ids, 0, model.table(12))])
    some = model.run(type(batch)(batch.ids, batch.positions, batch.spans, torch.tensor([11, 3])))
    assert torch.allclose(some, every[[11, 3]], rtol=1e-5, atol=1e-5)


class FailingExperts(ReferenceExperts):
    """Cannot read what row 2 of the last layer needs."""

    def submit(
        self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> ReferenceTicket:
        out = super().submit(layer, x, ids, weights).collect()
        return ReferenceTicket(out, failed_rows=(2,) if layer == 2 else ())


def test_failed_rows_are_named_and_others_go_on() -> None:
    checkpoint = tiny_checkpoint("k2")
    experts = FailingExperts(torch.float32)
    checkpoint.fill(experts)
    model = tiny_model(checkpoint, torch.float32, experts=experts)
    ids = random_ids(checkpoint.spec, 5)
    state = model.model.begin(batch_of([(ids, 0, model.table(5))]))
    model.model.forward(state, until=2 * model.model.layers[0].parts)
    assert state.failed_rows == set()
    model.model.forward(state)
    assert state.failed_rows == {2}


@pytest.mark.parametrize(
    ("rows", "dtype", "message"),
    [
        (Bf16Rows(7), torch.bfloat16, "7 values"),
        (Bf16Rows(40), torch.float16, "not torch.float16"),
    ],
)
def test_what_does_not_fit_is_refused(rows: Any, dtype: torch.dtype, message: str) -> None:
    checkpoint = tiny_checkpoint("k2")
    pages = LatentPages(checkpoint.spec.num_layers, 1, rows)
    with pytest.raises(ConfigError, match=message):
        Kimi(checkpoint.spec, checkpoint, ReferenceExperts(), TorchLinears(), pages, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["k2", "no_moe", "beta_fast_32_odd_sizes"])  # of 4, 7 and 5 heads
def test_how_a_pass_is_cut_changes_no_bit(
    name: str, dtype: torch.dtype, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Absorbed spans together or few by few, an MLP in tiles, heads in groups."""

    def logits() -> torch.Tensor:
        model = (
            native_model(name, machine)
            if dtype == torch.bfloat16
            else tiny_model(tiny_checkpoint(name), dtype)
        )
        spans = [(random_ids(model.model.spec, n, seed=n), 0, model.table(n)) for n in (100, 20, 7, 19, 25)]
        return model.run(batch_of(spans))

    whole = logits()
    monkeypatch.setattr(mla, "ABSORBED_ROWS", 30)
    assert torch.equal(logits(), whole)
    monkeypatch.setattr(layers, "MLP_ROWS", 16)
    assert torch.equal(logits(), whole)
    monkeypatch.setattr(mla, "HEAD_GROUPS", 1)
    assert torch.equal(logits(), whole)
