"""Linears over weights of 8 bits against float64, on every instruction set of this CPU."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import pytest
import torch

from k2hybrid.errors import NativeError
from k2hybrid.native.extension import INSTRUCTION_SETS
from k2hybrid.native.machine import Machine
from k2hybrid.types import Weight8

Kind = Literal["int8", "fp8"]

SHAPES = [  # tokens, rows, columns
    (1, 7, 33),
    (1, 64, 128),
    (2, 1, 31),
    (3, 5, 1),
    (4, 2, 64),
    (5, 33, 100),
    (17, 40, 260),
    (33, 66, 96),
    (70, 9, 352),
    (9, 131, 1057),
]


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["int8", "fp8"])
def kind(request: pytest.FixtureRequest) -> Kind:
    kind: Kind = request.param
    return kind


def _weight(rows: int, columns: int, kind: Kind, seed: int) -> Weight8:
    """Any byte but the two NaN of e4m3."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(256, (rows, columns), generator=g, dtype=torch.uint8)
    if kind == "int8":
        values = values.view(torch.int8)
    else:
        values[values & 0x7F == 0x7F] = 0x80
    return Weight8(values, torch.rand(rows, generator=g) + 0.01, kind)


def _matrix(weight: Weight8) -> torch.Tensor:
    """float64 [N, K]; torch's own e4m3 is the oracle of the kernels' one."""
    values = weight.values if weight.kind == "int8" else weight.values.view(torch.float8_e4m3fn)
    return values.double() * weight.scale.double()[:, None]


def _inputs(tokens: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _check(got: torch.Tensor, x: torch.Tensor, weight: Weight8) -> None:
    """Of every element: the roundings of a lane's chain, of the tree and of the scale (docs/numerics.md)."""
    want = x.double() @ _matrix(weight).T
    magnitude = x.double().abs() @ _matrix(weight).abs().T
    steps = 2 * math.ceil(x.shape[1] / 32) + 4 + 1
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    assert ((got - want).abs() <= 1.01 * steps * 2.0**-24 * magnitude + 1e-36).all()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("tokens", "rows", "columns"), SHAPES)
def test_linear(isa: str, kind: Kind, threads: int, tokens: int, rows: int, columns: int) -> None:
    weight, x = _weight(rows, columns, kind, rows), _inputs(tokens, columns, columns)
    machine = Machine(threads, isa)
    y = machine.linear(x, weight)
    _check(y, x, weight)
    for t in range(tokens):
        assert torch.equal(machine.linear(x[t : t + 1], weight)[0], y[t])
    assert torch.equal(y, Machine(1, isa).linear(x, weight))


def test_every_number_of_tokens(isa: str, kind: Kind) -> None:
    weight, x = _weight(6, 96, kind, 0), _inputs(70, 96, 1)
    machine = Machine(2, isa)
    y = machine.linear(x, weight)
    _check(y, x, weight)
    for tokens in range(1, 70):
        assert torch.equal(machine.linear(x[:tokens], weight), y[:tokens])


def test_a_row_does_not_depend_on_the_other_rows(isa: str, kind: Kind) -> None:
    weight, x = _weight(11, 224, kind, 3), _inputs(3, 224, 4)
    machine = Machine(1, isa)
    y = machine.linear(x, weight)
    for first, last in ((0, 1), (3, 5), (4, 11)):
        some = Weight8(weight.values[first:last], weight.scale[first:last], kind)
        assert torch.equal(machine.linear(x, some), y[:, first:last])


def test_rows_may_have_a_stride(isa: str, kind: Kind) -> None:
    wide, x = _weight(6, 90, kind, 5), _inputs(4, 100, 6)[:, 20:80]
    weight = dataclasses.replace(wide, values=wide.values[:, 5:65])
    _check(Machine(2, isa).linear(x, weight), x, weight)


def test_every_value_is_exact(isa: str, kind: Kind) -> None:
    values = torch.arange(256, dtype=torch.uint8)
    values = values.view(torch.int8) if kind == "int8" else values[values & 0x7F != 0x7F]
    weight = Weight8(values[:, None], torch.ones(len(values)), kind)
    got = Machine(1, isa).linear(torch.ones(1, 1, dtype=torch.bfloat16), weight)
    assert torch.equal(got[0].double(), _matrix(weight)[:, 0])


@pytest.mark.parametrize("exact", [isa for isa in INSTRUCTION_SETS if isa in ("avx512", "avx2")])
def test_exact_products_have_the_bits_of_plain_cpp(exact: str, kind: Kind) -> None:
    for tokens, rows, columns in SHAPES:
        weight, x = _weight(rows, columns, kind, tokens), _inputs(tokens, columns, rows)
        assert torch.equal(Machine(1, exact).linear(x, weight), Machine(1, "scalar").linear(x, weight))


def test_wrong_arguments_are_named() -> None:
    machine, x = Machine(1), torch.zeros(2, 32, dtype=torch.bfloat16)
    good = Weight8(torch.zeros(4, 32, dtype=torch.int8), torch.ones(4), "int8")
    assert machine.linear(x, good).shape == (2, 4)
    wrong = {
        "does not fit weight": dataclasses.replace(good, values=good.values[:, :31]),
        "weight of 'fp8' has values of torch.int8": dataclasses.replace(good, kind="fp8"),
        "weight of 'int8' has values of torch.uint8": dataclasses.replace(
            good, values=good.values.view(torch.uint8)
        ),
        "the last contiguous": dataclasses.replace(
            good, values=torch.zeros(32, 4, dtype=torch.int8).T, scale=torch.ones(4)
        ),
        r"not torch.float32 \[3\]": dataclasses.replace(good, scale=torch.ones(3)),
        "not torch.float64": dataclasses.replace(good, scale=torch.ones(4).double()),
        "contiguous float32": dataclasses.replace(good, scale=torch.ones(8)[::2]),
        "not empty": Weight8(torch.zeros(4, 0, dtype=torch.int8), torch.ones(4), "int8"),
    }
    for message, weight in wrong.items():
        with pytest.raises(NativeError, match=message):
            machine.linear(x, weight)
    with pytest.raises(NativeError, match="x must be bfloat16"):
        machine.linear(x.float(), good)
