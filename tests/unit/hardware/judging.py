"""Asks a list of findings for what a test expects in it."""

from __future__ import annotations

from pathlib import Path

from k2hybrid.hardware.checks.finding import Finding, Level
from k2hybrid.hardware.topology import Topology, read_topology
from tests.unit.hardware.sysfs import FakeNode, write_machine


def one(findings: list[Finding], topic: str) -> Finding:
    (found,) = (finding for finding in findings if finding.topic == topic)
    return found


def judged(finding: Finding, level: Level, *words: str) -> None:
    """The finding has this level, and these words in what it says."""
    assert finding.level == level, finding
    told = f"{finding.found} | {finding.why} | {finding.fix}"
    assert [word for word in words if word not in told] == [], told


def machine(root: Path, nodes: list[FakeNode]) -> Topology:
    write_machine(root, nodes)
    return read_topology(root, [thread for node in nodes for core in node.cores for thread in core])
