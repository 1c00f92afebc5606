"""`k2hybrid traces`: what it prints is what the file holds, and what a replay finds."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k2hybrid.cli import main
from k2hybrid.experts.recorder import TraceWriter
from k2hybrid.experts.synthetic import synthetic
from k2hybrid.experts.traces import Trace

pytest.importorskip("numba", reason="simulations need numba")

from k2hybrid.experts.simulate import replay


@pytest.fixture(scope="module")
def trace() -> Trace:
    return synthetic(
        layers=3, experts=20, top_k=2, passes=200, skew=1.0, stickiness=0.3, seed=6, expert_bytes=1 << 20
    )


@pytest.fixture
def file(tmp_path: Path, trace: Trace) -> Path:
    writer = TraceWriter(tmp_path / "t", trace.header)
    writer.routed(0, trace.ids[:20].reshape(10, 2))  # a prompt of ten rows
    for layer, ids in zip(trace.layer.tolist(), trace.ids.reshape(-1, 2), strict=True):
        writer.routed(layer, ids[None])
    writer.close()
    return tmp_path / "t"


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main(["traces", *map(str, argv)])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_show(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    code, out, _ = run(capsys, "show", file)
    assert code == 0
    rows = dict(re.split(r" {2,}", line, maxsplit=1) for line in out.splitlines())
    assert rows["hand-offs"] == "601, 600 of them with one row"
    assert rows["rows"] == "610, 10 at most at once"
    assert rows["experts"] == "20 a layer, 2 of them a row"
    assert rows["end"] == "closed"
    assert (
        dict(
            re.split(r" {2,}", line, maxsplit=1)
            for line in run(capsys, "show", file, "--decode")[1].splitlines()
        )["passes"]
        == "200.0"
    )


def test_show_says_how_skewed_and_how_sticky(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """All choices fall on two experts, or the same two come again each time."""
    for ids, tenth, again in (
        ([[0, 1]] * 50, "50.0%", "98.0%"),
        ([[0, 1], [2, 3]] * 25, "25.0%", "0.0%"),
    ):
        path = tmp_path / again
        header = synthetic(layers=1, experts=10, top_k=2, passes=1).header
        writer = TraceWriter(path, header)
        for row in ids:
            writer.routed(0, np.array([row]))
        writer.close()
        out = run(capsys, "show", path)[1]
        assert f"{tenth} of what is asked for" in out
        assert f"{again} were asked for by the layer's last hand-off too" in out


def test_simulate_prints_and_writes_what_a_replay_finds(
    capsys: pytest.CaptureFixture[str], file: Path, trace: Trace, tmp_path: Path
) -> None:
    out_file = tmp_path / "out.json"
    argv = ["--decode", "--ram", "8MiB", "30MiB", "--policy", "lru", "lrfu-ghost", "--half-life", 4]
    code, out, _ = run(capsys, "simulate", file, *argv, "--json", out_file, "--by-layer")
    assert code == 0
    found = {(row["policy"], row["slots"]): row for row in json.loads(out_file.read_text())["rows"]}
    for slots in (8, 30):
        line = next(line for line in out.splitlines() if line.split()[:1] == [str(slots)])
        for policy, half_life in (("lru", None), ("lrfu-ghost", 4.0)):
            result = replay(trace, slots, policy, half_life)  # type: ignore[arg-type]
            row = found[policy, slots]
            assert (row["hits"], row["misses"], row["half_life"]) == (result.hits, result.misses, half_life)
            assert f"{result.hit_rate:.2%}" in line
            layer, (hits, misses) = next(iter(result.by_layer().items()))
            assert f"{layer:>6}{hits:>12,}{misses:>12,}" in out


def test_simulate_without_sizes_goes_from_the_fewest_slots_to_all(
    capsys: pytest.CaptureFixture[str], file: Path
) -> None:
    code, out, _ = run(capsys, "simulate", file, "--policy", "min")
    slots = [int(line.split()[0]) for line in out.splitlines()[1:]]
    assert code == 0
    assert slots == sorted(slots)
    assert 2 <= slots[0] < 20 < slots[-1] <= 60


def test_the_plot_is_a_picture_and_always_the_same(
    capsys: pytest.CaptureFixture[str], file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    for name in ("a.svg", "b.svg"):
        assert run(capsys, "simulate", file, "--plot", tmp_path / name)[0] == 0
    picture = (tmp_path / "a.svg").read_text()
    assert picture.startswith("<?xml")
    assert picture == (tmp_path / "b.svg").read_text()
    code, _, err = run(capsys, "simulate", file, "--plot", tmp_path / "a.nonsense")
    assert code == 1
    assert "cannot be drawn" in err


def test_without_matplotlib_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = run(capsys, "simulate", file, "--slots", 20, "--plot", tmp_path / "a.svg")
    assert code == 1
    assert "pip install matplotlib" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--slots", "1"], "1 slots are too few"),
        (["--policy", "fifo"], "no policy 'fifo'"),
        (["--half-life", "0"], "above 0"),
        (["--ram", "1MiB", "--decode"], "1 slots are too few"),
    ],
)
def test_what_cannot_be_simulated_is_said(
    capsys: pytest.CaptureFixture[str], file: Path, options: list[Any], message: str
) -> None:
    code, _, err = run(capsys, "simulate", file, *options)
    assert code == 1
    assert message in err


@pytest.mark.parametrize("size", ["0", "-1GiB", "1e9", "GiB", "5 XB", "9" * 30, "1gib", "٣GiB", "2000000TiB"])
def test_sizes_that_are_none(capsys: pytest.CaptureFixture[str], file: Path, size: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["traces", "simulate", str(file), f"--ram={size}"])
    assert caught.value.code == 2
    assert "is no size" in capsys.readouterr().err


def test_an_unknown_expert_size_and_an_empty_trace(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    header = synthetic(layers=1, experts=4, top_k=1, passes=1).header
    writer = TraceWriter(tmp_path / "t", header)
    writer.close()
    for action in ("show", "simulate"):
        code, _, err = run(capsys, action, tmp_path / "t")
        assert code == 1
        assert "has no hand-offs" in err
    writer = TraceWriter(tmp_path / "u", header)
    writer.routed(0, np.array([[3]]))
    writer.close()
    code, _, err = run(capsys, "simulate", tmp_path / "u", "--ram", "1GiB")
    assert code == 1
    assert "give --expert-bytes" in err
    code, out, _ = run(capsys, "simulate", tmp_path / "u", "--ram", "1GiB", "--expert-bytes", "1MB")
    assert code == 0
    assert "1073" in out


def test_a_file_that_is_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, "show", tmp_path / "none")
    assert code == 1
    assert "cannot be read" in err
