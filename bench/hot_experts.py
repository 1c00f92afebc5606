"""Which half life and margin for the experts on the card? By replay of traces whose favourites drift.

    python -m bench.hot_experts --json bench/results/hot-experts.json

Traces of Kimi-K2-Thinking's widths, 384 experts with 8 a token, but fewer layers; shares are of all experts.
Given a file of `k2hybrid serve --trace`, that one is replayed instead (its hand-offs of one row).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from k2hybrid.bench.report import Row, print_report, write_json
from k2hybrid.experts.hot import HotRules
from k2hybrid.experts.hot_replay import replay_hot
from k2hybrid.experts.synthetic import synthetic
from k2hybrid.experts.traces import Trace, read_trace

LAYERS, EXPERTS, TOP_K = 12, 384, 8
PASSES, WARM_UP = 3000, 1000
SHARES = (0.0125, 0.025, 0.05, 0.1)
HALF_LIVES = (32.0, 128.0, 256.0, 512.0, 2048.0)
MARGINS = (0.0, 0.25, 0.5, 1.0)
TAKEN = HotRules()
# Name: skew, stickiness, drift a pass.
RULES = {
    "skewed": (0.8, 0.0, 0.0),
    "drifting slowly": (0.8, 0.3, 1 / 5000),
    "drifting": (0.8, 0.3, 1 / 1000),
    "drifting fast": (0.8, 0.3, 1 / 250),
    "uniform": (0.0, 0.0, 0.0),
}


def traces() -> Iterator[tuple[str, Trace]]:
    """Name and trace."""
    for name, (skew, stickiness, drift) in RULES.items():
        yield (
            name,
            synthetic(
                layers=LAYERS,
                experts=EXPERTS,
                top_k=TOP_K,
                passes=PASSES,
                skew=skew,
                stickiness=stickiness,
                drift=drift,
                seed=7,
            ),
        )


def rows(name: str, trace: Trace, warm_up: int) -> Iterator[Row]:
    """A row a share of the experts, half life and margin."""
    layers = len(trace.moe_layers)
    settings = [(half_life, TAKEN.margin) for half_life in HALF_LIVES]
    settings += [(TAKEN.half_life, margin) for margin in MARGINS if margin != TAKEN.margin]
    for share, (half_life, margin) in itertools.product(SHARES, settings):
        # A move is a like share of fewer layers' experts.
        moves = max(1, round(TAKEN.moves * layers / 60))
        rules = HotRules(half_life, margin, TAKEN.interval, moves)
        found = replay_hot(trace, round(share * layers * trace.header.experts), rules, warm_up)
        yield {
            "case": name,
            "share of experts": share,
            "half life": half_life,
            "margin": margin,
            "uses on the card": round(found.share, 4),
            "best fixed set": round(found.best, 4),
            "moves a pass": round(found.moves, 3),
        }


def main(arguments: list[str] | None = None) -> int:
    """Replay, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("trace", nargs="?", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    if args.trace:
        trace = read_trace(args.trace)
        trace = trace.select(trace.rows == 1)
        passes = len(trace) // max(len(trace.moe_layers), 1)
        cases = [(args.trace.name, trace, passes // 3)]
    else:
        cases = [(name, trace, WARM_UP) for name, trace in traces()]
    found = [row for case in cases for row in rows(*case)]
    conditions = {"layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K, "passes": PASSES, "warm_up": WARM_UP}
    print_report("uses that the card serves", conditions, found)
    if args.json:
        write_json(args.json, conditions, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
