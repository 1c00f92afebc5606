"""How near the kernels come to what the machine can do: a layer's routed experts, and a dense matrix.

    python -m bench.kernel [--only '48x*'] [--memory mapped|mapped-4k|arena] [--json FILE] [--plot FILE.svg]
    python -m bench.kernel --sweep            tokens/s at every number of tokens: no cliffs

Experts have Kimi-K2's sizes and go through the real hand-off. Rounds alternate between a probe (read
bandwidth of the same memory, peak of the dot products, with the same threads) and the contender, since the
speed of a shared machine drifts; the probes before and after a run make its limit, the longer of (bytes of
the distinct experts over bandwidth) and (operations over peak). Its share is the limit over the time taken,
and the medians count. Short cases run several times a round without a pause, as layers follow each other.
A case is named after its experts × tokens, or after the dense matrix's kind and tokens. All of it needs 10 GB
of memory, and of disk but for the arena.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.expert_memory import MEMORY, ExpertMemory, in_arena, in_file
from bench.kernel_cases import (
    SWEEP_EXPERTS,
    Case,
    Round,
    bar,
    cases,
    chosen,
    median_share,
    neighbour_drops,
    sweep,
)
from bench.kernel_contest import Router, Team, contest, contest_in_turn
from k2hybrid.bench.report import Row, conditions, print_report, write_json


def row(case: Case, threads: int, rounds: Sequence[Round]) -> Row:
    """The medians of one case."""
    share, least = median_share(rounds), bar(case, threads)
    seconds = statistics.median(one.seconds for one in rounds)
    return {
        "case": case.name,
        "tokens": case.tokens,
        "experts": case.experts,
        "threads": threads,
        "ms": seconds * 1e3,
        "tokens_s": case.tokens / seconds,
        "gb_s": statistics.median(one.nbytes / one.seconds for one in rounds) / 1e9,
        "gflop_s": statistics.median(one.operations / one.seconds for one in rounds) / 1e9,
        "limit": statistics.mode(one.ceiling.binds(one.nbytes, one.operations) for one in rounds),
        "share_of_limit": share,
        "bar": least,
        "holds": None if least is None else share >= least,
        "rounds": len(rounds),
    }


def shown(row: Row, sweep: bool) -> Row:
    """The columns that fit a terminal."""
    found = {key: row[key] for key in ("case", "ms", "gb_s", "gflop_s", "limit")}
    found["share"] = row["share_of_limit"]
    if sweep:
        found["tokens_s"] = row["tokens_s"]
    else:
        found["bar"] = "" if row["bar"] is None else f"{row['bar']}{'' if row['holds'] else ' missed'}"
    return found


def faults(rows: Sequence[Row], drops: Sequence[tuple[int, int, float]]) -> list[str]:
    """What makes the exit status 1, a line each: poor probes first, since they devalue all else."""
    found = [
        f"{row['case']} took less than the limit ({row['share_of_limit']:.3f}): the probe is poor"
        for row in rows
        if row["share_of_limit"] > 1
    ]
    found += [
        f"{row['case']} misses its bar: {row['share_of_limit']:.3f} of the limit, not {row['bar']}"
        for row in rows
        if row["holds"] is False
    ]
    found += [
        f"{after} tokens are slower than {before}: tokens/s fall by {drop:.1%}"
        for before, after, drop in drops
    ]
    return found


def _memory(kind: str, experts: int, folder: Path) -> ExpertMemory:
    if kind == "arena":
        return in_arena(experts)
    return in_file(folder / f"experts-{experts}.safetensors", experts, huge_pages=kind == "mapped")


def _measure(
    options: argparse.Namespace, selected: Sequence[Case], memory: ExpertMemory
) -> tuple[dict[str, Any], list[Row], list[tuple[int, int, float]]]:
    """Conditions, rows, and drops between neighbours of a sweep."""
    load_before = os.getloadavg()[0]
    teams = {
        threads: Team(
            memory, [case for case in selected if case.threads == threads], threads or options.threads
        )
        for threads in dict.fromkeys(case.threads for case in selected)
    }
    router = Router()
    if options.sweep:
        measured = contest_in_turn(teams[None], selected, router, options.rounds)
    else:
        measured = []
        for case in selected:
            print(f"{case.name} …", file=sys.stderr, flush=True)
            measured.append(contest(teams[case.threads], case, router, options.rounds, options.case_seconds))
    rows = [
        row(case, teams[case.threads].machine.threads, rounds)
        for case, rounds in zip(selected, measured, strict=True)
    ]
    drops: list[tuple[int, int, float]] = []
    if options.sweep:
        drops = neighbour_drops(
            [case.tokens for case in selected], [[one.seconds for one in rounds] for rounds in measured]
        )
    team = next(iter(teams.values()))
    full = [rounds for case, rounds in zip(selected, measured, strict=True) if teams[case.threads] is team]
    ceilings = [one.ceiling for rounds in full for one in rounds]
    found = conditions(
        team.machine,
        load_average_before=round(load_before, 2),
        memory=options.memory,
        rounds=options.rounds,
        read_bandwidth_gb_s=round(statistics.median(c.bytes_s for c in ceilings) / 1e9, 2),
        peak_gflop_s=round(statistics.median(c.operations_s for c in ceilings) / 1e9, 1),
        peak_kind=team.peak_kind,
        load_average_after=round(os.getloadavg()[0], 2),
    )
    return found, rows, drops


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", nargs="+", default=[], metavar="NAME", help="cases by name, with wildcards")
    made.add_argument(
        "--sweep", action="store_true", help=f"1 to 4096 tokens at {SWEEP_EXPERTS} experts instead"
    )
    made.add_argument("--memory", choices=MEMORY, default=MEMORY[0])
    made.add_argument(
        "--dir", type=Path, metavar="DIR", help="keep the file of experts there, and use it again"
    )
    made.add_argument("--rounds", type=int, default=15)
    made.add_argument(
        "--case-seconds", type=float, default=30.0, help="a slow case gets fewer rounds (default 30)"
    )
    made.add_argument("--threads", type=int, help="default: one per physical core")
    made.add_argument("--json", type=Path, metavar="FILE", help='write {"conditions": …, "rows": […]}')
    made.add_argument("--plot", type=Path, metavar="FILE.svg")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases; 1 if a bar is missed, tokens/s fall, or a probe was beaten."""
    options = parser().parse_args(argv)
    if options.rounds < 1:
        parser().error("--rounds must be at least 1")
    try:
        selected = chosen(sweep() if options.sweep else cases(), options.only)
    except ValueError as error:
        parser().error(str(error))
    torch.set_num_threads(1)  # torch's threads would sit on the pool's cores
    experts = max(case.experts for case in selected) or 1
    with tempfile.TemporaryDirectory() as folder:
        if options.dir:
            options.dir.mkdir(parents=True, exist_ok=True)
        memory = _memory(options.memory, experts, options.dir or Path(folder))
        found, rows, drops = _measure(options, selected, memory)
    print_report("share of the limit", found, [shown(row, options.sweep) for row in rows])
    if options.json:
        write_json(options.json, found, rows)
    if options.plot:
        from bench.plots import plot_kernel  # matplotlib comes with the dev extra only

        plot_kernel(found, rows, options.plot)
    lines = faults(rows, drops)
    for line in lines:
        print(line)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
