"""What the benches of the device kernels do without a card: their checks, their limits, their rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import device_rates, gpu_experts, gpu_flash, gpu_linear8, gpu_mla
from bench.device_rates import Rates
from k2hybrid.errors import KernelError
from k2hybrid.kernels.mla import Tile
from k2hybrid.model.attention import block_rows, tile_rows
from k2hybrid.model.scratch import ON_DEVICE

RATES = Rates(bytes_per_s=1e12, flop_per_s=1e14)


def test_their_checks_pass_in_the_interpreter() -> None:
    gpu_mla.check("cpu", [70, 0, 3], 4, 32, 16)
    gpu_flash.check("cpu", 20, 30, 1)
    gpu_linear8.check("cpu", 40, 64)
    gpu_experts.check("cpu", 32, 32)


def test_a_wrong_result_fails_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.device_cases.LatentCase.errors", lambda case, got: (0.5, float("nan")))
    monkeypatch.setattr("bench.gpu_flash.FlashCase.errors", lambda case, got: (0.5, float("nan")))
    monkeypatch.setattr("bench.device_cases.LinearCase.error", lambda case, got: 1e-3)
    monkeypatch.setattr("bench.device_cases.ExpertCase.error", lambda case, got: 1e-2)
    with pytest.raises(KernelError, match="latent attention"):
        gpu_mla.check("cpu", [3], 4, 32, 16)
    with pytest.raises(KernelError, match="attention of a prefill"):
        gpu_flash.check("cpu", 1, 3, 1)
    with pytest.raises(KernelError, match="linear"):
        gpu_linear8.check("cpu", 8, 64)
    with pytest.raises(KernelError, match="experts"):
        gpu_experts.check("cpu", 32, 32)


def test_limits() -> None:
    assert gpu_mla.work("bf16", 1, 1) == (1152, 139_264)
    assert gpu_mla.work("fp8", 8, 2) == (16 * 656, 16 * 139_264)
    assert gpu_flash.work(16_384, 16_384) == 40_960 * (16_384 * 16_384 + 16_384 * 16_385 // 2)
    assert RATES.limit_us(3e6, 1e8) == pytest.approx(3.0)
    row = RATES.row(8.0, 3e6, 4e8)
    assert row == {"us": 8.0, "limit_us": 4.0, "limited_by": "operations", "share_of_limit": 0.5}
    assert gpu_experts.work(1, 8, 8)[0] == 8 * 24_772_608 + 6 * 7168


def test_rows_of_latent_attention_have_the_bar_where_it_holds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_mla, "measure", lambda row_format, batch, tokens, tile: 1e3)
    device_rates.report(gpu_mla.rows(RATES, tiles=False), tmp_path / "rows.json", {"device": "none"})
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    barred = [(row["rows"], row["batch"], row["context"]) for row in rows if row["bar"] == 0.6]
    assert barred == [(f, b, n) for f in ("bf16", "fp8") for b, n in ((1, 131_072), (8, 32_768))]
    assert all(row["share_of_limit"] > 0 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


@pytest.mark.parametrize(("share", "status"), [(0.6001, 0), (0.5999, 1)])
def test_latent_attention_below_its_bar_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, share: float, status: int
) -> None:
    """At one of the four, and whatever is measured where there is no bar."""

    def measure(row_format: str, batch: int, tokens: int, tile: Tile | None = None) -> float:
        if (batch, tokens) not in gpu_mla.CONTEXTS:
            return 1e9
        worst = (row_format, batch) == ("fp8", 8)
        return RATES.limit_us(*gpu_mla.work(row_format, batch, tokens)) / (share if worst else 0.8)

    monkeypatch.setattr(gpu_mla, "measure", measure)
    monkeypatch.setattr(gpu_mla, "check", lambda *_: None)
    monkeypatch.setattr(gpu_mla, "measured_rates", lambda: RATES)
    monkeypatch.setattr(gpu_mla, "conditions", dict)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("sys.argv", ["bench", "--json", str(tmp_path / "rows.json")])
    assert gpu_mla.main() == status
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["holds"] for row in rows if "holds" in row] == [True] * 3 + [not status]
    assert all("holds" not in row for row in gpu_mla.rows(RATES, tiles=True))  # others are tried


def test_rows_of_a_prefill_have_the_bar_where_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_flash, "measure", lambda before, n, tile: 1e6)
    rows = list(gpu_flash.rows(RATES, tiles=False))
    assert [row["bar"] for row in rows] == [0.6] * 3 + [None] * 3
    assert rows[2]["share_of_limit"] == pytest.approx(0.165, abs=1e-3)
    assert [row.get("holds") for row in rows] == [False] * 3 + [None] * 3


def test_blocks_of_a_prefill_are_those_of_the_model() -> None:
    assert block_rows(ON_DEVICE, 4 * 576 + 2 * 64 * 256) == gpu_flash.BLOCK
    assert tile_rows(ON_DEVICE, 4 * 64 * 130) >= 8192  # half of a chunk of the default size


def test_a_tile_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class OutOfResources(Exception):  # noqa: N818 - Triton's name
        pass

    def measure(row_format: str, batch: int, tokens: int, tile: Tile) -> float:
        if tile.heads == 64:
            raise OutOfResources
        return 1e3

    monkeypatch.setattr(gpu_mla, "measure", measure)
    tiles = [row["tile"] for row in gpu_mla.rows(RATES, tiles=True)]
    assert len(tiles) == 4 * sum(tile.heads != 64 for tile in gpu_mla.TILES)


@pytest.mark.parametrize("bench", [gpu_mla, gpu_flash, gpu_linear8, gpu_experts])
def test_without_a_card_they_say_so(
    bench: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench"])
    assert bench.main() == 0  # type: ignore[attr-defined]
    assert "no CUDA device" in capsys.readouterr().out
