"""A layer's attention in one call: the bits of the calls that it stands for, whatever sizes and weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from k2hybrid.cache.pages import LatentPages
from k2hybrid.cache.rows import row_format
from k2hybrid.checkpoint.dense8 import quantize
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.errors import NativeError
from k2hybrid.model.batch import Batch, Span
from k2hybrid.model.mla import MLA, AttentionPlan, attention_sizes, plan_attention
from k2hybrid.model.rope import Rope
from k2hybrid.model.scratch import STEP_ROWS
from k2hybrid.native.extension import INSTRUCTION_SETS
from k2hybrid.native.latent_step import NativeLatentStep
from k2hybrid.native.machine import Machine
from k2hybrid.types import LinearWeight, Weight8Kind
from tests.golden_model.tiny import config

HIDDEN, EPS, PAGES = 96, 1e-6, 12
CONTEXTS = ((0, 1), (63, 1), (64, 1), (200, 1), (5, 3), (130, 9))  # tokens before, and new ones
Take = Callable[[str], LinearWeight]


def model(rank: int | None) -> ModelSpec:
    return ModelSpec.from_config(
        config(
            hidden_size=HIDDEN,
            num_attention_heads=3,
            q_lora_rank=rank,
            kv_lora_rank=48,
            qk_nope_head_dim=24,
            qk_rope_head_dim=16,
            v_head_dim=20,
            num_hidden_layers=1,
        )
    )


def weights(spec: ModelSpec, kind: Weight8Kind | None = None) -> Take:
    """Random ones, the same every time; those that nothing but a linear reads in 8 bits."""
    draw = torch.Generator().manual_seed(11)
    heads, latent, rope = spec.num_heads, spec.kv_lora_rank, spec.qk_rope_head_dim
    q = heads * spec.qk_head_dim
    rank = spec.q_lora_rank or 1
    shapes = {
        "q_proj": (q, HIDDEN),
        "q_a_proj": (rank, HIDDEN),
        "q_b_proj": (q, rank),
        "kv_a_proj": (latent + rope, HIDDEN),
        "kv_b_proj": (heads * (spec.qk_nope_head_dim + spec.v_head_dim), latent),
        "o_proj": (HIDDEN, heads * spec.v_head_dim),
    }
    made: dict[str, LinearWeight] = {}
    for role, shape in shapes.items():
        weight = (torch.randn(shape, generator=draw) * shape[1] ** -0.5).bfloat16()
        made[role] = weight if kind is None or role == "kv_b_proj" else quantize(weight, kind, role)
    for role, count in (("q_a_layernorm", rank), ("kv_a_layernorm", latent)):
        made[role] = (1 + torch.rand(count, generator=draw)).bfloat16()
    return made.__getitem__


def pages_of(spec: ModelSpec, name: str = "bf16") -> LatentPages:
    """With the same rows every time."""
    pages = LatentPages(1, PAGES, row_format(name, spec.kv_lora_rank, spec.qk_rope_head_dim))
    rows = torch.randn(PAGES * 64, spec.latent_dim, generator=torch.Generator().manual_seed(3)).bfloat16()
    pages.write(0, torch.arange(PAGES), 0, rows)
    return pages


def batch_of(contexts: tuple[tuple[int, int], ...] = CONTEXTS) -> Batch:
    """Each sequence in pages of its own, out of order."""
    free = torch.randperm(PAGES, generator=torch.Generator().manual_seed(5)).tolist()
    spans, positions = [], []
    for before, new in contexts:
        table = [free.pop() for _ in range(-(-(before + new) // 64))]
        spans.append(Span(before, new, torch.tensor(table)))
        positions += range(before, before + new)
    rows = torch.tensor(positions)
    return Batch(rows, rows, tuple(spans), rows[:0])


def layer(spec: ModelSpec, machine: Machine, pages: LatentPages, take: Take) -> MLA:
    return MLA(0, spec, attention_sizes(spec), take, machine, pages, EPS, torch.bfloat16)


def plan_of(spec: ModelSpec, batch: Batch, pages: LatentPages) -> AttentionPlan:
    return plan_attention(batch, attention_sizes(spec), Rope(spec), pages)


def hidden(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("rank", [40, None])
@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_bits_of_many_calls(isa: str, rank: int | None, kind: Weight8Kind | None, threads: int) -> None:
    spec, batch, machine = model(rank), batch_of(), Machine(threads, isa)
    take = weights(spec, kind)
    pages, others = pages_of(spec), pages_of(spec)
    whole, parts = layer(spec, machine, pages, take), layer(spec, machine, others, take)
    assert whole._step is not None
    parts._step = None
    plan = plan_of(spec, batch, pages)
    assert plan.few is not None
    for seed in range(3):
        x = hidden(len(batch.ids), seed)
        assert torch.equal(whole(x, plan), parts(x, plan))
        assert torch.equal(pages.rows(0), others.rows(0))
        assert whole(x, plan).abs().max() > 0.01


def test_a_row_has_the_same_bits_alone() -> None:
    spec, machine = model(40), Machine(2)
    take = weights(spec)
    batch = batch_of(tuple((before, 1) for before, _ in CONTEXTS))
    pages = pages_of(spec)
    x = hidden(len(batch.ids))
    together = layer(spec, machine, pages, take)(x, plan_of(spec, batch, pages))
    for row, span in enumerate(batch.spans):
        position = torch.tensor([span.start])
        alone = Batch(position, position, (span,), position[:0])
        fresh = pages_of(spec)
        out = layer(spec, machine, fresh, take)(x[row : row + 1], plan_of(spec, alone, fresh))
        assert torch.equal(out[0], together[row])


def test_what_goes_another_way() -> None:
    """Many rows, spans that are cheaper expanded, rows stored in FP8, fp32 in tests."""
    spec, machine = model(40), Machine(1)
    pages = pages_of(spec)
    few = attention_sizes(spec).absorbed_below
    assert few < STEP_ROWS
    assert plan_of(spec, batch_of(((0, int(few) + 1), (9, 1))), pages).few is None
    many = tuple((0, 1) for _ in range(PAGES))
    assert plan_of(spec, batch_of(many), pages).few is not None
    long = batch_of(((0, int(few) - 1),) * (STEP_ROWS // (int(few) - 1) + 1))
    assert plan_of(spec, long, pages).few is None
    assert layer(spec, machine, pages_of(spec, "fp8"), weights(spec))._step is None


def test_bad_input_is_named() -> None:
    spec, machine = model(40), Machine(1)
    pages, batch = pages_of(spec), batch_of()
    step = layer(spec, machine, pages, weights(spec))._step
    assert isinstance(step, NativeLatentStep)
    plan = plan_of(spec, batch, pages)
    assert plan.few is not None
    x, rows, spans = hidden(len(batch.ids)), pages.rows(0), plan.few.attended
    cos, sin = plan.rotation.cos, plan.rotation.sin
    untouched = rows.clone()
    for wrong in (-1, PAGES * 64):
        slots = plan.slots.clone()
        slots[2] = wrong
        with pytest.raises(NativeError, match="no row to lie in"):
            step(x, rows, slots, spans, cos, sin)
    assert torch.equal(rows, untouched)
    for broken in (
        lambda: step(x[:, :-1], rows, plan.slots, spans, cos, sin),
        lambda: step(x[1:], rows, plan.slots, spans, cos, sin),
        lambda: step(x, rows[:, :-2].contiguous(), plan.slots, spans, cos, sin),
        lambda: step(x, rows, plan.slots.int(), spans, cos, sin),
        lambda: step(x, rows, plan.slots, spans[1:], cos, sin),
        lambda: step(x, rows, plan.slots, spans, cos[1:], sin),
        lambda: step(x, rows, plan.slots, spans, cos, sin.double()),
    ):
        with pytest.raises(NativeError, match="do not fit each other"):
            broken()
    with pytest.raises(NativeError, match="bfloat16"):
        step(x.float(), rows, plan.slots, spans, cos, sin)
    missing = ((torch.tensor([PAGES]), 5, len(x)),)
    with pytest.raises(NativeError, match="a page that is not there"):
        step(x, rows, plan.slots, missing, cos, sin)


def test_weights_that_do_not_fit_are_refused() -> None:
    spec, machine = model(40), Machine(1)
    good = layer(spec, machine, pages_of(spec), weights(spec))._weights()
    for change in (
        {"q_norm": None},
        {"q_norm": torch.ones(39)},
        {"latent_norm": torch.ones(47)},
        {"q": good.q_a},
        {"kv_a": good.o},
        {"o": good.kv_a},
        {"latent_to_value": good.latent_to_value[:2]},
        {"key_to_latent": good.key_to_latent[:, :-1]},
    ):
        with pytest.raises(NativeError):
            machine.latent_step(good._replace(**change), rope=16, eps=EPS, scale=1.0)  # type: ignore[arg-type]
    with pytest.raises(NativeError, match="float32"):
        machine.latent_step(
            good._replace(latent_norm=torch.ones(48, dtype=torch.bfloat16)), rope=16, eps=EPS, scale=1.0
        )
