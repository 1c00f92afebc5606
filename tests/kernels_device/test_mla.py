"""Latent attention over paged rows against float64, and against the model's own path on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.device_cases import U, latent_case
from k2hybrid.cache import row_sizes
from k2hybrid.cache.pages import LatentPages
from k2hybrid.cache.rows import Bf16Rows, Fp8Rows
from k2hybrid.errors import KernelError
from k2hybrid.kernels import mla
from k2hybrid.kernels.card import EMULATED, Card
from k2hybrid.kernels.mla import choose_split, choose_tile, mla_decode
from k2hybrid.model import attention
from k2hybrid.model.attention import AttentionSizes, Context
from k2hybrid.model.batch import Span
from k2hybrid.model.layers import TorchLinears
from k2hybrid.model.paged import PagedDecode, TorchDecode, paged_spans
from k2hybrid.model.scratch import IN_RAM

FORMATS = ("bf16", "fp8")
# (lengths, pages of a table, heads, latent, rope): ends within, at and beyond blocks, pages and parts; heads
# below a tile, a tile, and one more; latents below a group, a group, and a bit more.
CASES = [
    ([150], 3, 4, 32, 16),
    ([300, 0, 77], 6, 5, 160, 16),
    ([1, 192], 3, 16, 128, 64),
    ([1, 64, 65, 127, 128], 2, 17, 48, 8),
    ([0, 0], 1, 4, 32, 16),
    ([700, 3], 16, 4, 32, 16),
]


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize(("lengths", "pages", "heads", "latent", "rope"), CASES)
def test_against_float64(
    row_format: str, lengths: list[int], pages: int, heads: int, latent: int, rope: int
) -> None:
    case = latent_case(row_format, lengths, heads=heads, latent=latent, rope=rope, pages=pages)
    worst, norm = case.errors(case.run())
    assert worst <= 1
    assert norm <= 1


@pytest.mark.parametrize("row_format", FORMATS)
def test_the_widths_of_kimi_k2(row_format: str) -> None:
    case = latent_case(row_format, [200], heads=64, latent=512, rope=64, pages=5)
    worst, norm = case.errors(case.run())
    assert worst <= 1
    assert norm <= 1


@pytest.mark.parametrize("row_format", FORMATS)
def test_the_bounds_see_a_token_that_is_missing(row_format: str) -> None:
    case = latent_case(row_format, [150, 90], heads=4, latent=160, rope=16, pages=3)
    shorter = replace(case, lengths=case.lengths - 1)
    assert case.errors(shorter.run())[1] > 2


def test_every_code_of_fp8_is_exact() -> None:
    """One row a sequence: its weight is 1, so what comes out is the row itself; scales are powers of two."""
    codes = [code for code in range(256) if code & 127 != 127]
    case = latent_case("fp8", [1], heads=4, latent=256, rope=16, pages=1)
    row = case.rows[int(case.tables[0, 0]) * 64]
    row[: len(codes)] = torch.tensor(codes, dtype=torch.uint8)
    row[256:264] = torch.tensor([0.5, 2.0**-20]).view(torch.uint8)
    want = row[: len(codes)].view(torch.float8_e4m3fn).float()
    want[:128] *= 0.5
    want[128:] *= 2.0**-20
    assert torch.equal(case.run()[0, :, : len(codes)], want.expand(4, -1))


@pytest.mark.parametrize("row_format", FORMATS)
def test_a_sequence_alone_or_among_others(row_format: str) -> None:
    """How a context is split depends on the others, what comes out only within the bound."""
    case = latent_case(row_format, [700, 40, 130], heads=4, latent=32, rope=16, pages=11)
    for b in range(3):
        one = slice(b, b + 1)
        alone = replace(
            case,
            q_latent=case.q_latent[one],
            q_rope=case.q_rope[one],
            tables=case.tables[one],
            lengths=case.lengths[one],
        )
        worst, norm = alone.errors(alone.run())
        assert worst <= 1
        assert norm <= 1


def test_large_scores_do_not_overflow() -> None:
    case = latent_case("bf16", [150], heads=4, latent=32, rope=16, pages=3)
    case = replace(case, q_latent=case.q_latent * 2**10)
    got = case.run()
    assert got.isfinite().all()
    # Nearly all weight is on one row, but which is not in doubt.
    scores = case.q_latent[0].double() @ case.latent[case.rows_of(0)].double().T
    best = case.latent[case.rows_of(0)][scores.argmax(-1)]
    assert (got[0] - best).abs().max() <= 0.05 * best.abs().max()


@pytest.mark.parametrize("row_format", FORMATS)
def test_against_the_model_on_the_cpu(row_format: str) -> None:
    """The same pages, written by the cache's own row formats; strided queries, as the network has them."""
    fmt = Fp8Rows(192, 16) if row_format == "fp8" else Bf16Rows(208)
    pages = LatentPages(2, 9, fmt)
    g = torch.Generator().manual_seed(5)
    spans = [
        Span(start=n - 1, count=1, page_table=torch.tensor(t)) for n, t in ((200, [7, 1, 4, 2]), (33, [5]))
    ]
    for span in spans:
        where = pages.slots(span.page_table, 0, span.start + 1)
        pages.put(1, where, torch.randn(span.start + 1, 208, generator=g).bfloat16())
    paged = paged_spans(spans, None, torch.device("cpu"))
    q_latent = torch.randn(2, 6, 192, generator=g).bfloat16()
    q_rope = torch.randn(2, 7, 16, generator=g).bfloat16()[:, :6]
    sizes = AttentionSizes(heads=6, nope=16, rope=16, value=16, latent=192, scale=0.11)
    call = (q_latent, q_rope, pages.rows(1), paged.tables, paged.lengths)
    decode: PagedDecode = mla_decode
    got = decode(*call, scale=sizes.scale, row_format=row_format)
    want = TorchDecode(pages)(*call, scale=sizes.scale, row_format=row_format)
    # fp32 throughout there: what is left is the rounding of weights, whose bound is that of `errors`.
    assert ((got - want).norm() / want.norm()).item() <= U
    for b, span in enumerate(spans):
        one = slice(b, b + 1)
        context = Context(pages, 1, span, IN_RAM)
        want = attention.absorbed(q_latent[one], q_rope[one], context, sizes, TorchLinears())
        assert ((got[one] - want).norm() / want.norm()).item() <= U


