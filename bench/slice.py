"""How far a slice of true widths is from the memory limit: a MoE layer's hand-off, and the whole decode step.

    k2hybrid synth slice --like kimi-k2-thinking --layers 2
    python bench/slice.py slice [--json FILE]

Probe and contenders take turns within each round, since the bandwidth of a shared machine drifts; each round
gives one ratio of time to (bytes read / bandwidth measured in that round), and the medians count.
Bars: 1.5 for the layer, 2.0 for the step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch

from k2hybrid.bench.command import Bench
from k2hybrid.bench.report import Row, conditions, print_report, write_json
from k2hybrid.hardware.bandwidth import quick_gb_s
from k2hybrid.hardware.memory import MemoryUse
from k2hybrid.native.machine import Machine

PROBE_BYTES = 1 << 30
BARS = {"submit to collect, one MoE layer": 1.5, "decode step": 2.0}


def main() -> int:
    """Run the rounds; exit status 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--prompt", type=int, default=512, help="tokens in the cache while decoding")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()

    machine = Machine(options.threads)
    machine.pin_caller()
    bench = Bench(options.model, machine, options.prompt + 8 * options.rounds)
    loaded = MemoryUse.now()
    for at in range(0, options.prompt, 512):
        bench.step(at, min(512, options.prompt - at))
    data = torch.ones(PROBE_BYTES, dtype=torch.uint8)

    ratios: dict[str, list[float]] = {name: [] for name in BARS}
    shown: dict[str, list[tuple[float, float]]] = {name: [] for name in BARS}  # ms, GB
    limits = []
    at = options.prompt
    for _ in range(options.rounds):
        limits.append(quick_gb_s(machine, data))
        steps, layers = [], []
        for _ in range(8):
            bench.reset()
            steps.append(bench.step(at, 1))
            at += 1
            layers.append(bench.experts.tally.seconds / bench.experts.tally.calls)
        roles = bench.roles()
        step_gb = sum(tally.nbytes for tally in roles.values()) / 1e9
        layer_gb = roles["experts"].nbytes / roles["experts"].calls / 1e9
        for name, seconds, gb in zip(
            BARS, (statistics.median(layers), statistics.median(steps)), (layer_gb, step_gb), strict=True
        ):
            ratios[name].append(seconds / (gb / limits[-1]))
            shown[name].append((seconds * 1e3, gb))

    rows: list[Row] = []
    for name, bar in BARS.items():
        ratio = statistics.median(ratios[name])
        ms = statistics.median(ms for ms, _ in shown[name])
        gb = statistics.median(gb for _, gb in shown[name])
        rows.append(
            {
                "case": name,
                "ms": ms,
                "gb": gb,
                "gb_s": gb / ms * 1e3,
                "time_over_limit": ratio,
                "bar": bar,
                "holds": ratio <= bar,
                "share_of_limit": 1 / ratio,
            }
        )
    ran = MemoryUse.now()
    found = conditions(
        machine,
        model=options.model.resolve().name,
        rounds=options.rounds,
        read_bandwidth_gb_s=round(statistics.median(limits), 2),
        load_ms=round(bench.load_seconds * 1e3, 1),
        private_mb_loaded=round(loaded.private_bytes / 1e6, 1),
        private_mb_run_without_probe=round((ran.private_bytes - PROBE_BYTES) / 1e6, 1),
        mapped_mb_run=round(ran.mapped_bytes / 1e6, 1),
        load_average_after=float(Path("/proc/loadavg").read_text().split()[0]),
    )
    print_report("distance from the memory limit", found, rows)
    if options.json:
        write_json(options.json, found, rows)
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
