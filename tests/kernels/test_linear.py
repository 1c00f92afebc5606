"""bf16 linears of the extension against float64, on every instruction set of this CPU."""

from __future__ import annotations

import pytest
import torch

from k2hybrid.errors import NativeError
from k2hybrid.native.extension import INSTRUCTION_SETS
from k2hybrid.native.machine import Machine

# fp32 sums of exact bf16 products: the error of n terms in 32 lanes is below (n/32 + 6) · 2⁻²⁴ of the sum of
# magnitudes; for random signs that is far below this bound (docs/numerics.md).
BOUND = 3e-6

SHAPES = [
    (1, 7, 33),
    (1, 64, 128),
    (5, 33, 100),
    (17, 40, 260),
    (3, 5, 1),
    (4, 2, 64),
    (2, 1, 31),
    (33, 66, 96),
    # Above what one thread does alone (`kAloneOps`).
    (3, 515, 520),
    (40, 130, 129),
]


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == torch.float32
    assert ((got - want).norm() / want.norm()).item() < BOUND


def test_every_offered_set_runs_under_its_own_name(isa: str) -> None:
    assert Machine(1, isa).isa == isa


def test_the_default_is_the_best_set_offered() -> None:
    assert Machine(1).isa == INSTRUCTION_SETS[0]
    assert INSTRUCTION_SETS[-1] == "scalar"


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("tokens", "rows", "columns"), SHAPES)
def test_linear(isa: str, threads: int, tokens: int, rows: int, columns: int) -> None:
    g = torch.Generator().manual_seed(tokens * rows + columns)
    x = torch.randn(tokens, columns, generator=g).bfloat16()
    w = torch.randn(rows, columns, generator=g).bfloat16()
    machine = Machine(threads, isa)
    y = machine.linear(x, w)
    _close(y, x.double() @ w.double().T)
    for t in range(tokens):
        assert torch.equal(machine.linear(x[t : t + 1], w)[0], y[t])


def test_linear_bits_do_not_depend_on_the_threads(isa: str) -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(9, 320, generator=g).bfloat16()
    w = torch.randn(130, 320, generator=g).bfloat16()
    first = Machine(1, isa).linear(x, w)
    for threads in (2, 3, 5):
        assert torch.equal(Machine(threads, isa).linear(x, w), first)


@pytest.mark.parametrize("exact", [isa for isa in INSTRUCTION_SETS if isa in ("avx512", "avx2")])
def test_exact_products_have_the_bits_of_plain_cpp(exact: str) -> None:
    """Products are exact and lanes are added in one order, so a fused multiply-add changes nothing."""
    g = torch.Generator().manual_seed(4)
    for tokens, rows, columns in SHAPES:
        x = torch.randn(tokens, columns, generator=g).bfloat16()
        w = torch.randn(rows, columns, generator=g).bfloat16()
        assert torch.equal(Machine(1, exact).linear(x, w), Machine(1, "scalar").linear(x, w))


def test_linear_reads_strided_rows(isa: str) -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(4, 100, generator=g).bfloat16()[:, 20:80]
    w = torch.randn(6, 90, generator=g).bfloat16()[:, 5:65]
    _close(Machine(2, isa).linear(x, w), x.double() @ w.double().T)


def test_head_linears_read_parts_of_one_matrix(isa: str) -> None:
    g = torch.Generator().manual_seed(3)
    machine = Machine(2, isa)
    both = torch.randn(3, 40 + 24, 200, generator=g).bfloat16()  # per head [k_nope | v], as kv_b lies
    keys, values = both[:, :40], both[:, 40:]
    q = torch.randn(5, 3, 40, generator=g).bfloat16()
    latent = torch.randn(5, 3, 200, generator=g).bfloat16()
    _close(machine.head_linear_t(q, keys), torch.einsum("thk,hkn->thn", q.double(), keys.double()))
    _close(
        machine.head_linear(latent, values), torch.einsum("thk,hnk->thn", latent.double(), values.double())
    )
    assert torch.equal(machine.head_linear_t(q[2:3], keys)[0], machine.head_linear_t(q, keys)[2])
    assert torch.equal(machine.head_linear(latent[2:3], values)[0], machine.head_linear(latent, values)[2])


def test_wrong_arguments_are_named() -> None:
    machine = Machine(1)
    x = torch.zeros(2, 32, dtype=torch.bfloat16)
    with pytest.raises(NativeError, match="does not fit weight"):
        machine.linear(x, torch.zeros(4, 31, dtype=torch.bfloat16))
    with pytest.raises(NativeError, match="must be bfloat16"):
        machine.linear(x.float(), torch.zeros(4, 32, dtype=torch.bfloat16))
    with pytest.raises(NativeError, match="last contiguous"):
        machine.linear(x.T, torch.zeros(4, 2, dtype=torch.bfloat16))
    with pytest.raises(NativeError, match="does not fit weight"):
        machine.head_linear(x.view(1, 2, 32), torch.zeros(3, 4, 32, dtype=torch.bfloat16))
    with pytest.raises(NativeError, match="unknown or more than this CPU offers"):
        Machine(1, "avx1024")
    with pytest.raises(NativeError, match="threads must lie"):
        Machine(100_000)
