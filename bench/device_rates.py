"""What a card does at best, and how long calls take on it: for the benches of the device kernels.

Times are of captured graphs, so that launches from Python do not count, over operands that together exceed
four times the L2 cache, so that none is found there. The limit of a call is the longer of two times: its
bytes at the rate of a device copy (reads and writes together), its operations at that of a bf16 matmul.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from k2hybrid.runtime.card_rates import copy_rate, matmul_rate, us_per_call

__all__ = ["Rates", "command", "measured_rates", "report", "rotation", "rows_of_case", "us_per_call"]


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


TileT = TypeVar("TileT")


def rows_of_case(
    rates: Rates,
    what: Mapping[str, Any],
    work: tuple[float, float],
    measure: Callable[[TileT | None], float],
    *,
    bar: float | None,
    tiles: Sequence[TileT | None] = (None,),
    named: Callable[[TileT], str] = str,
) -> Iterator[dict[str, Any]]:
    """Rows of one case, by the kernel's own choice of a tile (None), which is held to its bar, or by others.

    Args:
        what: the case.
        work: its bytes and operations.
        measure: microseconds with a tile.
        bar: share of the limit; None: there is none.
    """
    for tile in tiles:
        row = {**what, "bar": bar} | ({} if tile is None else {"tile": named(tile)})
        try:
            us = measure(tile)
        except Exception as error:
            # Of the tiles that are tried some ask for more than the card has.
            if tile is None or type(error).__name__ != "OutOfResources":
                raise
            continue
        if bar is not None and tile is None:
            row["holds"] = rates.limit_us(*work) >= bar * us
        yield row | rates.row(us, *work)


def measured_rates() -> Rates:
    """This card's."""
    return Rates(copy_rate(), matmul_rate())


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
