"""Attention of a prefill, block by block, against float64, and against the other ways to compute it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.gpu_flash import FlashCase, flash_case
from k2hybrid.errors import KernelError
from k2hybrid.kernels import flash
from k2hybrid.kernels.card import EMULATED, SMALLEST_SHARED, Card
from k2hybrid.kernels.flash import Carried, Tile, choose_tile, flash_attend
from k2hybrid.model.flash import attend_block

MINI = {"heads": 2, "nope": 32, "rope": 32, "value": 32}  # of the built-in model
ODD = {"heads": 3, "nope": 14, "rope": 10, "value": 18}
# (rows before, queries, rows of a block): one query, alone and after many; ends within, at and beyond tiles
# of 32 rows and 128 queries; blocks that begin and end amid the queries; of one row; larger than all.
CASES = [
    (0, 1, 64),
    (999, 1, 333),
    (0, 129, 1000),
    (70, 200, 100),
    (31, 97, 32),
    (333, 137, 64),
    (5, 130, 61),
    (3, 20, 1),
    (256, 128, 384),
]


def within(case: FlashCase) -> bool:
    worst, norm = case.errors(case.run())
    return worst <= 1 and norm <= 1


@pytest.mark.parametrize("sizes", [MINI, ODD], ids=["mini", "odd"])
@pytest.mark.parametrize(("before", "n", "block"), CASES)
def test_against_float64(before: int, n: int, block: int, sizes: dict[str, Any]) -> None:
    assert within(flash_case(before, n, block, **sizes))


def test_the_widths_of_kimi_k2() -> None:
    assert within(flash_case(130, 140, 192, heads=2))


@pytest.mark.parametrize("tile", [Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(16, 16, 4, 3)], ids=str)
def test_every_tile_obeys_the_bound(tile: Tile) -> None:
    """Those of other cards, and of wider heads."""
    assert within(replace(flash_case(90, 70, 100, **MINI), tile=tile))


@pytest.mark.parametrize("off", [1, -1], ids=["a row too many", "a row missing"])
def test_the_bounds_see_one_row(off: int) -> None:
    """Queries that see their successor, or not themselves."""
    case = flash_case(150, 90, 64, **MINI)
    right = replace(case, q=case.q[1:-1], before=case.before + 1)
    wrong = replace(right, before=right.before + off)
    assert within(right)
    assert right.errors(wrong.run())[1] > 2


def test_large_scores_do_not_overflow() -> None:
    """Scores grow from block to block, and shrink: earlier sums fade to nothing, or later ones do."""
    case = flash_case(200, 60, 64, **MINI)
    for both in (case.both, case.both.flip(0)):
        steep = both.clone()
        steep[..., :32] *= torch.linspace(1, 256, len(both))[:, None, None]
        loud = replace(case, both=steep.bfloat16(), q=(case.q * 64).bfloat16())
        got = loud.run()
        assert got.isfinite().all()
        assert loud.errors(got)[0] <= 2  # a score's error is larger than the bound has it


def test_the_same_bits_again_and_behind_any_stride() -> None:
    case = flash_case(100, 150, 90, **MINI)
    got = case.run()
    assert torch.equal(got, case.run())
    wide = torch.zeros(150, 5, 32).bfloat16()
    out = wide[:, 1:3]
    replace(case, q=case.q.contiguous()).attend(out, Carried.empty(150, 2, 32, out.device))
    assert torch.equal(out, got)
    assert not wide[:, [0, 3, 4]].any()


def test_queries_are_done_with_the_block_that_has_their_own_row() -> None:
    """What comes later may be anything."""
    case = flash_case(40, 50, 30, **MINI)
    got = case.run()
    more = replace(
        case,
        both=torch.cat((case.both, torch.full((64, 2, 64), torch.nan).bfloat16())),
        rope=torch.cat((case.rope, torch.full((64, 32), torch.nan).bfloat16())),
    )
    assert torch.equal(more.run(), got)


@pytest.mark.parametrize(("before", "n", "block"), [(0, 129, 1000), (70, 200, 100), (5, 130, 61)])
def test_torch_plays_the_same(before: int, n: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU that plays a device has other sums only: it obeys the same bound."""
    case = flash_case(before, n, block, **ODD)
    monkeypatch.setattr("bench.gpu_flash.flash_attend", played)
    assert within(case)


def played(*tensors: Any, tile: object, **numbers: Any) -> None:
    attend_block(*tensors, **numbers)


def test_tiles_fit_every_card() -> None:
    cards = (EMULATED, Card(108, 8, 166_912), Card(132, 9, 232_448), Card(170, 12, SMALLEST_SHARED))
    for card in cards:
        for sizes in ((128, 64, 128), (32, 32, 32), (14, 10, 18), (256, 256, 256), (192, 64, 256)):
            tile = choose_tile(card, *sizes)
            columns = [flash.tile_columns(size) for size in sizes]
            queries = 2 * tile.queries * sum(columns[:2])
            assert queries + 2 * 2 * tile.rows * sum(columns) <= card.shared_bytes
            assert min(tile.queries, tile.rows) >= 16
            assert tile.queries * columns[2] <= 64 * 32 * tile.warps * (1 if tile.warps == 8 else 2)
    assert [choose_tile(card, 128, 64, 128).rows for card in cards] == [32, 64, 64, 32]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(9, 2, 64)}, "q must be bf16"),
        ({"q": torch.zeros(9, 64, 2).bfloat16().mT}, "q must be .* contiguous rows"),
        ({"both": torch.zeros(9, 2, 63).bfloat16()}, r"both must be .*\[9, 2, 64\]"),
        ({"rope": torch.zeros(9, 64).bfloat16()[:, ::2]}, "rope must be .* contiguous rows"),
        ({"rope": torch.zeros(9, 0).bfloat16()}, "of 1 to 256; not 64, 0, 32"),
        ({"out": torch.zeros(8, 2, 32).bfloat16()}, "out must be"),
        ({"carried": Carried.empty(9, 3, 32, torch.device("cpu"))}, "mixed must be"),
        ({"start": -1}, "start -1"),
        ({"scale": 0.0}, "scale 0.0"),
    ],
)
def test_what_it_does_not_take(change: dict[str, Any], message: str) -> None:
    case = flash_case(0, 9, 9, **MINI)
    call: dict[str, Any] = {
        "q": case.q,
        "both": case.both,
        "rope": case.rope,
        "out": torch.zeros(9, 2, 32).bfloat16(),
        "carried": Carried.empty(9, 2, 32, torch.device("cpu")),
        "start": 0,
        "position": 0,
        "scale": 1.0,
    }
    flash_attend(**call)
    with pytest.raises(KernelError, match=message):
        flash_attend(**{**call, **change})
