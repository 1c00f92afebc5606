"""What the machine can read and compute at most, by kind of memory, way of reading and number of threads.

    python -m bench.bandwidth [--threads N] [--gb 1] [--dir DIR] [--json FILE] [--plot FILE.svg]

Variants alternate within each round, and medians count. The best of them is the limit that other benches hold
their figures against.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from k2hybrid.bench.report import Row, conditions, print_report, write_json
from k2hybrid.hardware.bandwidth import MEMORY_KINDS, ReadVariant, medians, probe_memory
from k2hybrid.native.machine import Machine

PEAKS = ("bf16", "int8", "fp32")
VARIANTS = (
    *(ReadVariant(streams, ahead) for streams in (1, 2, 4, 8) for ahead in (0, 2048, 4096, 8192)),
    *(ReadVariant(streams, ahead, None) for streams in (1, 2, 4) for ahead in (0, 4096)),
)
MOST_MEASURED = 8  # up to here every number of threads; beyond, powers of two and all


def thread_counts(threads: int) -> list[int]:
    """1 to `threads`, thinned out where there are many."""
    every = range(1, threads + 1)
    return [n for n in every if n <= MOST_MEASURED or n == threads or n & (n - 1) == 0]


def read_rows(machine: Machine, memory: str, data: torch.Tensor, rounds: int) -> list[Row]:
    """A row a variant."""
    found = medians(machine, data, VARIANTS, rounds)
    best = max(found.values())
    return [
        {"case": name, "memory": memory, "threads": machine.threads, "gb_s": gb_s, "best": gb_s == best}
        for name, gb_s in found.items()
    ]


def peak_rows(machine: Machine, rounds: int) -> list[Row]:
    """A row a kind that the instruction set has."""
    found = []
    for kind in PEAKS:
        peaks = [peak for _ in range(rounds) if (peak := machine.peak(kind)) is not None]
        if peaks:
            found.append({"case": kind, "threads": machine.threads, "gop_s": statistics.median(peaks) / 1e9})
    return found


def by_threads(rows: Sequence[Row], field: str) -> list[Row]:
    """For reading: one row a case, one column a number of threads."""
    found: dict[str, Row] = {}
    for row in rows:
        line = found.setdefault(row["case"], {"case": row["case"]})
        name = f"{row['threads']} threads" if row["threads"] > 1 else "1 thread"
        line[name] = f"{row[field]:.1f}{' best' if row.get('best') else ''}"
    return list(found.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, help="the most to measure; default one per physical core")
    parser.add_argument("--isa", help="use a lower instruction set than the CPU offers")
    parser.add_argument("--gb", type=float, default=1.0, help="GiB to read a time (default 1)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dir", type=Path, help="where the mapped file is made; not in memory (tmpfs)")
    parser.add_argument("--json", type=Path, metavar="FILE", help='write {"conditions": …, "rows": […]}')
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    options = parser.parse_args(argv)
    if options.rounds < 1 or options.gb <= 0:
        parser.error("--rounds and --gb must be positive")

    load_before = os.getloadavg()[0]
    full = Machine(options.threads, options.isa)
    full.pin_caller()
    nbytes = max(1, int(options.gb * 1024)) << 20
    counts = thread_counts(full.threads)
    machines = [Machine(n, options.isa) for n in counts[:-1]] + [full]
    reads: list[Row] = []
    for memory in MEMORY_KINDS:
        data = probe_memory(memory, nbytes, options.dir)
        for machine in machines:
            reads += read_rows(machine, memory, data, options.rounds)
        del data
    peaks = [row for machine in machines for row in peak_rows(machine, options.rounds)]
    found = conditions(
        full,
        load_average_before=round(load_before, 2),
        probe_bytes=nbytes,
        rounds=options.rounds,
        load_average_after=round(os.getloadavg()[0], 2),
    )
    for memory in MEMORY_KINDS:
        shown = by_threads([row for row in reads if row["memory"] == memory], "gb_s")
        print_report(f"{memory}, GB/s", found if memory == MEMORY_KINDS[0] else {}, shown)
    print_report("peaks, 10⁹ operations/s", {}, by_threads(peaks, "gop_s"))
    if options.json:
        write_json(options.json, found, [*reads, *peaks])
    if options.plot:
        from bench.plots import plot_bandwidth  # matplotlib comes with the dev extra only

        plot_bandwidth(found, [*reads, *peaks], options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
