"""The bench of spilled sessions: its rows without a card, and what misses the bar where there is one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_spill


def test_without_a_card_sessions_come_back_and_nothing_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench", "--tokens", "512", "--json", str(tmp_path / "rows.json")])
    assert gpu_spill.main() == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["rows"] for row in rows] == ["bf16"] * 10 + ["fp8"] * 10  # four rounds of two, two medians
    assert all(row["times_limit"] > 0 and "holds" not in row for row in rows)


def rounds(name: str, times: dict[str, list[float]]) -> list[dict[str, Any]]:
    shared = {"device": "cuda", "rows": name, "tokens": 64, "layers": 2, "mb": 1.0, "copy_gb_s": 20.0}
    return [
        shared | {"case": "resume", "other": other, "times_limit": value}
        for other, values in times.items()
        for value in values
    ]


@pytest.mark.parametrize(
    ("late", "holds"),
    [([1.0, 1.3, 1.3, 9.0], True), ([1.2, 1.31, 1.31, 1.2, 9.0], False), ([5.0] * 4, False)],
)
@pytest.mark.parametrize("other", ["leaves meanwhile", "in RAM already"])
def test_a_median_above_the_bar_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: list[float], holds: bool, other: str
) -> None:
    times = {"leaves meanwhile": [1.1] * 4, "in RAM already": [1.0] * 4}

    def resumes(name: str, tokens: int, layers: int, device: str) -> list[dict[str, Any]]:
        assert (tokens, layers, device) == (65_536, 61, "cuda")
        return rounds(name, times | {other: late} if name == "fp8" else times)

    monkeypatch.setattr(gpu_spill, "resumes", resumes)
    monkeypatch.setattr(gpu_spill, "conditions", dict)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("sys.argv", ["bench", "--json", str(tmp_path / "rows.json")])
    assert gpu_spill.main() == (0 if holds else 1)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    judged = {(row["rows"], row["other"]): row["holds"] for row in rows if "bar" in row}
    assert len(judged) == 4
    assert judged == {key: holds or key != ("fp8", other) for key in judged}
