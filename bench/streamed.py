"""RAM smaller than the experts: decode steps against the time that memory and disk alone would need.

    k2hybrid synth deep --like kimi-k2-thinking --layers 7 --experts 64 --vocab k2hybrid/mini/tiktoken.model
    python bench/streamed.py deep [--json FILE]

A share of the experts has room in RAM; which experts a step asks for comes from made-up traces, skewed and
even, in place of the router's choice. The limit of a step is

    dense bytes / RAM rate + Σ over layers max(bytes of present experts / RAM rate, missed bytes / disk rate)

with both rates measured between the steps, the disk's by direct reads of the same size and depth as the
store's. Bars: 1.15 times the limit (medians), and no more memory than allowed: private and pinned memory for
experts, and what the page cache holds of their files.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from bench.page_cache import cached_bytes, forget
from k2hybrid.bench.command import Bench
from k2hybrid.bench.report import Row, conditions, print_report, write_json
from k2hybrid.checkpoint.spec import read_spec
from k2hybrid.experts.placement import place_experts, slot_bytes
from k2hybrid.experts.simulate import Tickets, replay
from k2hybrid.experts.synthetic import synthetic
from k2hybrid.experts.traces import Trace
from k2hybrid.hardware.bandwidth import quick_gb_s
from k2hybrid.hardware.disk import direct_read_gb_s
from k2hybrid.hardware.memory import MemoryUse
from k2hybrid.native.machine import Machine
from k2hybrid.runtime.assembly import Parts
from k2hybrid.runtime.experts import HALF_LIFE_PASSES, expert_sizes
from k2hybrid.types import RoutedExperts, Ticket

BAR = 1.15
SLACK_BYTES = 1_000_000_000  # beyond --expert-ram
PROBE_BYTES = 512 << 20
REQUEST_BYTES, DEPTH = 2 << 20, 16  # of the store's reader
TRACES = {"skewed": (1.0, 0.3), "even": (0.0, 0.0)}  # skew and stickiness


class TracedExperts:
    """`RoutedExperts` that asks for what a trace says, and keeps the tickets."""

    def __init__(self, experts: RoutedExperts, trace: Iterator[np.ndarray]) -> None:
        self._experts = experts
        self.trace = trace
        self.tickets: list[Ticket] = []

    def submit(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Ticket:
        """See `types.RoutedExperts.submit`; the ids are the trace's."""
        asked = torch.from_numpy(next(self.trace).astype(np.int32)).reshape(ids.shape)
        self.tickets.append(self._experts.submit(layer, x, asked, weights))
        return self.tickets[-1]


class TracedBench(Bench):
    """A bench whose routing comes from a trace. Hand-offs are collected where the model does so."""

    trace: Iterator[np.ndarray]

    def _recorded(self, parts: Parts) -> Parts:
        self.traced = TracedExperts(parts.experts, self.trace)
        return super()._recorded(parts)._replace(experts=self.traced)


def tickets_of(trace: Trace) -> Iterator[np.ndarray]:
    """The ids of each ticket."""
    for at in range(len(trace)):
        yield np.asarray(trace.ids[trace.starts[at] : trace.starts[at + 1]])


