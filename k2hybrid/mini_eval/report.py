"""Rows of figures against their bars: as a table, as JSON, and as an exit status."""

from __future__ import annotations

import datetime
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from k2hybrid.hardware.doctor import machine_rows, package_version

LEAST_CASES = 30  # fewer do not carry a verdict
TOO_FEW = "too few cases"
_COLUMNS = ("part", "cell", "cases", "right", "share", "bar", "")
_LEFT = ("part", "cell", "")


@dataclass(frozen=True)
class Row:
    """`right` of `cases`. `bar` is the least share asked for, None where none is."""

    part: str
    cell: str
    cases: int
    right: int
    bar: float | None = None

    @property
    def share(self) -> float | None:
        return self.right / self.cases if self.cases else None

    @property
    def verdict(self) -> str:
        """met, MISSED, "too few cases" for either, or nothing where there is no bar."""
        if self.bar is None:
            return ""
        if self.share is None or self.cases < LEAST_CASES:
            return TOO_FEW
        return "met" if self.share >= self.bar else "MISSED"

    def cells(self) -> tuple[str, ...]:
        """The row as texts, in the order of the columns."""
        share = "" if self.share is None else f"{100 * self.share:.1f} %"
        bar = "" if self.bar is None else f">= {100 * self.bar:.0f} %"
        return self.part, self.cell, str(self.cases), str(self.right), share, bar, self.verdict

    def as_json(self) -> dict[str, Any]:
        return {
            "part": self.part, "cell": self.cell, "n": self.cases, "right": self.right, "share": self.share,
            "bar": self.bar, "verdict": self.verdict,
        }  # fmt: skip


def conditions(**more: Any) -> dict[str, Any]:
    """What a reader needs beside the figures: when, where, and with which versions."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **more,
        **{
            name: package_version(name)
            for name in ("k2hybrid", "torch", "transformers", "tiktoken")
        },
        "python": platform.python_version(),
        "machine": {name: value for name, value in machine_rows() if name in ("CPU", "cores", "RAM")},
    }  # fmt: skip


def print_report(found: Mapping[str, Any], rows: Sequence[Row], notes: Sequence[str]) -> None:
    """The conditions, the table and the notes; a drawn table on a terminal, aligned text elsewhere."""
    from rich.console import Console
    from rich.table import Table

    for name, value in found.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        print(f"{name}: {shown}")
    print()
    console = Console(width=max(100, shutil.get_terminal_size().columns), highlight=False)
    if console.is_terminal:
        table = Table()
        for column in _COLUMNS:
            side: Literal["left", "right"] = "left" if column in _LEFT else "right"
            table.add_column(column, justify=side, no_wrap=True)
        for row, after in zip(rows, [*rows[1:], None], strict=True):
            style = "bold red" if row.verdict == "MISSED" else None
            table.add_row(*row.cells(), style=style, end_section=after is None or after.part != row.part)
        console.print(table)
    else:
        print_plain(rows)
    for note in notes:
        print(note)
    verdicts = [row.verdict for row in rows if row.verdict]
    print(f"bars met: {verdicts.count('met')}, MISSED: {verdicts.count('MISSED')}, ", end="")
    print(f"not judged for too few cases: {verdicts.count(TOO_FEW)}")
    for row in rows:
        if row.verdict == "MISSED":
            print(f"MISSED: {row.part}: {row.cell}")


def print_plain(rows: Sequence[Row]) -> None:
    """Aligned columns, a line a row."""
    lines = [_COLUMNS, *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    for line in lines:
        texts = [
            cell.ljust(width) if column in _LEFT else cell.rjust(width)
            for cell, width, column in zip(line, widths, _COLUMNS, strict=True)
        ]
        print("  ".join(texts).rstrip())


def write_json(path: Path, found: Mapping[str, Any], rows: Sequence[Row], notes: Sequence[str]) -> None:
    """Write `{"conditions": …, "rows": […], "notes": […]}`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"conditions": found, "rows": [row.as_json() for row in rows], "notes": list(notes)}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def passed(rows: Sequence[Row]) -> bool:
    """Whether no bar was missed."""
    return all(row.verdict != "MISSED" for row in rows)
