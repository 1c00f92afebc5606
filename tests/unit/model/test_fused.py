"""Expanded attention without stored scores: against float64, and the same bits for a query in any company.

Torch's fused kernel runs on every CPU; only those that multiply tiles choose it. A device's is played.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from k2hybrid.cache.pages import LatentPages
from k2hybrid.cache.rows import row_format
from k2hybrid.kernels.flash import flash_attend
from k2hybrid.model import flash, fused
from k2hybrid.model.attention import AttentionSizes, Context
from k2hybrid.model.batch import Span
from k2hybrid.model.layers import Linear, TorchLinears
from k2hybrid.model.scratch import FUSED_ROWS, IN_RAM, ON_DEVICE, Cut, absorbed_below
from k2hybrid.native.machine import Machine

SIZES = {
    "mini": AttentionSizes(heads=4, nope=32, rope=32, value=32, latent=128, scale=0.2),
    "kimi": AttentionSizes(heads=2, nope=128, rope=64, value=128, latent=512, scale=0.13),
    "odd": AttentionSizes(heads=3, nope=6, rope=2, value=10, latent=24, scale=0.4),
}
# Several blocks of a few hundred rows, and several tiles.
SMALL = Cut(block_bytes=1 << 19, tile_bytes=1 << 16, rounded=False)


class Case:
    """`count` queries behind `before` rows, whose pages do not adjoin."""

    def __init__(
        self, sizes: AttentionSizes, before: int, count: int, *, cut: Cut = IN_RAM, rows: str = "bf16"
    ) -> None:
        draw = torch.Generator().manual_seed(before + count)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=draw).bfloat16()

        self.sizes = sizes
        pages = LatentPages(1, -(-(before + count) // 64), row_format(rows, sizes.latent, sizes.rope))
        order = pages.allocate(pages.pages)
        table = torch.tensor(order[::2] + order[1::2])
        pages.write(0, table, 0, random(before + count, sizes.latent + sizes.rope))
        pair = sizes.nope + sizes.value
        weight = random(sizes.heads * pair, sizes.latent) / math.sqrt(sizes.latent)
        self.kv_b = Linear(TorchLinears(), weight)
        self.q = random(count, sizes.heads, sizes.nope + sizes.rope)
        self.context = Context(pages, 0, Span(before, count, table), cut)

    def run(self) -> torch.Tensor:
        return fused.expanded(self.q, self.context, self.sizes, TorchLinears(), self.kv_b)

    def run_on_device(self) -> torch.Tensor:
        """Into a part of something larger; what is not written is NaN."""
        sizes, count = self.sizes, self.context.span.count
        out = self.q.new_full((count + 1, sizes.heads + 1, sizes.value), torch.nan)
        flash.expanded(self.q, self.context, sizes, self.kv_b, out[1:, : sizes.heads])
        assert out[0].isnan().all()
        assert out[:, sizes.heads :].isnan().all()
        return out[1:, : sizes.heads]

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Float64 from the rounded keys and values: the result, and √(Σ w² v²) of each."""
        sizes, span = self.sizes, self.context.span
        end = span.start + span.count
        rows = self.context.rows(0, end).to(torch.bfloat16)
        weight = self.kv_b.weight
        assert isinstance(weight, torch.Tensor)
        both = (rows[:, : sizes.latent].float() @ weight.float().T).bfloat16()
        nope, value = both.view(end, sizes.heads, -1).double().split([sizes.nope, sizes.value], dim=-1)
        rope = rows[:, None, sizes.latent :].double().expand(-1, sizes.heads, -1)
        scores = torch.einsum("nhk,thk->hnt", self.q.double(), torch.cat((nope, rope), -1)) * sizes.scale
        seen = torch.arange(end) <= torch.arange(span.start, end)[:, None]
        shares = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out = torch.einsum("hnt,thv->nhv", shares, value)
        return out, torch.einsum("hnt,thv->nhv", shares.square(), value.square()).sqrt()


