"""One shape for every benchmark's result: the conditions it was run under, and rows of figures."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from k2hybrid.hardware.bandwidth import Bandwidth
from k2hybrid.hardware.doctor import package_version
from k2hybrid.native.machine import ALLOWED_CPUS, Machine

Row = dict[str, Any]


def conditions(machine: Machine, bandwidth: Bandwidth | None = None, **more: Any) -> dict[str, Any]:
    """Whatever a reader needs to judge the figures: machine, versions, load, the measured limit."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cpus_usable": len(ALLOWED_CPUS),
        "load_average_before": round(os.getloadavg()[0], 2),
        "threads": machine.threads,
        "isa": machine.isa,
        "k2hybrid": package_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if bandwidth is not None:
        found["read_bandwidth_gb_s"] = round(bandwidth.gb_s, 2)
        found["read_bandwidth_best_variant"] = bandwidth.best
        found["read_bandwidth_variants"] = {name: round(v, 2) for name, v in bandwidth.variants.items()}
    return {**found, **more}


def write_json(path: Path, found: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write `{"conditions": …, "rows": […]}`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"conditions": found, "rows": rows}, indent=2, default=str) + "\n")


def print_report(title: str, found: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Print the conditions and a table of the rows; columns in the order of their first appearance."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(", ".join(f"{key} {value}" for key, value in found.items() if not isinstance(value, dict)))
    table = Table(title=title)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in rows:
        table.add_row(*(_shown(row.get(column, "")) for column in columns))
    console.print(table)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
