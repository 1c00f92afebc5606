"""Dense weights of 8 bits: rounding held to its bounds, by definitions of its own."""

from __future__ import annotations

import pytest
import torch

from k2hybrid.checkpoint import dense8
from k2hybrid.checkpoint.dense8 import dequantize, quantize
from k2hybrid.checkpoint.dense_bytes import DENSE8_ROLES, weight_bytes
from k2hybrid.checkpoint.names import dense_layer_tensors, expected_tensors
from k2hybrid.checkpoint.presets import published_config
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.errors import TensorError
from k2hybrid.types import Weight8Kind

KINDS: tuple[Weight8Kind, ...] = ("int8", "fp8")
K2 = ModelSpec.from_config(published_config())

# All finite e4m3 by their definition: (−1)^s · 2^(e−7) · (1 + m/8), or 2^−6 · m/8 where e is 0; 480 is NaN.
E4M3 = torch.tensor(
    [
        (-1 if bits & 0x80 else 1)
        * (2.0 ** ((bits >> 3 & 15) - 7) * (1 + (bits & 7) / 8) if bits & 0x78 else (bits & 7) / 512)
        for bits in range(256)
        if bits & 0x7F != 0x7F
    ],
    dtype=torch.float64,
)


def _weights(seed: int) -> torch.Tensor:
    """bf16 [40, 300]: rows of very different sizes, some with a few large weights."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(40, 300, generator=g) * 2.0 ** torch.randint(-40, 40, (40, 1), generator=g)
    weight[::5] *= torch.rand(8, 300, generator=g) ** 20
    weight[:, ::7] = 0
    return weight.bfloat16()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_each_weight_becomes_the_nearest_value(kind: Weight8Kind, seed: int) -> None:
    weight = _weights(seed)
    made = quantize(weight, kind, "w")
    assert (made.kind, made.shape, made.scale.dtype) == (kind, weight.shape, torch.float32)
    most = weight.double().abs().amax(1)
    assert torch.allclose(made.scale.double(), most / (127 if kind == "int8" else 448), rtol=1e-6, atol=0)
    values = made.values.double() if kind == "int8" else made.values.view(torch.float8_e4m3fn).double()
    assert values.isfinite().all()
    grid = torch.arange(-127, 128).double() if kind == "int8" else E4M3
    wanted = weight.double() / made.scale.double()[:, None]
    nearest = (wanted[..., None] - grid).abs().amin(-1)
    # A quotient within half a unit of fp32 from the middle between two values may fall to either.
    assert ((wanted - values).abs() <= nearest + wanted.abs() * 2**-23).all()
    back = made.scale.double()[:, None] * values
    assert torch.allclose(dequantize(made).double(), back, rtol=2**-23, atol=0)
    error = (weight.double() - back).abs()
    step = made.scale.double()[:, None]
    bound = step / 2 if kind == "int8" else torch.maximum(weight.double().abs() / 16, step * 2**-10)
    assert (error <= bound * (1 + 1e-5)).all()


def test_ties_go_to_even() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -3.5]])
    assert quantize(weight, "int8", "w").values.tolist() == [[127, 0, 2, 2, 0, -4]]
    weight = torch.tensor([[448.0, 1.0625, 1.1875, -1.0625, 2**-10, 3 * 2**-10]])
    values = quantize(weight, "fp8", "w").values.view(torch.float8_e4m3fn)
    assert values.tolist() == [[448.0, 1.0, 1.25, -1.0, 0.0, 2**-8]]


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_extremes(kind: Weight8Kind) -> None:
    huge, tiny = torch.finfo(torch.bfloat16).max, 2.0**-133  # the largest and the least bf16
    weight = torch.tensor([[0.0, -0.0, 0.0], [huge, -huge, 1.0], [tiny, -tiny, 0.0], [tiny, huge, 0.0]])
    made = quantize(weight.bfloat16(), kind, "w")
    back = dequantize(made)
    assert made.scale[0] == 0
    assert torch.equal(back[0], torch.zeros(3))
    assert back.isfinite().all()
    assert torch.allclose(back[1], torch.tensor([huge, -huge, 0.0]), rtol=1e-6)
    # A scale is never subnormal, so rows as small as that keep fewer steps.
    least = torch.finfo(torch.float32).tiny
    assert (made.scale[1:] >= least).all()
    assert ((back[2] - weight[2]).abs() <= least / 2).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named(kind: Weight8Kind, bad: float) -> None:
    weight = torch.ones(5, 7).bfloat16()
    weight[3, 6] = bad
    with pytest.raises(TensorError, match="o_proj of layer 3 holds NaN or infinity"):
        quantize(weight, kind, "o_proj of layer 3")


@pytest.mark.parametrize("kind", KINDS)
def test_slices_change_nothing(kind: Weight8Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _weights(7)
    whole = quantize(weight, kind, "w")
    monkeypatch.setattr(dense8, "_SLICE_BYTES", 3 * 300 * 4)
    monkeypatch.setattr(dense8, "_HUGE_PAGE", 1)
    sliced = quantize(weight, kind, "w")
    assert torch.equal(whole.values, sliced.values)
    assert torch.equal(whole.scale, sliced.scale)


def test_a_large_matrix_does_not_stay_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0

    def seen(*args: object, **kwargs: object) -> torch.Tensor:
        nonlocal largest
        copy: torch.Tensor = to(*args, **kwargs)
        largest = max(largest, copy.nbytes)
        return copy

    weight = torch.ones(400, 1000).bfloat16()
    to = torch.Tensor.to
    monkeypatch.setattr(dense8, "_SLICE_BYTES", 100_000)
    monkeypatch.setattr(torch.Tensor, "to", seen)
    quantize(weight, "int8", "w")
    assert 0 < largest <= 100_000


def test_half_of_the_published_dense_weights_goes() -> None:
    """All linears but kv_b and the router; what is left is norms and the embedding."""
    kept = {
        tensor.key.role
        for tensor in expected_tensors(K2)
        if tensor.key.expert is None and len(tensor.shape) == 2 and tensor.key.role not in DENSE8_ROLES
    }
    assert kept == {"embed_tokens", "kv_b_proj", "router"}
    tensors = [t for layer in range(K2.num_layers) for t in dense_layer_tensors(K2, layer)]
    both = [sum(weight_bytes(t.key.role, t.shape, kind) for t in tensors) for kind in ("bf16", "fp8")]
    assert both[1] < 0.56 * both[0]
    assert weight_bytes("o_proj", (7168, 8192), "int8") == 7168 * 8192 + 4 * 7168
    assert weight_bytes("kv_b_proj", (16384, 512), "int8") == 2 * 16384 * 512
