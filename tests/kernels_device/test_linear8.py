"""Linears over 8-bit weights against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.device_cases import LinearCase, linear_case
from k2hybrid.checkpoint.dense8 import quantize
from k2hybrid.errors import KernelError
from k2hybrid.kernels.card import EMULATED
from k2hybrid.kernels.linear8 import FEW, FEW_ROWS, MANY, choose_parts, choose_tile, linear8
from k2hybrid.native.machine import Machine
from k2hybrid.types import Weight8Kind

# fp32 sums of exact products; docs/numerics.md, "Kernels of the device".
BOUND = 3e-6
KINDS = ("int8", "fp8")
# (rows, outputs, columns): one each; ends within and at tiles; both tiles; columns in one part and in more.
SHAPES = [
    (1, 1, 4),
    (1, 7, 36),
    (16, 32, 256),
    (3, 100, 1028),
    (32, 33, 512),
    (33, 130, 260),
    (200, 129, 64),
    (2, 40, 5000),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "outputs", "inner"), SHAPES)
def test_against_float64(kind: str, rows: int, outputs: int, inner: int) -> None:
    case = linear_case(kind, rows, outputs, inner)
    got = case.run()
    assert got.dtype == torch.float32
    assert got.shape == (rows, outputs)
    assert case.error(got) < BOUND


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_is_exact(kind: str) -> None:
    """The unit matrix: each weight comes out as it is, times a scale that is a power of two."""
    case = linear_case(kind, 256, 2, 256)
    codes = torch.arange(256, dtype=torch.uint8)
    if kind == "fp8":
        codes = torch.where(codes & 127 == 127, 0, codes)
    values = torch.stack((codes, codes.flip(0)))
    case = LinearCase(
        x=torch.eye(256).bfloat16(),
        values=values if kind == "fp8" else values.view(torch.int8),
        scale=torch.tensor([1.0, 2.0**-30]),
        kind=kind,
    )
    decoded = case.values.float() if kind == "int8" else values.view(torch.float8_e4m3fn).float()
    assert torch.equal(case.run(), (decoded * case.scale[:, None]).T)


@pytest.mark.parametrize("kind", KINDS)
def test_against_the_kernels_of_the_cpu(kind: Weight8Kind) -> None:
    """The weights that loading makes, and both ways to multiply by them."""
    g = torch.Generator().manual_seed(3)
    weight = quantize(torch.randn(48, 160, generator=g).bfloat16(), kind, "a weight")
    x = torch.randn(5, 160, generator=g).bfloat16()
    want = Machine(1).linear(x, weight)
    assert ((linear8(x, weight) - want).norm() / want.norm()).item() < 2 * BOUND


def test_strided_rows_and_none() -> None:
    case = linear_case("int8", 6, 9, 64)
    wide = torch.zeros(6, 100).bfloat16()
    wide[:, :64] = case.x
    assert torch.equal(replace(case, x=wide[:, :64]).run(), case.run())
    assert replace(case, x=case.x[:0]).run().shape == (0, 9)


def test_few_rows_spread_over_the_card_and_many_do_not_split() -> None:
    assert [choose_tile(rows) for rows in (1, FEW_ROWS, FEW_ROWS + 1, 4096)] == [FEW, FEW, MANY, MANY]
    assert choose_parts(MANY, 4096, 64, 7168, EMULATED) == 1
    # kv_a of Kimi-K2 has 18 column tiles: it is split; q_b has 384 and is not.
    assert choose_parts(FEW, 1, 576, 7168, EMULATED) == 2
    assert choose_parts(FEW, 1, 12288, 1536, EMULATED) == 1
    assert choose_parts(FEW, 1, 32, 300, EMULATED) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 64)}, "x must be bf16"),
        ({"x": torch.zeros(2, 63).bfloat16()}, "a multiple of 4"),
        ({"values": torch.zeros(9, 64, dtype=torch.uint8)}, "values must be contiguous torch.int8"),
        ({"kind": "int4"}, "int8 or fp8, not 'int4'"),
        ({"scale": torch.zeros(8)}, r"scale must be contiguous torch.float32 \[9\]"),
    ],
)
def test_what_it_does_not_take(change: dict[str, torch.Tensor | str], message: str) -> None:
    case = replace(linear_case("int8", 2, 9, 64), **change)
    with pytest.raises(KernelError, match=message):
        linear8(case.x, case)
