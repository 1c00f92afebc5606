"""Limits of control groups, version 1 or 2: the smallest of this process's group and all above it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from k2hybrid.hardware.sysfs import parse_ids, read_text, whole_number

MOUNT = "sys/fs/cgroup"
# Version 1 says "no limit" with the largest multiple of a page; no machine has an exabyte.
_NO_LIMIT = 1 << 60
_T = TypeVar("_T", int, float)


@dataclass(frozen=True, slots=True)
class Limits:
    """None: not limited, or not told.

    Attributes:
        version: 2, 1, or 0 without control groups.
        cpus: CPU time a second, in CPUs; threads beyond it are stopped for the rest of each period.
        cpuset: the CPUs of the group.
    """

    version: int
    memory_bytes: int | None
    swap_bytes: int | None
    cpus: float | None
    cpuset: tuple[int, ...] | None


def read_limits(root: Path = Path("/")) -> Limits:
    """The limits on this process, below `root`."""
    paths = _paths(root)
    mount = root / MOUNT
    if os.path.exists(mount / "cgroup.controllers"):
        folders = list(_up(mount, paths.get("", "/")))
        cpusets = [parse_ids(read_text(folder / "cpuset.cpus.effective")) for folder in folders]
        return Limits(
            2,
            _least(folders, lambda folder: _bounded(folder / "memory.max")),
            _least(folders, lambda folder: _bounded(folder / "memory.swap.max")),
            _least(folders, _quota_2),
            next((cpus for cpus in cpusets if cpus), None),
        )
    if not paths:
        return Limits(0, None, None, None, None)
    memory, cpu, cpuset = (
        list(_up(_controller(mount, name), paths.get(name, "/"))) for name in ("memory", "cpu", "cpuset")
    )
    cpusets = [parse_ids(read_text(folder / "cpuset.effective_cpus")) for folder in cpuset]
    return Limits(
        1,
        _least(memory, lambda folder: _bounded(folder / "memory.limit_in_bytes")),
        None,
        _least(cpu, _quota_1),
        next((cpus for cpus in cpusets if cpus), None),
    )


def _paths(root: Path) -> dict[str, str]:
    """The group's path by controller; "" stands for version 2."""
    found = {}
    for line in read_text(root / "proc/self/cgroup").splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3:
            for controller in parts[1].split(","):
                found[controller] = parts[2]
    return found


def _controller(mount: Path, name: str) -> Path:
    joint = mount / "cpu,cpuacct"
    return joint if name == "cpu" and not os.path.isdir(mount / name) else mount / name


def _up(mount: Path, path: str) -> Iterator[Path]:
    """The group's folder and those above it; a container may see its host's path: then the top alone."""
    inside = PurePosixPath(path.lstrip("/"))
    for part in (inside, *inside.parents):
        folder = mount / part
        if ".." not in part.parts and os.path.isdir(folder):
            yield folder


def _least(folders: list[Path], read: Callable[[Path], _T | None]) -> _T | None:
    found = [value for folder in folders if (value := read(folder)) is not None]
    return min(found, default=None)


def _bounded(path: Path) -> int | None:
    value = whole_number(read_text(path))
    return value if value is not None and 0 <= value < _NO_LIMIT else None


def _quota_2(folder: Path) -> float | None:
    words = read_text(folder / "cpu.max").split()
    return _quotient(*words) if len(words) == 2 else None


def _quota_1(folder: Path) -> float | None:
    return _quotient(read_text(folder / "cpu.cfs_quota_us"), read_text(folder / "cpu.cfs_period_us"))


def _quotient(quota: str, period: str) -> float | None:
    above, below = whole_number(quota), whole_number(period)
    return above / below if above and below and above > 0 and below > 0 else None
