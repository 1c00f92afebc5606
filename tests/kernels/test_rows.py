"""What is done to rows between products, against float64, on every instruction set of this CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from k2hybrid.errors import NativeError
from k2hybrid.native.extension import INSTRUCTION_SETS
from k2hybrid.native.machine import Machine

BF16 = 2.0**-8  # one rounding to bf16, relative
FP32 = 2.0**-24
# The smallest normal number of bf16 and fp32: below it a rounding is no longer relative.
TINY = 2.0**-126
# Roundings to fp32 of silu and sigmoid: the exponential to two units in the last place, a sum, a quotient, a
# product.
FEW = 8 * FP32

WIDTHS = [1, 15, 16, 31, 64, 129, 512]


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _within(got: torch.Tensor, want: torch.Tensor, relative: float) -> None:
    assert got.shape == want.shape
    assert bool(((got.double() - want).abs() <= relative * want.abs() + TINY).all())


def _norm_bound(n: int) -> float:
    """Squares in 64 chains and a tree, and the last n % 16 one by one; their root halves the error."""
    return BF16 + ((n / 64 + 7 + 2 * (n % 16)) / 2 + 8) * FP32


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("n", WIDTHS)
def test_rms_norm(isa: str, n: int) -> None:
    x, weight = _random(5, n) * 3, _random(n, seed=1)
    got = Machine(1, isa).rows.rms_norm(x, weight, 1e-5)
    assert got.dtype == torch.bfloat16
    _within(got, _rms_norm(x, weight, 1e-5), _norm_bound(n))


def test_small_rows_are_normed_by_eps(isa: str) -> None:
    x = torch.stack((_random(64) * 1e-3, torch.zeros(64)))
    got = Machine(1, isa).rows.rms_norm(x, torch.ones(64), 1e-6)
    _within(got, _rms_norm(x, torch.ones(64), 1e-6), _norm_bound(64))
    assert not got[1].any()


def test_rms_norm_of_rows_with_a_stride(isa: str) -> None:
    x, weight = _random(4, 96), torch.ones(40)
    rows = Machine(1, isa).rows
    assert torch.equal(
        rows.rms_norm(x[:, :40], weight, 1e-6), rows.rms_norm(x[:, :40].contiguous(), weight, 1e-6)
    )


@pytest.mark.parametrize("n", WIDTHS)
def test_swiglu(isa: str, n: int) -> None:
    gate, up = _random(3, n) * 10, _random(3, n, seed=1)
    gate[0, 0], gate[1, 0], gate[2, 0] = 100.0, -80.0, 0.0
    got = Machine(1, isa).rows.swiglu(gate, up)
    assert got.dtype == torch.bfloat16
    want = gate.double() / (1 + (-gate.double()).exp()) * up.double()
    _within(got, want, BF16 + FEW)


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (7, 3), (16, 4), (100, 64), (384, 8)])
@pytest.mark.parametrize("normalize", [True, False])
def test_choose(isa: str, experts: int, top_k: int, normalize: bool) -> None:
    logits, bias = _random(9, experts) * 2, _random(experts, seed=1) * 0.1
    ids, weights = Machine(1, isa).rows.choose(logits, bias, top_k, normalize=normalize, scale=2.5)
    scores = logits.double().sigmoid()
    biased = scores + bias.double()
    want = biased.topk(top_k).indices
    found = biased.gather(1, ids.long())
    # Within the error of the scores any order is right.
    assert bool(((found - biased.gather(1, want)).abs() <= 16 * FP32).all())
    assert all(len(set(row)) == top_k for row in ids.tolist())
    chosen = scores.gather(1, ids.long())
    expected = 2.5 * (chosen / chosen.sum(1, keepdim=True) if normalize else chosen)
    _within(weights, expected, 2 * FEW + (top_k + 4) * FP32)


def test_scores_of_any_size_are_weighed(isa: str) -> None:
    logits = torch.tensor([[-200.0, -60.0, -8.0, 0.0, 8.0, 60.0, 200.0, 1e30]])
    ids, weights = Machine(1, isa).rows.choose(logits, torch.zeros(8), 8, normalize=False, scale=1.0)
    _within(weights, logits.double().sigmoid().gather(1, ids.long()), FEW)


def test_equal_scores_go_to_the_lower_expert(isa: str) -> None:
    logits, bias = torch.zeros(2, 20), torch.zeros(20)
    logits[1, 12:15] = 1.0
    ids, _ = Machine(1, isa).rows.choose(logits, bias, 5, normalize=True, scale=1.0)
    assert ids.tolist() == [[0, 1, 2, 3, 4], [12, 13, 14, 0, 1]]


def test_the_bias_decides_the_choice_and_leaves_the_weights(isa: str) -> None:
    logits, bias = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([2.0, 0.0, 0.0])
    ids, weights = Machine(1, isa).rows.choose(logits, bias, 2, normalize=False, scale=1.0)
    assert ids.tolist() == [[0, 2]]
    assert weights[0].tolist() == pytest.approx([0.5, 1 / (1 + 2.718281828**-2)])


def test_what_is_no_number_still_chooses_different_experts(isa: str) -> None:
    logits = torch.full((1, 24), torch.nan)
    logits = torch.cat((logits, torch.zeros(2, 24)))
    logits[1, 20] = torch.nan
    for normalize in (True, False):
        ids, weights = Machine(1, isa).rows.choose(logits, torch.zeros(24), 6, normalize=normalize, scale=1.0)
        assert all(len(set(row)) == 6 and set(row) <= set(range(24)) for row in ids.tolist())
        # Who reads such a row must notice; the others are as ever.
        assert weights[:2].isnan().all()
        assert weights[2].tolist() == pytest.approx([1 / 6 if normalize else 0.5] * 6)


@pytest.mark.parametrize(
    ("heads", "nope", "rope", "latent"), [(1, 1, 2, 1), (3, 24, 8, 40), (8, 128, 64, 512)]
)
def test_prepare_attention(isa: str, heads: int, nope: int, rope: int, latent: int) -> None:
    rows = 5
    q, kv, norm = _random(rows, heads, nope + rope), _random(rows, latent + rope), _random(latent, seed=1)
    angles = _random(rows, 1, rope // 2, seed=2) * 50
    cos, sin = angles.cos(), angles.sin()
    q_nope, q_rope, latents = Machine(1, isa).rows.prepare_attention(q, kv, norm, 1e-6, cos, sin)
    assert torch.equal(q_nope, q[..., :nope].bfloat16())
    _within(latents[:, :latent], _rms_norm(kv[:, :latent], norm, 1e-6), _norm_bound(latent))
    for got, x in ((q_rope, q[..., nope:]), (latents[:, None, latent:], kv[:, None, latent:])):
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        turned = torch.view_as_real(pairs * torch.complex(cos.double(), sin.double())).flatten(-2)
        # Two products and their sum, each rounded: relative to the pair, since the sum may cancel.
        length = pairs.abs().repeat_interleave(2, dim=-1)
        assert bool(((got.double() - turned).abs() <= BF16 * turned.abs() + 4 * FP32 * length).all())


Do = Callable[[Machine, slice], tuple[torch.Tensor, ...]]


def _cases(rows: int) -> dict[str, Do]:
    wide, other, bias = _random(rows, 700), _random(rows, 700, seed=1), _random(700, seed=2)
    q, kv = _random(rows, 4, 72), _random(rows, 136)
    angles = _random(rows, 1, 4)
    cos, sin = angles.cos(), angles.sin()
    return {
        "rms_norm": lambda m, at: (m.rows.rms_norm(wide[at], bias, 1e-5),),
        "swiglu": lambda m, at: (m.rows.swiglu(wide[at], other[at]),),
        "choose": lambda m, at: m.rows.choose(wide[at], bias, 8, normalize=True, scale=2.0),
        "prepare_attention": lambda m, at: m.rows.prepare_attention(
            q[at], kv[at], bias[:128], 1e-6, cos[at], sin[at]
        ),
    }


@pytest.mark.parametrize("name", list(_cases(1)))
def test_a_rows_bits_depend_on_nothing_else(isa: str, name: str) -> None:
    """Neither on the rows beside it nor on threads; and 300 rows are more than the caller does alone."""
    rows = 300
    do = _cases(rows)[name]
    together = do(Machine(3, isa), slice(0, rows))
    machine = Machine(1, isa)
    for i in (0, 1, 17, rows - 1):
        for alone, all_ in zip(do(machine, slice(i, i + 1)), together, strict=True):
            assert torch.equal(alone[0], all_[i])


@pytest.mark.parametrize("name", list(_cases(1)))
def test_every_instruction_set_gives_the_same_bits(name: str) -> None:
    do = _cases(20)[name]
    first, *others = (do(Machine(1, isa), slice(0, 20)) for isa in INSTRUCTION_SETS)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    rows = Machine(1).rows
    x = torch.zeros(2, 8)
    angles = torch.zeros(2, 1, 2)
    for call in (
        lambda: rows.rms_norm(x, torch.ones(7), 1e-6),
        lambda: rows.rms_norm(x.bfloat16(), torch.ones(8), 1e-6),
        lambda: rows.rms_norm(x.T, torch.ones(2), 1e-6),
        lambda: rows.swiglu(x, torch.zeros(2, 7)),
        lambda: rows.swiglu(x[:, :4], x[:, 4:]),
        lambda: rows.choose(x, torch.zeros(7), 2, normalize=True, scale=1.0),
        lambda: rows.choose(x, torch.zeros(8), 9, normalize=True, scale=1.0),
        lambda: rows.choose(x, torch.zeros(8), 0, normalize=True, scale=1.0),
        lambda: rows.choose(torch.zeros(2, 99), torch.zeros(99), 65, normalize=True, scale=1.0),
        lambda: rows.prepare_attention(x.view(2, 1, 8), x, torch.ones(5), 1e-6, angles, angles),
        lambda: rows.prepare_attention(x.view(2, 1, 8), x, torch.ones(4), 1e-6, angles, angles[:1]),
        lambda: rows.prepare_attention(x.view(2, 4, 2), x, torch.ones(4), 1e-6, angles, angles),
    ):
        with pytest.raises(NativeError):
            call()
