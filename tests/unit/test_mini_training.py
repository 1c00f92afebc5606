"""The trainer's arithmetic: branches, fused gradients, the packing, and its model against transformers'."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from k2hybrid.mini_eval.deepseek import config_values
from tools.mini import model as trainer
from tools.mini.export import model_config
from tools.mini.model import MiniConfig, MiniModel, as_exported, causal_masks, fake_quantize, spans
from tools.mini.optim import orthogonalize
from tools.mini.packing import IGNORED, MAX_TOKENS, Batch, Lesson, Packer, Segment, pack
from tools.mini.pieces import Example

VOCAB = 320
PAD = VOCAB - 1
CONFIG = MiniConfig(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=128,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    q_lora_rank=32,
    kv_lora_rank=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    compute=torch.float32,
)


def new_model(seed: int = 0) -> MiniModel:
    torch.manual_seed(seed)
    return MiniModel(CONFIG)


def random_ids(rng: random.Random, n: int) -> list[int]:
    return rng.choices(range(PAD), k=n)


def random_lesson(rng: random.Random, prefix: int, branches: tuple[int, ...]) -> Lesson:
    """The second half of each branch is learnt."""
    examples = [Example(random_ids(rng, n), [at >= n // 2 for at in range(n)]) for n in branches]
    return Lesson(random_ids(rng, prefix), examples)


def laid_out_plainly(lesson: Lesson) -> list[Lesson]:
    """Each branch as a document of its own that repeats the prefix."""
    unlearnt = [False] * len(lesson.prefix)
    return [Lesson([], [Example(lesson.prefix + b.ids, unlearnt + b.learn)]) for b in lesson.branches]


def learnt_logits(model: MiniModel, batch: Batch) -> Tensor:
    """Without the rows that only fill up the batch."""
    logits: Tensor = model(batch)
    return logits[batch.labels != IGNORED]


def largest_error(ours: Tensor, theirs: Tensor) -> float:
    """Relative to the largest value."""
    return float(((ours - theirs).abs().max() / theirs.abs().max()).detach())


def test_branches_compute_what_separate_documents_do() -> None:
    rng = random.Random(1)
    lessons = [
        random_lesson(rng, 21, (9, 33, 2, 9)),
        random_lesson(rng, 0, (17,)),
        random_lesson(rng, 5, (40,)),
    ]
    branched = pack(lessons, PAD, size=300)
    plain = pack([document for lesson in lessons for document in laid_out_plainly(lesson)], PAD)
    assert torch.equal(branched.labels, plain.labels)
    model = new_model()
    results: list[tuple[Tensor, dict[str, Tensor]]] = []
    for batch in (branched, plain):
        model.zero_grad()
        logits = learnt_logits(model, batch)
        F.cross_entropy(logits, batch.labels[batch.labels != IGNORED]).backward()  # type: ignore[no-untyped-call]
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((logits.detach(), gradients))
    (logits, gradients), (plain_logits, plain_gradients) = results
    assert largest_error(logits, plain_logits) < 1e-5
    assert gradients.keys() == plain_gradients.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients.items():
        assert largest_error(gradient, plain_gradients[name]) < 1e-4, name


def test_a_branch_does_not_see_its_neighbours() -> None:
    rng = random.Random(2)
    lesson = random_lesson(rng, 11, (12, 12, 12))
    model = new_model()
    before = learnt_logits(model, pack([lesson], PAD))
    lesson.branches[1].ids = random_ids(rng, 12)
    after = learnt_logits(model, pack([lesson], PAD))
    # Other experts' shares of rows may round the others' logits differently.
    changed = ((before - after).abs() > 1e-4).any(1).view(3, 6).any(1)
    assert changed.tolist() == [False, True, False]


def test_positions_of_branches_go_on_from_the_prefix() -> None:
    batch = pack([random_lesson(random.Random(3), 4, (3, 2))], PAD, size=12)
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 0, 1, 2]
    assert batch.segments == [Segment(4), Segment(3, 0), Segment(2, 0), Segment(3)]


def numbered_lessons(seed: int) -> tuple[Any, list[int]]:
    """A source of random lessons whose learnt tokens are numbered, and the list of the numbers given out."""
    rng, given = random.Random(seed), list[int]()

    def draw() -> Lesson:
        lesson = random_lesson(rng, rng.choice((0, 0, 30, 200)), tuple(rng.choices(range(2, 90), k=4)))
        for branch in lesson.branches:
            for at in range(1, len(branch.ids)):
                if branch.learn[at]:
                    branch.ids[at] = VOCAB + len(given)
                    given.append(branch.ids[at])
        return lesson

    return draw, given


def test_splitting_keeps_every_learnt_token_once() -> None:
    draw, given = numbered_lessons(seed=4)
    packer = Packer(draw, PAD, size=400)
    seen: list[int] = []
    for _ in range(60):
        batch = packer.next()
        assert len(batch.ids) == 400
        assert sum(segment.length for segment in batch.segments) == 400
        learnt = batch.labels != IGNORED
        assert torch.equal(batch.ids[batch.wanted[learnt] + 1], batch.labels[learnt])
        seen += batch.labels[learnt].tolist()
    waiting = [t for lesson in packer.waiting for b in lesson.branches for t in b.ids if t >= VOCAB]
    assert sorted(seen + waiting) == given
    assert len(seen) > 3000


def test_a_split_lesson_repeats_its_prefix() -> None:
    lesson = random_lesson(random.Random(5), 30, (40, 40, 40))
    packer = Packer(lambda: Lesson(lesson.prefix, list(lesson.branches)), PAD, size=120)
    for branches in (2, 1, 2, 1):
        batch = packer.next()
        assert batch.ids[:30].tolist() == lesson.prefix
        assert [segment.after for segment in batch.segments] == [None, *[0] * branches, None]


def test_branches_that_are_too_long_do_not_block_the_packer() -> None:
    rng = random.Random(6)
    long, short = random_lesson(rng, 10, (MAX_TOKENS,)), random_lesson(rng, 10, (20,))
    drawn = iter([long] * 30 + [short] * 300)
    batch = Packer(lambda: next(drawn), PAD, size=2 * MAX_TOKENS).next()
    assert batch.n_learnt > 0
    assert int(batch.positions.max()) < MAX_TOKENS


@pytest.mark.parametrize("size", [32, 96])
def test_the_norm_has_the_gradient_of_its_formula(size: int) -> None:
    torch.manual_seed(size)
    x, weight, upstream = torch.randn(7, size), torch.randn(size), torch.randn(7, size)

    def formula(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    def ours(x: Tensor, weight: Tensor) -> Any:
        return trainer._Norm.apply(x, weight, 1e-5, torch.float32)  # type: ignore[no-untyped-call]

    compare_gradients(ours, formula, (x, weight), upstream)


def test_the_experts_have_the_gradient_of_their_formula() -> None:
    torch.manual_seed(1)
    tokens, hidden, inner, experts, k = 23, 64, 32, 5, 3
    x, weights = torch.randn(tokens, hidden), torch.rand(tokens, k)
    # Expert 4 gets no token.
    ids = torch.rand(tokens, experts - 1).topk(k).indices
    gate_up, down = torch.randn(experts, 2 * inner, hidden) / 8, torch.randn(experts, hidden, inner) / 8

    def formula(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = torch.einsum("th,tkih->tki", x, gate_up[ids]).chunk(2, -1)
        return torch.einsum("tki,tkhi,tk->th", F.silu(gate) * up, down[ids], weights)

    def ours(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Any:
        return trainer._RoutedExperts.apply(x, weights, ids, gate_up, down)  # type: ignore[no-untyped-call]

    compare_gradients(ours, formula, (x, weights, gate_up, down), torch.randn(tokens, hidden))


def test_attention_has_the_gradient_of_its_formula() -> None:
    """Prefix, two branches behind it, and a document of its own."""
    torch.manual_seed(4)
    segments = [Segment(9), Segment(5, 0), Segment(7, 0), Segment(4)]
    total, heads, size = 25, 3, 8
    q, k, v = (torch.randn(heads, total, n) for n in (size, size, 6))
    seen = torch.zeros(total, total, dtype=torch.bool)
    for start, end, first, last in spans(segments):
        seen[start:end, first:last] = True
        seen[start:end, start:end] = torch.ones(end - start, end - start).tril().bool()

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT * 0.3).masked_fill(~seen, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Any:
        masks = causal_masks(segments, torch.float32)
        return trainer._Attend.apply(q, k, v, segments, masks, 0.3)  # type: ignore[no-untyped-call]

    compare_gradients(ours, formula, (q, k, v), torch.randn(total, heads * 6))


def compare_gradients(ours: Any, formula: Any, inputs: tuple[Tensor, ...], upstream: Tensor) -> None:
    """Values and gradients of `ours` in float32 against those of `formula` in float64."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    exact = [t.double().requires_grad_() for t in inputs]
    value, expected = ours(*leaves), formula(*exact)
    assert largest_error(value, expected) < 1e-5
    got = torch.autograd.grad(value, leaves, upstream)
    wanted = torch.autograd.grad(expected, exact, upstream.to(expected.dtype))
    for one, other in zip(got, wanted, strict=True):
        assert largest_error(one, other) < 1e-5


