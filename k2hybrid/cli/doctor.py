"""`k2hybrid doctor`: what this machine offers, what slows it down or breaks, and the fix for each."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from k2hybrid.hardware.checks.finding import Finding

_PUBLISHED = "moonshotai/Kimi-K2-Thinking"
_WIDTH = 20  # of a topic


def add_doctor_options(parser: argparse.ArgumentParser) -> None:
    """What to look at, and where to write it."""
    parser.add_argument(
        "--model",
        default=None,
        metavar="MODEL",
        help="checkpoint folder or OWNER/NAME whose disk is checked (default: where downloads go)",
    )
    parser.add_argument("--quick", action="store_true", help="do not measure memory and disk")
    parser.add_argument(
        "--json", type=Path, default=None, metavar="FILE", help="write everything as JSON too"
    )


def doctor(args: argparse.Namespace) -> int:
    """Print rows and findings; 1 if something is bad.

    Raises:
        ModelNotFoundError: `--model` names nothing that is there.
        OSError: the JSON file cannot be written.
    """
    from k2hybrid.checkpoint.hub import cache_folder, locate
    from k2hybrid.checkpoint.origin import cache_name
    from k2hybrid.cli import print_rows
    from k2hybrid.hardware.diagnosis import diagnose
    from k2hybrid.hardware.doctor import report

    if args.model is not None:
        folder, downloaded = locate(args.model), None
    else:
        folder = cache_folder()
        downloaded = _bytes_below(folder / cache_name(_PUBLISHED) / "blobs")
    rows = report()
    print_rows(rows)
    print()
    findings, measured = diagnose(folder, downloaded_bytes=downloaded, quick=args.quick)
    for line in finding_lines(findings):
        print(line)
    counts = Counter(finding.level for finding in findings)
    if args.json is not None:
        told = {
            "machine": [{"name": name.strip(), "value": value} for name, value in rows],
            "findings": [asdict(finding) for finding in findings],
            "measured": asdict(measured),
        }
        args.json.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(f"\n{counts['ok']} ok, {counts['warn']} to improve, {counts['bad']} bad")
    return 1 if counts["bad"] else 0


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    """Level, topic and what was found; below it the reason and the fix."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<5} {finding.topic:<{_WIDTH}} {finding.found}")
        if finding.level != "ok":
            lines.append(f"{'':<{_WIDTH + 6}} why: {finding.why}")
        if finding.fix:
            label = "better" if finding.level == "ok" else "fix"
            lines.append(f"{'':<{_WIDTH + 6}} {label}: {finding.fix}")
    return lines


def _bytes_below(folder: Path) -> int:
    """Bytes of the files in `folder`; 0 if it is not there."""
    try:
        return sum(entry.stat().st_size for entry in folder.iterdir() if entry.is_file())
    except OSError:
        return 0
