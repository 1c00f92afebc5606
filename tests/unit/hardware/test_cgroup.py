"""Limits of control groups, both versions, against the files that the kernel shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from k2hybrid.hardware.cgroup import Limits, read_limits
from tests.unit.hardware.sysfs import put

GROUP = "sys/fs/cgroup"
NO_LIMIT_1 = "9223372036854771712\n"


def test_version_2_takes_the_least_of_all_above(tmp_path: Path) -> None:
    put(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user.slice/job\n",
            f"{GROUP}/cgroup.controllers": "cpu memory\n",
            f"{GROUP}/user.slice/memory.max": "8589934592\n",
            f"{GROUP}/user.slice/cpu.max": "max 100000\n",
            f"{GROUP}/user.slice/cpuset.cpus.effective": "0-15\n",
            f"{GROUP}/user.slice/job/memory.max": "max\n",
            f"{GROUP}/user.slice/job/memory.swap.max": "0\n",
            f"{GROUP}/user.slice/job/cpu.max": "250000 100000\n",
            f"{GROUP}/user.slice/job/cpuset.cpus.effective": "0-3,8\n",
            f"{GROUP}/other/memory.max": "4096\n",
        },
    )
    assert read_limits(tmp_path) == Limits(2, 8 << 30, 0, 2.5, (0, 1, 2, 3, 8))


def test_version_2_in_a_container_sees_its_limits_at_the_top(tmp_path: Path) -> None:
    put(
        tmp_path,
        {
            "proc/self/cgroup": "0::/../../docker/abc\n",  # as seen from another namespace
            f"{GROUP}/cgroup.controllers": "",
            f"{GROUP}/memory.max": "1073741824",
            f"{GROUP}/cpu.max": "50000 100000",
        },
    )
    assert read_limits(tmp_path) == Limits(2, 1 << 30, None, 0.5, None)


@pytest.mark.parametrize("cpu", ["cpu", "cpu,cpuacct"])
def test_version_1(tmp_path: Path, cpu: str) -> None:
    put(
        tmp_path,
        {
            "proc/self/cgroup": "9:memory:/docker/x\n8:cpu,cpuacct:/docker/x\n7:cpuset:/docker/x\n0::/\n",
            f"{GROUP}/memory/memory.limit_in_bytes": NO_LIMIT_1,
            f"{GROUP}/memory/docker/x/memory.limit_in_bytes": "2147483648\n",
            f"{GROUP}/{cpu}/docker/x/cpu.cfs_quota_us": "400000\n",
            f"{GROUP}/{cpu}/docker/x/cpu.cfs_period_us": "100000\n",
            f"{GROUP}/{cpu}/cpu.cfs_quota_us": "-1\n",
            f"{GROUP}/{cpu}/cpu.cfs_period_us": "100000\n",
            f"{GROUP}/cpuset/cpuset.effective_cpus": "0-7\n",
        },
    )
    assert read_limits(tmp_path) == Limits(1, 2 << 30, None, 4.0, tuple(range(8)))


def test_version_1_where_the_path_is_the_hosts(tmp_path: Path) -> None:
    put(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/0123/not-here\n",
            f"{GROUP}/memory/memory.limit_in_bytes": "536870912\n",
        },
    )
    assert read_limits(tmp_path).memory_bytes == 512 << 20


def test_no_control_groups(tmp_path: Path) -> None:
    assert read_limits(tmp_path) == Limits(0, None, None, None, None)


@pytest.mark.parametrize("text", ["", "x", "-5", "1 2 3", "0", "100000 0", "\xff", "99999999999999999999999"])
def test_garbled_limits_are_none(tmp_path: Path, text: str) -> None:
    put(
        tmp_path,
        {
            "proc/self/cgroup": f"0::/a\n{text}\n::\n1:memory\n",
            f"{GROUP}/cgroup.controllers": "",
            f"{GROUP}/a/cpu.max": text,
            f"{GROUP}/a/cpuset.cpus.effective": "?",
            f"{GROUP}/memory.max": text if text != "0" else "max",
        },
    )
    limits = read_limits(tmp_path)
    assert limits.cpus is None
    assert limits.cpuset is None
    assert limits.memory_bytes is None
