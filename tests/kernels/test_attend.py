"""Attention over latent pages against float64, on every instruction set of this CPU."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from k2hybrid.cache.rows import Bf16Rows, Fp8Rows, RowFormat
from k2hybrid.errors import NativeError
from k2hybrid.native.extension import INSTRUCTION_SETS
from k2hybrid.native.machine import Machine

PAGE = 64
U = 2.0**-24
SIZES = [(1, 16, 2), (5, 48, 6), (33, 128, 64), (8, 144, 32), (64, 512, 64)]  # heads, latent, rope
CONTEXTS = [1, 15, 64, 65, 255, 256, 257, 700]


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@dataclasses.dataclass(frozen=True)
class Case:
    """Random rows in pages, and queries of one size."""

    heads: int
    latent: int
    rope: int
    fmt: RowFormat
    stored: torch.Tensor
    scale: float
    g: torch.Generator

    @property
    def rows(self) -> torch.Tensor:
        """bf16, as the format gives them back."""
        return self.fmt.decode(self.stored)

    def table(self, tokens: int) -> torch.Tensor:
        """Pages in no order."""
        return torch.randperm(len(self.stored) // PAGE, generator=self.g)[: -(-tokens // PAGE)]

    def queries(self, count: int) -> torch.Tensor:
        return torch.randn(count, self.heads, self.latent + self.rope, generator=self.g).bfloat16()

    def run(self, machine: Machine, q: torch.Tensor, *spans: tuple[torch.Tensor, int, int]) -> torch.Tensor:
        options = {"latent": self.latent, "row_format": self.fmt.name, "scale": self.scale}
        return machine.attend(q, self.stored, spans, **options)  # type: ignore[arg-type]

    def context(self, table: torch.Tensor, count: int) -> torch.Tensor:
        token = torch.arange(count)
        return self.rows[table[token // PAGE] * PAGE + token % PAGE].double()


def make(heads: int, latent: int, rope: int, row_format: str, pages: int = 14, seed: int = 0) -> Case:
    g = torch.Generator().manual_seed(seed + heads * latent)
    fmt: RowFormat = Bf16Rows(latent + rope) if row_format == "bf16" else Fp8Rows(latent, rope)
    stored = fmt.encode(torch.randn(pages * PAGE, latent + rope, generator=g).bfloat16())
    return Case(heads, latent, rope, fmt, stored, 2.0 / math.sqrt(latent + rope), g)


def check(got: torch.Tensor, q: torch.Tensor, context: torch.Tensor, case: Case, isa: str) -> None:
    """One query [heads, width] over a context, within the bound of docs/numerics.md."""
    n, width = context.shape
    scores = (q.double() @ context.T) * case.scale
    weights = scores.softmax(-1)
    values = context[:, : case.latent]
    magnitude = (q.double().abs() @ context.abs().T).amax(-1, keepdim=True) * case.scale
    of_weights = (width + 8) * U * magnitude + 8 * U
    rounded = 2.0**-8 if isa == "amx_bf16" else 0.0  # weights, when they meet the values
    bound = (2 * of_weights + (n + 70) * U + rounded) * (weights @ values.abs())
    error = (got.double() - weights @ values).abs()
    assert torch.all(error <= bound), f"{(error / bound).max():.2f} of the bound"


@pytest.mark.parametrize("row_format", ["bf16", "fp8"])
@pytest.mark.parametrize(("heads", "latent", "rope"), SIZES)
def test_it_is_softmax_over_the_rows_that_a_query_sees(
    isa: str, heads: int, latent: int, rope: int, row_format: str
) -> None:
    machine, case = Machine(2, isa), make(heads, latent, rope, row_format)
    contexts = CONTEXTS if isa != "scalar" or heads < 33 else CONTEXTS[:4]
    for n in contexts:
        table, q = case.table(n), case.queries(1)
        check(case.run(machine, q, (table, n - 1, 1))[0], q[0], case.context(table, n), case, isa)


def test_a_context_whose_stretches_grow(isa: str) -> None:
    """Beyond 64 blocks a stretch has several blocks, so the softmax runs on within it."""
    machine, case = Machine(2, isa), make(3, 16, 2, "bf16", pages=300)
    n = 64 * 256 + 700
    table, q = case.table(n), case.queries(1) * 3
    check(case.run(machine, q, (table, n - 1, 1))[0], q[0], case.context(table, n), case, isa)


@pytest.mark.parametrize("row_format", ["bf16", "fp8"])
def test_queries_of_a_span_see_rows_up_to_their_own(isa: str, row_format: str) -> None:
    machine, case = Machine(2, isa), make(5, 48, 6, row_format)
    spans = [(case.table(70), 60, 10), (case.table(3), 0, 3), (case.table(300), 250, 1)]
    q = case.queries(14)
    got = case.run(machine, q, *spans)
    row = 0
    for table, start, count in spans:
        for i in range(count):
            check(got[row], q[row], case.context(table, start + i + 1), case, isa)
            row += 1


def test_a_query_has_the_same_bits_in_any_company(isa: str) -> None:
    """Alone or with others, on any number of threads, wherever its pages lie."""
    case = make(33, 128, 64, "bf16")
    spans = [(case.table(n), n - 1, 1) for n in (700, 1, 256, 65)]
    q = case.queries(4)
    machines = [Machine(threads, isa) for threads in (1, 2, 3)]
    alone = [case.run(machines[0], q[i : i + 1], span) for i, span in enumerate(spans)]
    for machine in machines:
        assert torch.equal(case.run(machine, q, *spans), torch.cat(alone))
    pages = case.stored.view(-1, PAGE, case.stored.shape[1])
    moved = torch.empty_like(pages)
    to = torch.randperm(len(pages), generator=case.g)
    moved[to] = pages
    elsewhere = dataclasses.replace(case, stored=moved.view_as(case.stored))
    got = elsewhere.run(machines[1], q, *[(to[table], start, n) for table, start, n in spans])
    assert torch.equal(got, torch.cat(alone))


def test_many_queries_are_taken_in_several_jobs_with_the_same_bits(isa: str) -> None:
    case = make(1, 16, 2, "bf16")
    table, q = case.table(640), case.queries(600)
    whole = case.run(Machine(2, isa), q, (table, 40, 600))
    parts = [case.run(Machine(2, isa), q[i : i + 200], (table, 40 + i, 200)) for i in (0, 200, 400)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize(("latent", "rope"), [(16, 2), (128, 64), (144, 6), (512, 64)])
def test_fp8_rows_have_the_bits_of_what_they_decode_to(isa: str, latent: int, rope: int) -> None:
    case = make(4, latent, rope, "fp8")
    # All codes, at scales from the smallest to the largest.
    groups = -(-latent // 128)
    stored = torch.randint(256, case.stored.shape, generator=case.g, dtype=torch.uint8)
    values = stored[:, :latent]
    values[values & 0x7F == 0x7F] = 0
    exponents = torch.randint(-117, 8, (len(stored), groups), generator=case.g)
    stored[:, latent : latent + 4 * groups] = torch.exp2(exponents.float()).view(torch.uint8)
    stored[:, latent + 4 * groups :] = (
        torch.randn(len(stored), rope, generator=case.g).bfloat16().view(torch.uint8)
    )
    case = dataclasses.replace(case, stored=stored)
    rows = case.rows
    assert torch.isfinite(rows).all()
    plain = dataclasses.replace(case, fmt=Bf16Rows(latent + rope), stored=rows.contiguous().view(torch.uint8))
    machine, q, table = Machine(2, isa), case.queries(2) * 1e-3, case.table(300)
    assert torch.equal(case.run(machine, q, (table, 298, 2)), plain.run(machine, q, (table, 298, 2)))


@pytest.mark.parametrize("column", [3, 20])  # of the latent, of the rotary part
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_shows_where_it_is_seen(isa: str, wrong: float, column: int) -> None:
    case = make(2, 16, 6, "bf16")
    table = case.table(200)
    rows = case.rows
    rows[table[1] * PAGE + 5, column] = wrong  # token 69
    rows[table[3] * PAGE + 40] = math.nan  # behind all that is seen
    q = case.queries(4).abs()
    got = case.run(Machine(2, isa), q, (table, 67, 4))
    assert torch.isfinite(got[:2]).all()
    assert not torch.isfinite(got[2:]).all(-1).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": torch.tensor([0, 14])}, "not there"),
        ({"table": torch.tensor([0, -1])}, "not there"),
        ({"table": torch.tensor([0])}, "lacks rows"),
        ({"table": torch.tensor([0, 1], dtype=torch.int32)}, "int64"),
        ({"count": 2}, "queries are not the spans'"),
        ({"start": -1}, "lacks rows"),
        ({"latent": 10}, "multiple of 16"),
        ({"latent": 0}, "attend takes"),
        ({"row_format": "fp32"}, "attend takes"),
        ({"row_format": "fp8"}, "do not hold"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    case = make(2, 16, 6, "bf16")
    given = {
        "table": torch.tensor([0, 1]),
        "start": 70,
        "count": 1,
        "latent": 16,
        "row_format": "bf16",
    } | change
    with pytest.raises(NativeError, match=message):
        Machine(1).attend(
            case.queries(1),
            case.stored,
            [(given["table"], given["start"], given["count"])],  # type: ignore[list-item]
            latent=given["latent"],  # type: ignore[arg-type]
            row_format=given["row_format"],  # type: ignore[arg-type]
            scale=0.1,
        )
