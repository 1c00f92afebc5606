"""Which policy for streamed experts, with which half life, and would reading ahead pay? By replay.

    python -m bench.routing mini.trace
    python -m bench.expert_cache mini.trace --json bench/results/expert-cache.json --plot …/expert-cache.svg

Replays recorded traces (their hand-offs of one row) and synthetic ones of Kimi-K2-Thinking's sizes. Times are
those of `experts/prefetch.py` for that model's bytes, whatever model a trace is of.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.plots import plot_expert_cache
from k2hybrid.bench.report import Row, print_report, write_json
from k2hybrid.experts.prefetch import PrefetchGain, Rates, StepTimes, recall, step_times
from k2hybrid.experts.simulate import POLICIES, PolicyName, Replay, Tickets, replay, sweep
from k2hybrid.experts.synthetic import foreseen, synthetic
from k2hybrid.experts.traces import Trace, read_trace

# Kimi-K2-Thinking: MoE layers, experts, top_k; bytes of an expert, and of the dense weights of a layer.
LAYERS, EXPERTS, TOP_K = 60, 384, 8
EXPERT_BYTES = 24_772_608
DENSE_BYTES = 21.09e9 / LAYERS

SHARES = (0.125, 0.25, 0.5, 0.75)
HALF_LIVES = (1.0, 4, 8, 16, 32, 64, 128, 512)
TAKEN = 8.0  # of the half lives, for prefetch and the picture
TAKEN_POLICY: tuple[PolicyName, float] = ("lrfu-ghost", TAKEN)
PASSES = 1000
TOPIC = 250  # passes
AHEAD_PASSES = 400  # of a synthetic trace with predictions
WARM_UP = 0.5  # of a trace: fills the slots and is not counted
EXTRA = (0, 1, 2, 4)  # ids a row beyond top_k that are read ahead
DISKS = (3.5e9, 7e9, 14e9)
DENSE_RATES = {"RAM, 80 GB/s": 80e9, "a GPU, 1 TB/s": 1e12}
RAM = 80e9


def synthetics(passes: int) -> Iterator[tuple[str, Trace]]:
    """Name and trace."""
    sizes = {"layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K, "expert_bytes": EXPERT_BYTES}
    for name, skew, stickiness in (
        ("uniform", 0.0, 0.0),
        ("skewed", 0.8, 0.0),
        ("sticky", 0.0, 0.5),
        ("skewed and sticky", 0.8, 0.5),
    ):
        rule = {"skew": skew, "stickiness": stickiness}
        yield name, synthetic(**sizes, passes=passes, **rule, seed=1)  # type: ignore[arg-type]
    parts = [
        synthetic(**sizes, passes=TOPIC, skew=0.8, stickiness=0.3, seed=2 + at)
        for at in range(passes // TOPIC)
    ]
    yield "changing topics", _joined(parts)


def _joined(parts: list[Trace]) -> Trace:
    """One after the other, without predictions; each has one row a hand-off."""
    ids = np.concatenate([part.ids for part in parts])
    layer = np.concatenate([part.layer for part in parts])
    count = len(layer)
    return dataclasses.replace(
        parts[0],
        layer=layer,
        rows=np.ones(count, np.int32),
        starts=np.arange(count + 1) * parts[0].header.top_k,
        ids=ids,
        ahead_layer=np.full(count, -1, np.int32),
        ahead_starts=np.zeros(count + 1, np.int64),
    )


def hit_rates(name: str, tickets: Tickets) -> Iterator[Row]:
    """A row a share of the experts in RAM: each policy, with the best half life of those that have one."""
    for share in SHARES:
        slots = _slots(tickets, share)
        row: Row = {"case": name, "share": share, "lru": _rate(replay(tickets, slots))}
        for policy in ("lrfu", "lrfu-ghost"):
            rates = {h: _rate(replay(tickets, slots, policy, h)) for h in HALF_LIVES}
            best = max(rates, key=lambda h: rates[h])
            row |= {policy: rates[best], f"{policy} half life": best, f"{policy}, {TAKEN:g}": rates[TAKEN]}
            row[f"{policy} by half life"] = {f"{h:g}": rate for h, rate in rates.items()}
        yield row | {"min": _rate(replay(tickets, slots, "min"))}


def gains(name: str, trace: Trace, policies: Sequence[tuple[PolicyName, float | None]]) -> Iterator[Row]:
    """A row a share, policy, disk and rate of the dense weights: the best gain over the extra ids."""
    top_k = trace.header.top_k
    widths = [top_k + extra for extra in EXTRA if top_k + extra <= trace.header.ahead]
    cases = itertools.product(SHARES[1:], DENSE_RATES, DISKS, policies)
    for share, dense, disk, (policy, half_life) in cases:
        slots = _slots(Tickets.of(trace), share)
        rates = Rates(EXPERT_BYTES, DENSE_BYTES, RAM, disk, DENSE_RATES[dense])

        times = partial(
            step_times,
            trace,
            slots,
            rates,
            policy=policy,
            half_life=half_life,
            warm_up=int(WARM_UP * len(trace)),
        )
        without = times(width=0)
        found = {width: PrefetchGain(without, times(width=width)) for width in widths}
        best = max(found, key=lambda width: found[width].gain)
        ahead = found[best].ahead
        yield {
            "case": name,
            "share": share,
            "policy": policy,
            "dense from": dense,
            "disk_gb_s": disk / 1e9,
            "layer_ms": round(_layer_ms(without, trace), 3),
            "layer_ms_ahead": round(_layer_ms(ahead, trace), 3),
            "extra": best - top_k,
            "read_ahead_used": round(ahead.used / max(ahead.read_ahead, 1), 3),
            "gain": round(found[best].gain, 4),
            "gain, only in time": round(PrefetchGain(without, times(width=top_k, in_time=True)).gain, 4),
        }


def _layer_ms(times: StepTimes, trace: Trace) -> float:
    return times.step_ms / len(trace.moe_layers)


def _slots(tickets: Tickets, share: float) -> int:
    return max(round(share * tickets.moe_layers * tickets.experts), tickets.largest)


def _rate(found: Replay) -> float:
    return round(found.hit_rate_after(int(WARM_UP * len(found.tickets.layer))), 4)


def _sweep(tickets: Tickets) -> list[Replay]:
    every = tickets.moe_layers * tickets.experts
    sizes = sorted({max(tickets.largest, every * step // 10) for step in range(1, 11)})
    return sweep(tickets, sizes, POLICIES, TAKEN)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", type=Path, nargs="*", metavar="TRACE", help="recorded traces")
    parser.add_argument("--passes", type=int, default=PASSES, help="of a synthetic trace")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    args = parser.parse_args()

    rates: list[Row] = []
    paid: list[Row] = []
    pictures: list[tuple[str, list[Replay], int]] = []
    found: dict[str, Any] = {
        "note": "traces of the built-in model are no evidence for Kimi-K2-Thinking",
        "synthetic_passes": args.passes,
        "topic_passes": TOPIC,
        "ahead_passes": AHEAD_PASSES,
        "warm_up": WARM_UP,
        "traces": {},
    }
    for path in args.traces:
        trace = read_trace(path)
        trace = trace.select(trace.rows == 1)
        top_k, name = trace.header.top_k, f"{trace.header.model}, recorded ({path.stem})"
        widths = range(top_k, trace.header.ahead + 1)
        found["traces"][name] = {
            "passes": len(trace) // len(trace.moe_layers),
            "recall_by_extra": {str(w - top_k): round(recall(trace, w), 4) for w in widths},
        }
        tickets = Tickets.of(trace)
        rates += hit_rates(name, tickets)
        pictures.append((name, _sweep(tickets), trace.header.expert_bytes))
        if trace.header.ahead >= top_k:
            paid += gains(name, trace, (("lru", None), TAKEN_POLICY))
    for name, trace in synthetics(args.passes):
        tickets = Tickets.of(trace)
        rates += hit_rates(f"synthetic, {name}", tickets)
        pictures.append((f"synthetic, {name}", _sweep(tickets), EXPERT_BYTES))
        if name == "skewed and sticky":
            short = trace.select(np.arange(len(trace)) < AHEAD_PASSES * LAYERS)
            for quality in (0.5, 0.8):
                known = foreseen(short, TOP_K + max(EXTRA), quality)
                paid += gains(f"synthetic, {name}, recall {quality:g}", known, (TAKEN_POLICY,))

    shown = [{k: v for k, v in row.items() if not isinstance(v, dict)} for row in rates + paid]
    print_report("experts found in RAM", found, shown[: len(rates)])
    print_report("what reading ahead gains", {}, shown[len(rates) :])
    if args.json:
        write_json(args.json, found, rates + paid)
    if args.plot:
        plot_expert_cache(pictures, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