def run(model: Path, machine: Machine, share: float, kind: str, options: argparse.Namespace) -> Row:
    """One case: a share of the experts in RAM, one kind of trace."""
    spec = read_spec(model)
    sizes = expert_sizes(spec)
    ram = int(share * sizes.count) * sum(slot_bytes(sizes, 1))
    placement = place_experts(sizes, node_memory={-1: 1 << 50}, expert_ram=ram)
    passes = options.warm + options.rounds * options.steps
    skew, stickiness = TRACES[kind]
    trace = synthetic(
        layers=sizes.layers, experts=sizes.experts, top_k=spec.top_k, passes=passes, skew=skew,
        stickiness=stickiness, seed=7,
    )  # fmt: skip
    forget(model)
    TracedBench.trace = tickets_of(trace)
    before = MemoryUse.now().private_bytes
    bench = TracedBench(model, machine, passes + 64, placement=placement)
    store = bench.store
    assert store is not None
    while store.progress is not None and store.progress.running:
        time.sleep(0.1)
    for at in range(options.warm):
        bench.step(at, 1)
    start = store.stats
    probe = torch.ones(PROBE_BYTES, dtype=torch.uint8)
    shards = sorted(model.glob("*.safetensors"))
    ratios, shown, hidden = [], [], []
    rates: list[tuple[float, float]] = []
    at = options.warm
    for _ in range(options.rounds):
        # The limits of this moment, before and after the steps.
        ends = [(quick_gb_s(machine, probe), direct_read_gb_s(shards, REQUEST_BYTES, DEPTH, 0.4).gb_s)]
        steps = []
        for _ in range(options.steps):
            bench.reset()
            bench.traced.tickets.clear()
            seconds = bench.step(at, 1)
            dense = sum(tally.nbytes for tally in bench.roles().values())
            misses = [ticket.stats.misses for ticket in bench.traced.tickets]
            steps.append((seconds, dense, misses))
            at += 1
        ends.append((quick_gb_s(machine, probe), direct_read_gb_s(shards, REQUEST_BYTES, DEPTH, 0.4).gb_s))
        ram_rate, disk_rate = (statistics.mean(pair) * 1e9 for pair in zip(*ends, strict=True))
        rates.append((ram_rate, disk_rate))
        for seconds, dense, misses in steps:
            layers = [
                max(
                    (spec.top_k - missed) * sizes.expert_bytes / ram_rate,
                    missed * sizes.expert_bytes / disk_rate,
                )
                for missed in misses
            ]
            limit = dense / ram_rate + sum(layers)
            ratios.append(seconds / limit)
            shown.append((seconds, limit))
            hidden.append(sum(misses))
    stats = store.stats
    memory = MemoryUse.now().private_bytes - before - probe.nbytes
    cached = cached_bytes(store)
    found, fetched = stats.hits - start.hits, stats.misses - start.misses
    measured = slice(options.warm * sizes.layers, None)
    missed = replay(Tickets.of(trace), placement.slots, "lrfu-ghost", HALF_LIFE_PASSES).missed_by_ticket()[
        measured
    ]
    simulated = 1 - missed.sum() / (missed.size * spec.top_k)
    ratio = statistics.median(ratios)
    used = memory + cached
    row: Row = {
        "case": f"{share:.0%} of experts in RAM, {kind}",
        "slots": placement.slots,
        "step_ms": statistics.median(s for s, _ in shown) * 1e3,
        "limit_ms": statistics.median(limit for _, limit in shown) * 1e3,
        "time_over_limit": ratio,
        "bar": BAR,
        "hit_rate": found / (found + fetched),
        "simulated_hit_rate": simulated,
        "misses_per_step": statistics.mean(hidden),
        "disk_gb_s": statistics.median(disk for _, disk in rates) / 1e9,
        "ram_gb_s": statistics.median(rate for rate, _ in rates) / 1e9,
        "expert_memory_gb": used / 1e9,
        "allowed_gb": (ram + SLACK_BYTES) / 1e9,
        "holds": ratio <= BAR and used <= ram + SLACK_BYTES,
    }
    store.close()
    bench.checkpoint.close()
    return row


def main() -> int:
    """Run all cases; exit status 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="of a round, between two probes")
    parser.add_argument("--warm", type=int, default=12, help="steps before the first round")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    machine = Machine(options.threads)
    machine.pin_caller()
    rows = [run(options.model, machine, share, kind, options) for share in options.shares for kind in TRACES]
    found = conditions(
        machine,
        model=options.model.resolve().name,
        rounds=options.rounds,
        steps=options.steps,
        load_average_after=float(Path("/proc/loadavg").read_text().split()[0]),
    )
    print_report("streamed experts", found, rows)
    if options.json:
        write_json(options.json, found, rows)
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
