"""Latent rows in FP8 against float64: every byte, the bound, and what no scale can hold."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from k2hybrid.cache.pages import LatentPages
from k2hybrid.cache.rows import Bf16Rows, Fp8Rows, Fp32Rows, row_format
from k2hybrid.errors import ConfigError

SIZES = [(512, 64), (32, 8), (1, 2), (7, 2), (128, 6), (129, 64), (300, 10), (512, 0)]
LARGEST = 448.0 * 2.0**7


def e4m3_values() -> list[float]:
    """What each of the 256 bytes means (OCP 8-bit floating point, E4M3): no infinities, one NaN a sign."""
    values = []
    for byte in range(256):
        sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 15, byte & 7
        if byte & 0x7F == 0x7F:
            values.append(math.nan)
        elif exponent:
            values.append(sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7))
        else:
            values.append(sign * mantissa / 8 * 2.0**-6)
    return values


VALUES = torch.tensor(e4m3_values(), dtype=torch.float64)


def expected_scale(group: torch.Tensor) -> float:
    """The smallest power of two under which a group, float64, stays within 448, from 2⁻¹¹⁷ to 2⁷."""
    largest = group.abs().max().item()
    return next((2.0**k for k in range(-117, 7) if largest <= 448 * 2.0**k), 2.0**7)


def expected_rows(rows: torch.Tensor, latent: int) -> torch.Tensor:
    """What storing finite rows [n, d] and reading them again must give, float64."""
    out = rows.to(torch.bfloat16).double()
    values = rows.double()
    finite = VALUES[~VALUES.isnan()]
    for row, start in itertools.product(range(len(rows)), range(0, latent, 128)):
        stop = min(start + 128, latent)
        group = values[row, start:stop]
        scale = expected_scale(group)
        scaled = (group / scale).clamp(-448, 448)
        distance = (scaled[:, None] - finite).abs()
        nearest = distance == distance.amin(-1, keepdim=True)
        # Of two as near, the one with an even last bit.
        even = torch.arange(256)[~VALUES.isnan()] % 2 == 0
        tie = nearest.sum(-1, keepdim=True) > 1
        pick = torch.where(tie & (finite != 0), nearest & even, nearest).int().argmax(-1)
        out[row, start:stop] = finite[pick] * scale
    return out


def random_rows(count: int, width: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    """bf16, over many magnitudes."""
    random = torch.Generator().manual_seed(seed)
    magnitude = torch.randn(count, width, generator=random).mul(spread).exp()
    return (torch.randn(count, width, generator=random) * magnitude).bfloat16()


def test_a_row_of_kimi_k2_takes_656_bytes() -> None:
    assert Fp8Rows(512, 64).row_bytes == 512 + 4 * 4 + 2 * 64 == 656
    assert Fp8Rows(129, 2).row_bytes == 129 + 2 * 4 + 4
    assert LatentPages(61, 1, Fp8Rows(512, 64)).page_bytes == 64 * 61 * 656


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("latent", "rope"), SIZES)
def test_storing_gives_the_nearest_value_of_the_group(latent: int, rope: int, dtype: torch.dtype) -> None:
    rows_format = Fp8Rows(latent, rope)
    rows = random_rows(5, latent + rope, seed=latent).to(dtype)
    if dtype == torch.float32:
        rows *= 1.0 + 2.0**-12  # no bf16 any more
    stored = rows_format.encode(rows)
    assert stored.shape == (5, rows_format.row_bytes)
    assert torch.equal(rows_format.decode(stored).double(), expected_rows(rows, latent))


def test_every_byte_is_read_exactly_at_every_scale() -> None:
    rows_format = Fp8Rows(128, 0)
    for exponent in range(-117, 8):
        scale = torch.tensor([2.0**exponent], dtype=torch.float32)
        for half in (torch.arange(128), torch.arange(128, 256)):
            stored = torch.cat((half.to(torch.uint8), scale.view(torch.uint8)))[None]
            read = rows_format.decode(stored)[0].double()
            # 0x7F and 0xFF, which are never written, are read as ±480.
            assert torch.equal(read[:127], VALUES[half[:127]] * 2.0**exponent)


def test_the_bound_of_the_numerics_page() -> None:
    """|error| ≤ max(2⁻⁴ |x|, 2⁻¹⁰ scale), scale < largest / 224; Gaussians lose 2.4 to 2.8 % of it."""
    latent, rope = 512, 64
    rows_format = Fp8Rows(latent, rope)
    for seed, spread in enumerate((0.0, 1.0, 6.0)):
        rows = random_rows(64, latent + rope, seed, spread)
        read = rows_format.decode(rows_format.encode(rows)).double()
        exact = rows.double()
        groups = exact[:, :latent].unflatten(1, (4, 128))
        scale = groups.abs().amax(-1, keepdim=True).clamp(max=LARGEST) / 224
        inside = groups.abs() <= LARGEST
        error = (read[:, :latent].unflatten(1, (4, 128)) - groups).abs()
        bound = torch.maximum(groups.abs() / 16, (scale / 1024).expand_as(groups))
        assert (error <= bound)[inside].all()
        assert torch.equal(read[:, latent:], exact[:, latent:])
        if spread == 0.0:
            loss = (torch.linalg.vector_norm(error) / torch.linalg.vector_norm(groups)).item()
            assert 0.024 <= loss <= 0.028


@pytest.mark.parametrize(
    "scale", [0.0, 1e-45, 1e-38, 2.0**-130, 2.0**-118, 1.0, 57344.0, 57345.0, 65536.0, 3.3e38]
)
def test_any_magnitude_is_stored_without_nan_bytes(scale: float) -> None:
    rows_format = Fp8Rows(130, 2)
    rows = torch.linspace(-1, 1, 3 * 132, dtype=torch.float64).view(3, 132).mul(scale).float()
    stored = rows_format.encode(rows)
    assert not (stored[:, :130] & 0x7F == 0x7F).any()
    read = rows_format.decode(stored)
    assert read.isfinite().all()
    assert torch.equal(read[:, :130].double(), expected_rows(rows, 130)[:, :130])
    assert read[:, :130].abs().max() <= LARGEST


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_visible_in_its_group_alone(bad: float) -> None:
    rows_format = Fp8Rows(300, 4)
    rows = random_rows(3, 304)
    good = rows_format.decode(rows_format.encode(rows))
    rows[1, 200] = bad
    stored = rows_format.encode(rows)
    assert not (stored[:, :300] & 0x7F == 0x7F).any()
    read = rows_format.decode(stored)
    assert read[1, 128:256].isnan().all()
    read[1, 128:256] = good[1, 128:256]
    assert torch.equal(read, good)


@pytest.mark.parametrize(("latent", "rope"), SIZES)
def test_a_rows_bytes_depend_on_that_row_alone(latent: int, rope: int) -> None:
    rows_format = Fp8Rows(latent, rope)
    rows = random_rows(70, latent + rope)
    together = rows_format.encode(rows)
    assert torch.equal(torch.cat([rows_format.encode(row[None]) for row in rows]), together)
    read = rows_format.decode(together)
    assert torch.equal(torch.cat([rows_format.decode(row[None]) for row in together]), read)
    assert torch.equal(rows_format.decode(rows_format.encode(read)), read)  # storing again loses nothing


@pytest.mark.parametrize("table", [[2, 3, 4], [4, 0, 2]], ids=["adjoining", "scattered"])
@pytest.mark.parametrize(("latent", "rope"), [(7, 2), (512, 64)])
def test_pages_give_back_what_rows_were_stored(latent: int, rope: int, table: list[int]) -> None:
    rows_format = Fp8Rows(latent, rope)
    pages = LatentPages(2, 5, rows_format)
    written = random_rows(150, latent + rope)
    for first, last in ((0, 1), (1, 100), (100, 150)):
        pages.write(1, torch.tensor(table), first, written[first:last])
    wanted = rows_format.decode(rows_format.encode(written))
    for start, stop in ((0, 150), (63, 65), (70, 71)):
        assert torch.equal(pages.gather(1, torch.tensor(table), start, stop), wanted[start:stop])


def test_formats_by_name() -> None:
    formats = (row_format("bf16", 512, 64), row_format("fp8", 512, 64), Fp32Rows(576))
    assert [one.name for one in formats] == ["bf16", "fp8", "fp32"]
    assert [one.row_bytes for one in formats] == [1152, 656, 2304]
    assert all(one.latent_dim == 576 for one in formats)
    assert isinstance(formats[0], Bf16Rows)
    with pytest.raises(ConfigError, match="fp4"):
        row_format("fp4", 512, 64)
