"""Our logits against transformers' DeepseekV3ForCausalLM, on tiny models that differ in every dimension."""

from __future__ import annotations

import pytest
import torch

from k2hybrid.cache.rows import Fp8Rows
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.experts.dispatch import Dispatcher
from k2hybrid.experts.store import ExpertStore
from k2hybrid.native.machine import Machine
from tests.golden_model import compare, faults
from tests.golden_model.compare import bf16_bound, checkpoint, oracle, prefill_at_once, run_forced
from tests.golden_model.faults import FAULTS, Fault
from tests.golden_model.tiny import CONFIGS, TinyModel, tiny_model


def native_model(name: str, machine: Machine) -> TinyModel:
    """Everything through the C++ kernels."""
    spec = checkpoint(name).spec
    store = ExpertStore(
        layers=spec.num_layers,
        experts=spec.num_experts,
        hidden=spec.hidden_size,
        inter=spec.moe_intermediate_size,
    )
    checkpoint(name).fill(store)
    dispatcher = Dispatcher(store, machine, max_rows=compare.TOKENS, top_k=spec.top_k)
    return tiny_model(checkpoint(name), torch.bfloat16, kernels=machine, experts=dispatcher)


def margin(biased: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    """By how much every score of a row, fp32 [T], must be off before another expert can be chosen."""
    open_scores = biased
    margins = torch.full(biased.shape[:1], torch.inf)
    if spec.n_group > spec.topk_group:
        groups = biased.view(len(biased), spec.n_group, -1)
        sums, order = groups.topk(2, dim=-1).values.sum(-1).sort(descending=True)
        # A group's sum moves by twice the error of a score, and so does its rival's.
        margins = (sums[:, spec.topk_group - 1] - sums[:, spec.topk_group]) / 4
        kept = order[:, : spec.topk_group, None].expand(-1, -1, groups.shape[-1])
        open_scores = groups.gather(1, kept).flatten(1)
    ranked = open_scores.sort(descending=True).values
    if ranked.shape[1] > spec.top_k:
        margins = torch.minimum(margins, (ranked[:, spec.top_k - 1] - ranked[:, spec.top_k]) / 2)
    return margins


NAMES = [*CONFIGS, "mini"]


@pytest.mark.parametrize("name", NAMES)
def test_fp32_agrees_to_1e_4(name: str) -> None:
    model = tiny_model(checkpoint(name), torch.float32)
    logits = model.prefill(compare.prompt(name))
    reference = oracle(name)
    assert compare.same_experts(model.experts.ids, reference.ids)
    for ours, ids, weights, wanted in zip(
        model.experts.weights, model.experts.ids, reference.weights, reference.ids, strict=True
    ):
        by_id = torch.argsort(ids)
        assert torch.allclose(
            ours.gather(1, by_id), weights.gather(1, wanted.argsort()), rtol=compare.FP32_BOUND
        )
    assert compare.largest_error(logits, reference.logits) <= compare.FP32_BOUND


@pytest.mark.parametrize("kernels", ["torch", "native", "fused"])
@pytest.mark.parametrize("name", NAMES)
def test_bf16_agrees_within_the_derived_bound(
    name: str, kernels: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle's experts are used, so that a near tie is not taken for an error; ties are judged below."""
    spec, reference, bound = checkpoint(name).spec, oracle(name), bf16_bound(name, "expanded")
    monkeypatch.setattr(machine, "tiles", kernels == "fused")
    model = (
        tiny_model(checkpoint(name), torch.bfloat16) if kernels == "torch" else native_model(name, machine)
    )
    with compare.forced_form("expanded"):
        run = run_forced(model, name, prefill_at_once(name))
    assert compare.relative_error(run.logits, reference.logits) <= bound.logits
    assert compare.score_error(run, reference) <= bound.scores
    for ours, own, scores, ids in zip(run.biased, run.own_ids, reference.biased, reference.ids, strict=True):
        differs = (own.sort().values != ids.sort().values).any(-1)
        error = (ours - scores).abs().amax(-1)
        assert torch.all(margin(scores, spec)[differs] <= error[differs])


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
@pytest.mark.parametrize("name", NAMES)
def test_fp8_rows_agree_within_their_bound(name: str, form: str) -> None:
    """The same derivation with e4m3's error on what is stored; the bound is no looser than bf16's own."""
    spec, bound = checkpoint(name).spec, bf16_bound(name, form, "fp8")
    rows = Fp8Rows(spec.kv_lora_rank, spec.qk_rope_head_dim)
    model = tiny_model(checkpoint(name), torch.bfloat16, rows=rows)
    with compare.forced_form(form):
        run = run_forced(model, name, prefill_at_once(name))
    error = compare.relative_error(run.logits, oracle(name).logits)
    assert bound.logits / 4 <= error <= bound.logits
    assert compare.score_error(run, oracle(name)) <= bound.scores


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_fails_both_comparisons(fault: Fault) -> None:
    names = [name for name in CONFIGS if faults.affected(fault, checkpoint(name))]
    assert "k2" in names
    for name in names:
        unharmed = bf16_bound(name, "expanded")  # drawn before the fault is planted
        assert unharmed.logits < 0.2
        with fault():
            assert compare.fp32_error(name) > compare.FP32_BOUND
            assert compare.bf16_error(name) > 1
