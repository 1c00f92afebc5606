"""One comparison of our model with the oracle, by dtype: the tests and the planted faults use the same."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.model import router
from k2hybrid.model.attention import AttentionSizes
from k2hybrid.model.moe import MoE
from tests.golden_model.noise import SAFETY, disturbed_model
from tests.golden_model.oracle import OracleRun, run_oracle
from tests.golden_model.tiny import (
    TinyCheckpoint,
    TinyModel,
    folder_checkpoint,
    random_ids,
    tiny_checkpoint,
    tiny_model,
)

TOKENS = 90  # over a page
FP32_BOUND = 1e-4
DRAWS = 4


# The model that ships with the package, beside the random ones.
MINI = Path(__file__).resolve().parents[2] / "k2hybrid" / "mini"


@functools.cache
def checkpoint(name: str) -> TinyCheckpoint:
    """The random model of a configuration, or the built-in one ("mini"), made once."""
    return folder_checkpoint(MINI) if name == "mini" else tiny_checkpoint(name)


@functools.cache
def prompt(name: str) -> torch.Tensor:
    """Its token ids."""
    return random_ids(checkpoint(name).spec, TOKENS)


@functools.cache
def oracle(name: str) -> OracleRun:
    """What transformers makes of it."""
    return run_oracle(checkpoint(name), prompt(name))


def forced_form(form: str) -> AbstractContextManager[object]:
    """Make every span take one form of attention, "absorbed" or "expanded", however long it is."""
    threshold = {"absorbed": math.inf, "expanded": 0.0}[form]
    return mock.patch.object(AttentionSizes, "absorbed_below", threshold)


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """‖ours − reference‖ / ‖reference‖ over all rows."""
    return float(torch.linalg.vector_norm(ours - reference) / torch.linalg.vector_norm(reference))


def largest_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """max |ours − reference| / max |reference|; a NaN counts as infinite."""
    error = float((ours - reference).abs().max() / reference.abs().max())
    return math.inf if math.isnan(error) else error


def same_experts(ids: list[torch.Tensor], reference: list[torch.Tensor]) -> bool:
    """Whether every row of every layer chose the same set."""
    return len(ids) == len(reference) and all(
        torch.equal(a.long().sort().values, b.sort().values) for a, b in zip(ids, reference, strict=True)
    )


@dataclass(frozen=True, slots=True)
class ForcedRun:
    """A prefill whose rows went to the oracle's experts; what each MoE layer would have chosen itself."""

    logits: torch.Tensor
    biased: list[torch.Tensor]
    own_ids: list[torch.Tensor]


def run_forced(model: TinyModel, name: str, prefill: Callable[[TinyModel], torch.Tensor]) -> ForcedRun:
    """`prefill` of `prompt(name)` at once, with the oracle's choice of experts in every layer."""
    forced = iter(oracle(name).ids)
    run = ForcedRun(torch.empty(0), [], [])
    choose = router.choose

    def forced_choose(scores: torch.Tensor, bias: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
        run.biased.append(scores + bias)
        run.own_ids.append(choose(scores, bias, spec))
        return next(forced)

    for layer in model.model.layers:
        if isinstance(layer.feed_forward, MoE):
            layer.feed_forward.router.rows = None  # the kernel has no place where to force a choice
    with mock.patch.object(router, "choose", forced_choose):
        return ForcedRun(prefill(model), run.biased, run.own_ids)


def prefill_at_once(name: str) -> Callable[[TinyModel], torch.Tensor]:
    """All of the prompt in one pass."""
    return lambda model: model.prefill(prompt(name))


@dataclass(frozen=True, slots=True)
class Bf16Bound:
    """SAFETY times the root mean square over draws: relative error of logits; error of router scores."""

    logits: float
    scores: float


@functools.cache
def bf16_bound(name: str, form: str, rows: str = "bf16") -> Bf16Bound:
    """The bound of docs/numerics.md for one configuration, form of attention and format of latent rows."""
    reference = oracle(name)
    with forced_form(form):
        runs = [
            run_forced(disturbed_model(checkpoint(name), seed, rows), name, prefill_at_once(name))
            for seed in range(DRAWS)
        ]

    def rms(values: list[float]) -> float:
        return math.sqrt(sum(v * v for v in values) / len(values))

    return Bf16Bound(
        SAFETY * rms([relative_error(run.logits, reference.logits) for run in runs]),
        SAFETY * rms([score_error(run, reference) for run in runs]),
    )


def score_error(run: ForcedRun, reference: OracleRun) -> float:
    """Root mean square error of the router's biased scores over all layers; 0 without MoE layers."""
    if not reference.biased:
        return 0.0
    return (torch.cat(run.biased) - torch.cat(reference.biased)).square().mean().sqrt().item()


def fp32_error(name: str) -> float:
    """Largest relative error in fp32; infinite where other experts were chosen."""
    model = tiny_model(checkpoint(name), torch.float32)
    logits = model.prefill(prompt(name))
    if not same_experts(model.experts.ids, oracle(name).ids):
        return math.inf
    return largest_error(logits, oracle(name).logits)


def bf16_error(name: str, model: TinyModel | None = None, form: str = "expanded") -> float:
    """Relative error in bf16 as a share of the bound; the experts are the oracle's."""
    model = model or tiny_model(checkpoint(name), torch.bfloat16)
    with forced_form(form):
        run = run_forced(model, name, prefill_at_once(name))
    return relative_error(run.logits, oracle(name).logits) / bf16_bound(name, form).logits
