"""The arithmetic of `bench/kernel.py` and `bench/bandwidth.py`: limits, cases, cliffs, verdicts, pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.bandwidth import by_threads, thread_counts
from bench.expert_memory import DENSE_NAME, expert_tensors
from bench.kernel import faults, row, shown
from bench.kernel_cases import (
    HIDDEN,
    INTER,
    SWEEP_TOKENS,
    TOP_K,
    Case,
    Ceiling,
    Probe,
    Round,
    bar,
    cases,
    ceilings,
    chosen,
    dense_operations,
    expert_operations,
    median_share,
    neighbour_drops,
    sweep,
)
from bench.kernel_contest import Router

CEILING = Ceiling(bytes_s=100.0, operations_s=1000.0)
EXPERT_BYTES = 3 * HIDDEN * INTER * 9 // 16  # a nibble a weight, two bytes a group of 32


def _round(seconds: float, nbytes: float = 100.0, operations: float = 1.0) -> Round:
    return Round(seconds, nbytes, operations, CEILING)


def test_the_limit_is_the_longer_of_reading_and_computing() -> None:
    assert CEILING.seconds(200, 1000) == 2.0
    assert CEILING.binds(200, 1000) == "memory"
    assert CEILING.seconds(200, 5000) == 5.0
    assert CEILING.binds(200, 5000) == "compute"


def test_a_share_is_taken_in_its_own_round() -> None:
    assert _round(2.0).share == 0.5
    slow_machine = Round(4.0, 100.0, 1.0, Ceiling(50.0, 1000.0))
    assert slow_machine.share == 0.5
    assert median_share([_round(2.0), slow_machine, _round(1.0)]) == 0.5


def test_operations_count_a_multiply_and_an_add_a_weight() -> None:
    assert expert_operations(3) == 3 * TOP_K * 3 * 2 * HIDDEN * INTER
    assert dense_operations(2) == 2 * 2 * 18432 * 7168
    assert dense_operations(2, "int8") == 2 * dense_operations(2)


def test_cases_have_the_bars_of_the_project() -> None:
    found = {case.name: bar(case, case.threads or 8) for case in cases()}
    assert len(found) == len(cases()) == 27
    assert {name: least for name, least in found.items() if least is not None} == {
        "48x1": 0.93,
        "48x512": 0.65,
        "48x2048": 0.65,
        "384x8": 0.85,
        "384x32": 0.85,
        "384x128": 0.70,
        "384x512": 0.60,
        "48x1-one-thread": 0.82,
        "64-an-expert": 0.65,
        "128-an-expert": 0.65,
        "dense-1": 0.90,
        "dense-512": 0.60,
    }
    by_name = {case.name: case for case in cases()}
    assert by_name["64-an-expert"].tokens_an_expert == 64
    assert by_name["128-an-expert"].tokens_an_expert == 128
    assert bar(by_name["48x1"], 1) == 0.82


def test_the_sweep_rises_through_every_small_number_of_tokens() -> None:
    assert tuple(case.tokens for case in sweep()) == SWEEP_TOKENS == tuple(sorted(set(SWEEP_TOKENS)))
    assert SWEEP_TOKENS[:64] == tuple(range(1, 65))
    assert SWEEP_TOKENS[-1] == 4096
    assert all(bar(case, 2) is None for case in sweep())


def test_cases_are_chosen_by_name_or_wildcard() -> None:
    assert [case.name for case in chosen(cases(), ["dense-*", "48x1"])] == ["48x1", "dense-1", "dense-512"]
    assert chosen(cases(), []) == cases()
    with pytest.raises(ValueError, match="no case is named 'sparse'"):
        chosen(cases(), ["48x1", "sparse"])


def test_a_drop_is_more_than_noise_in_most_rounds() -> None:
    # 1, 2 and 3 tokens: the step to 3 costs twice the time in two of three rounds.
    seconds = [[1.0, 1.0, 5.0], [2.0, 1.0, 5.0], [4.0, 3.0, 5.0]]
    assert neighbour_drops([1, 2], seconds[:2]) == []
    ((before, after, drop),) = neighbour_drops([1, 2, 3], seconds)
    assert (before, after) == (2, 3)
    assert drop == pytest.approx(0.25)
    assert neighbour_drops([10, 11], [[1.0], [1.1 * 1.04]]) == []
    assert neighbour_drops([10, 11], [[1.0], [1.1 * 1.06]]) != []


def test_routing_is_fresh_distinct_and_within_the_experts() -> None:
    router = Router()
    first, second = router.draw(50, 48, laps=2)
    assert first.shape == (50, TOP_K)
    assert not first.equal(second)
    assert all(len(set(one)) == TOP_K and min(one) >= 0 and max(one) < 48 for one in first.tolist())
    assert len(router.draw(5, 0, laps=3)) == 3  # the dense matrix runs as often


def test_a_ceiling_is_the_steadiest_best_probe_around_a_run() -> None:
    lucky_once = [Probe((50.0, 99.0), 1.0), Probe((60.0, 40.0), 3.0), Probe((70.0, 40.0), 5.0)]
    assert ceilings(lucky_once) == [Ceiling(55.0, 2.0), Ceiling(65.0, 4.0)]


def test_the_file_holds_true_sizes_under_published_names() -> None:
    tensors = {tensor.name: tensor for tensor in expert_tensors(2)}
    assert len(tensors) == 1 + 2 * 9
    weights = [t for name, t in tensors.items() if name != DENSE_NAME and not name.endswith("shape")]
    assert sum(tensor.nbytes for tensor in weights) == 2 * EXPERT_BYTES
    down = tensors["model.layers.1.mlp.experts.1.down_proj.weight_packed"]
    assert (down.dtype, down.shape) == ("I32", (HIDDEN, INTER // 8))


def test_rows_and_verdicts() -> None:
    good = row(Case("dense-1", 1, 0), 2, [_round(1.05), _round(1.0), _round(1.1)])
    assert {key: good[key] for key in ("tokens", "experts", "threads", "limit", "holds", "bar")} == {
        "tokens": 1, "experts": 0, "threads": 2, "limit": "memory", "holds": True, "bar": 0.9,
    }  # fmt: skip
    assert good["ms"] == pytest.approx(1050)
    assert good["gb_s"] == pytest.approx(100 / 1.05 / 1e9)
    assert good["share_of_limit"] == pytest.approx(1 / 1.05)
    assert faults([good], []) == []
    missed = row(Case("384x8", 8, 384), 2, [_round(2.0)])
    beaten = row(Case("48x2", 2, 48), 2, [_round(0.5)])
    assert beaten["holds"] is None
    assert (shown(good, False)["bar"], shown(missed, False)["bar"]) == ("0.9", "0.85 missed")
    assert "tokens_s" in shown(beaten, True)
    lines = faults([missed, beaten], [(7, 8, 0.12)])
    assert lines == [
        "48x2 took less than the limit (2.000): the probe is poor",
        "384x8 misses its bar: 0.500 of the limit, not 0.85",
        "8 tokens are slower than 7: tokens/s fall by 12.0%",
    ]


def test_threads_are_thinned_out_where_there_are_many() -> None:
    assert thread_counts(2) == [1, 2]
    assert thread_counts(24) == [1, 2, 3, 4, 5, 6, 7, 8, 16, 24]
    assert thread_counts(64)[-3:] == [16, 32, 64]


def test_variants_become_rows_and_threads_columns() -> None:
    rows = [
        {"case": "a", "memory": "m", "threads": 1, "gb_s": 10.0, "best": False},
        {"case": "b", "memory": "m", "threads": 1, "gb_s": 11.0, "best": True},
        {"case": "a", "memory": "m", "threads": 2, "gb_s": 20.0, "best": True},
    ]
    assert by_threads(rows, "gb_s") == [
        {"case": "a", "1 thread": "10.0", "2 threads": "20.0 best"},
        {"case": "b", "1 thread": "11.0 best"},
    ]


def test_the_same_rows_give_the_same_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the dev extra")
    from bench.plots import plot_bandwidth, plot_kernel

    found = {"cpu": "c", "threads": 2, "isa": "i", "memory": "m", "read_bandwidth_gb_s": 1, "peak_gflop_s": 2}
    plain = [row(case, 2, [_round(2.0)]) for case in cases()[:3]]
    swept = [row(case, 2, [_round(2.0)]) for case in sweep()[:3]]
    for rows in (plain, swept):
        for name in ("one", "two"):
            plot_kernel(found, rows, tmp_path / f"{name}.svg")
        assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    reads = [{"case": "a", "memory": "m", "threads": n, "gb_s": 10.0 * n} for n in (1, 2)]
    peaks = [{"case": "fp32", "threads": n, "gop_s": 10.0 * n} for n in (1, 2)]
    plot_bandwidth(found, [*reads, *peaks], tmp_path / "bandwidth.svg")
    assert b"<svg" in (tmp_path / "bandwidth.svg").read_bytes()