LENGTHS = [(0, 64), (0, 1), (1, 129), (700, 200), (2049, 65), (5000, 333)]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(("before", "count"), LENGTHS)
@pytest.mark.parametrize("cut", [IN_RAM, SMALL], ids=["few blocks", "many blocks"])
def test_it_agrees_with_float64_within_the_derived_bound(
    name: str, before: int, count: int, cut: Cut
) -> None:
    """docs/numerics.md, "Fused attention on the CPU". Keys and values are rounded from fp32 sums in another
    order, so that a few of them fall to the other side: the bound has a share for that."""
    case = Case(SIZES[name], before, count, cut=cut)
    wanted, spread = case.exact()
    ours = case.run().double()
    bound = 2.0**-8 * (ours.abs() + spread).square().sum().sqrt()
    assert (ours - wanted).norm() <= bound
    # Element by element a single row too many or too few would show.
    assert torch.all((ours - wanted).abs() <= 4 * 2.0**-8 * (wanted.abs() + spread) + 2.0**-8 * spread.max())


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(("before", "count"), [(0, 1), (1, 129), (700, 200), (5000, 333)])
@pytest.mark.parametrize("cut", [ON_DEVICE, SMALL], ids=["one block", "many blocks"])
def test_so_does_a_device_where_torch_plays_it(name: str, before: int, count: int, cut: Cut) -> None:
    case = Case(SIZES[name], before, count, cut=cut)
    wanted, spread = case.exact()
    ours = case.run_on_device().double()
    assert (ours - wanted).norm() <= 2.0**-8 * (wanted.abs() + spread).square().sum().sqrt()
    assert torch.all((ours - wanted).abs() <= 4 * 2.0**-8 * (wanted.abs() + spread) + 2.0**-8 * spread.max())


@pytest.mark.parametrize("rows", ["bf16", "fp8"])
def test_the_kernel_of_a_device_obeys_the_same_bound(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter: several blocks and several tiles of queries."""
    triton = pytest.importorskip("triton", reason="device kernels need Triton: pip install triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("there is a device: Triton compiles")
    calls: list[int] = []

    def counted(*tensors: Any, **numbers: Any) -> None:
        calls.append(numbers["start"])
        flash_attend(*tensors, **numbers)

    case = Case(SIZES["mini"], 300, 150, cut=replace(SMALL, block_bytes=1 << 17), rows=rows)
    monkeypatch.setattr(flash, "attend_block", counted)
    wanted, spread = case.exact()
    assert (case.run_on_device() - wanted).norm() <= 2.0**-8 * (wanted.abs() + spread).norm()
    assert len(calls) > len(set(calls)) > 2


def test_tiles_are_about_as_large() -> None:
    """Each makes all keys anew, so none should be a mere rest."""
    counts = (1, 8318, 8319, 16_384, 16_637)
    assert [flash._even(count, 8318) for count in counts] == [1, 8318, 4160, 8192, 5546]


def test_fp8_rows_are_read_as_they_are() -> None:
    case = Case(SIZES["kimi"], 300, 100, rows="fp8")
    wanted, spread = case.exact()
    assert (case.run() - wanted).norm() <= 2.0**-8 * (wanted.abs() + spread).norm()


@pytest.mark.parametrize("name", SIZES)
def test_heads_in_groups_have_the_same_bits(name: str) -> None:
    """A pass may stop between groups of heads."""
    case = Case(SIZES[name], 900, 150)
    together = case.run()
    pair = case.sizes.nope + case.sizes.value
    weight, queries = case.kv_b.weight, case.q
    assert isinstance(weight, torch.Tensor)
    case.sizes = replace(case.sizes, heads=1)
    for head in range(together.shape[1]):
        case.kv_b = Linear(TorchLinears(), weight[head * pair : (head + 1) * pair])
        case.q = queries[:, head : head + 1]
        assert torch.equal(case.run(), together[:, head : head + 1])


def test_it_serves_cpus_that_multiply_tiles(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "tiles", True)
    assert fused.serves(machine, torch.bfloat16)
    assert not fused.serves(machine, torch.float32)
    assert not fused.serves(TorchLinears(), torch.bfloat16)
    monkeypatch.setattr(machine, "tiles", False)
    assert not fused.serves(machine, torch.bfloat16)
    assert not Machine(1, isa="scalar").tiles


def test_short_spans_stay_absorbed() -> None:
    assert absorbed_below(512, 128, 64, 128, fused=True) == FUSED_ROWS  # 32 by operations alone
    assert absorbed_below(512, 512, 64, 512, fused=True) > FUSED_ROWS
