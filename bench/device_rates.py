"""What a card does at best, and how long calls take on it: for the benches of the device kernels.

Times are of captured graphs, so that launches from Python do not count, over operands that together exceed
four times the L2 cache, so that none is found there. The limit of a call is the longer of two times: its
bytes at the rate of a device copy (reads and writes together), its operations at that of a bf16 matmul.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

REPLAYS = 20


@dataclass(frozen=True)
class Rates:
    """Measured on this card."""

    bytes_per_s: float
    flop_per_s: float

    def limit_us(self, nbytes: float, flop: float) -> float:
        return 1e6 * max(nbytes / self.bytes_per_s, flop / self.flop_per_s)

    def row(self, us: float, nbytes: float, flop: float) -> dict[str, Any]:
        """The part of a result row that all benches share."""
        limit = self.limit_us(nbytes, flop)
        return {
            "us": round(us, 2),
            "limit_us": round(limit, 2),
            "limited_by": "memory" if nbytes / self.bytes_per_s > flop / self.flop_per_s else "operations",
            "share_of_limit": round(limit / us, 3),
        }


def us_per_call(calls: Sequence[Callable[[], Any]], replays: int = REPLAYS) -> float:
    """Median over replays of one graph of all calls, one after the other."""
    for call in calls:
        call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    new_event: Any = torch.cuda.Event
    times: list[float] = []
    for _ in range(replays + 3):
        start, end = new_event(enable_timing=True), new_event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times[3:]) / len(calls)


def measured_rates(copy_bytes: int = 1 << 30, side: int = 8192) -> Rates:
    source = torch.empty(copy_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = us_per_call([lambda: target.copy_(source)])
    a, b = (torch.randn(side, side, device="cuda").bfloat16() for _ in range(2))
    product = torch.empty_like(a)
    matmul = us_per_call([lambda: torch.matmul(a, b, out=product)])
    return Rates(2 * copy_bytes / copy * 1e6, 2 * side**3 / matmul * 1e6)


def rotation(nbytes: int) -> int:
    """How many operands of this size exceed four times the L2 cache; two at least."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(4 * cache // nbytes + 1, 2)


def command(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write conditions and rows here")
    return parser


def report(rows: Iterable[dict[str, Any]], path: Path | None, conditions: dict[str, Any]) -> int:
    """Print each row as it comes; keep all so far in `path`, so that a bench cut short leaves what it has.

    Returns:
        1 if a row misses its bar (`holds`), else 0.
    """
    kept: list[dict[str, Any]] = []
    for row in rows:
        kept.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        if path is not None:
            path.write_text(json.dumps({"conditions": conditions, "rows": kept}, indent=1) + "\n")
    return 0 if all(row.get("holds", True) for row in kept) else 1