def test_rows_have_the_sizes_of_the_cache() -> None:
    for latent, rope in ((512, 64), (160, 16), (32, 8), (128, 64)):
        for row_format in FORMATS:
            assert mla.row_bytes(row_format, latent, rope) == row_sizes.row_bytes(row_format, latent, rope)


def test_splits_fill_the_card_and_never_exceed_the_grid() -> None:
    for batch in (1, 2, 3, 8, 40, 300):
        for pages in (1, 2, 30, 4096):
            for cards in (1, 12, 84, 132, 170):
                for tiles in (1, 2, 4):
                    split = choose_split(batch, pages, tiles, cards)
                    for lengths in ([pages * 64] * batch, [1] * batch, [pages * 64] + [1] * (batch - 1)):
                        longest = max(-(-sum(lengths) // split.spread), mla.MIN_PART)
                        assert sum(-(-n // longest) for n in lengths) <= split.parts
    # 128k tokens on a card of 132 multiprocessors with two head tiles: all of them, and one wave.
    assert choose_split(1, 2048, 2, 132).parts == 66
    assert choose_split(8, 512, 2, 132).parts == 66


def test_tiles_divide_a_page_and_fit_few_heads() -> None:
    for card in (EMULATED, Card(108, 8, 166_912), Card(132, 9, 232_448), Card(170, 12, 101_376)):
        for heads in (1, 4, 16, 17, 64, 128):
            for row_format in FORMATS:
                tile = choose_tile(card, row_format, heads)
                assert 64 % tile.tokens == 0
                assert 16 <= tile.heads <= max(2 * heads, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_latent": torch.zeros(1, 4, 32)}, "q_latent must be bf16"),
        ({"rows": torch.zeros(64, 95, dtype=torch.uint8)}, r"rows must be .*\[64, 96\]"),
        ({"q_rope": torch.zeros(1, 16, 4).bfloat16().mT}, "q_rope must be .* adjoining heads"),
        ({"row_format": "fp32"}, "bf16 or fp8, not 'fp32'"),
        ({"lengths": torch.zeros(1, dtype=torch.int64)}, "lengths must be contiguous torch.int32"),
        ({"q_latent": torch.zeros(1, 4, 1024).bfloat16()}, "a latent of 4, 8"),
        ({"rows": torch.zeros(64, 192, dtype=torch.uint8)[:, ::2]}, "rows must be .* it is strided"),
    ],
)
def test_what_it_does_not_take(change: dict[str, torch.Tensor | str], message: str) -> None:
    case = latent_case("bf16", [5], heads=4, latent=32, rope=16, pages=1)
    case = replace(case, rows=case.rows[:64])
    with pytest.raises(KernelError, match=message):
        replace(case, **change).run()