@pytest.mark.parametrize("shape", [(3, 24, 64), (64, 24)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    singular = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
    # The steps trade exactness for speed: values settle between about 0.7 and 1.2.
    assert float(singular.min()) > 0.5
    assert float(singular.max()) < 1.3


def transformers_model(model: MiniModel) -> Any:
    """transformers' model with the weights that `model` computes with."""
    values = config_values(model_config(model.config))
    theirs: Any = DeepseekV3ForCausalLM(DeepseekV3Config(**values))
    theirs = theirs.float().eval()
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            state["model." + name.replace("mlp.e_score", "mlp.gate.e_score")] = value
        elif name.endswith(("mlp.gate_up_proj", "mlp.down_proj")):
            state["model." + name.replace("mlp.", "mlp.experts.")] = fake_quantize(value)
        elif name == "lm_head.weight":
            state[name] = as_exported(value)
        else:
            weight = name + ".weight" if name == "embed_tokens" or name.endswith("mlp.gate") else name
            state["model." + weight] = as_exported(value)
    theirs.load_state_dict(state, strict=True)
    return theirs


@torch.no_grad()
def test_the_trainers_model_is_transformers_model() -> None:
    """Random weights; norms and correction bias moved from where they start, so that they count."""
    model = new_model(seed=3).eval()
    for name, p in model.named_parameters():
        if "norm" in name:
            p.add_(0.3 * torch.randn_like(p))
    for layer in model.moe_layers:
        layer.e_score_correction_bias += 0.2 * torch.randn(CONFIG.n_routed_experts)
    rng = random.Random(7)
    lesson = random_lesson(rng, 70, (50, 31))
    theirs = transformers_model(model)
    expected = [
        theirs(input_ids=torch.tensor([lesson.prefix + b.ids]), use_cache=False).logits[0]
        for b in lesson.branches
    ]
    rows = [
        logits[len(lesson.prefix) + at - 1]
        for logits, b in zip(expected, lesson.branches, strict=True)
        for at in range(1, len(b.ids))
        if b.learn[at]
    ]
    assert largest_error(learnt_logits(model, pack([lesson], PAD)), torch.stack(rows)) < 2e-5
