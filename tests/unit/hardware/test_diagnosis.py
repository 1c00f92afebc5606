"""Doctor as a whole: over made-up machines, over this one, and as a command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2hybrid.cli import main
from k2hybrid.errors import NativeError
from k2hybrid.hardware import diagnosis, disk
from k2hybrid.hardware.checks.finding import Finding
from k2hybrid.hardware.diagnosis import diagnose, last_level_cache_bytes
from k2hybrid.hardware.node_bandwidth import node_gb_s
from k2hybrid.hardware.topology import Node, read_topology
from k2hybrid.native.machine import ALLOWED_CPUS
from tests.unit.hardware.sysfs import GIB, FakeNode, even_machine, put, write_machine

SUBJECTS = {
    "kernels", "CPU clock", "CPU limit", "memory bandwidth", "NUMA nodes", "huge pages", "swap",
    "memory limit", "memory policies", "io_uring", "locked memory", "open files", "disk", "GPU",
}  # fmt: skip


def by_topic(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.topic: finding for finding in findings}


def test_this_machine_quickly(tmp_path: Path) -> None:
    findings, measured = diagnose(tmp_path, downloaded_bytes=None, quick=True)
    # "GPU" is called by what is wrong with it where something is.
    assert SUBJECTS - {"GPU"} <= set(by_topic(findings))
    assert (measured.memory_gb_s, measured.disk) == (None, None)
    assert list(tmp_path.iterdir()) == []


def test_everything_is_read_below_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_machine(root, even_machine(2), numa=True)
    put(
        root,
        {
            "proc/sys/kernel/numa_balancing": "1",
            "proc/sys/vm/zone_reclaim_mode": "1",
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/cgroup.controllers": "",
            "sys/fs/cgroup/memory.max": str(4 * GIB),
            "proc/self/mountinfo": "1 0 0:9 / / rw - nfs4 server:/ rw\n",
        },
    )
    findings, _ = diagnose(tmp_path, downloaded_bytes=0, quick=True, root=root)
    told = by_topic(findings)
    for topic in ("NUMA balancing", "zone reclaim", "memory limit", "disk", "huge pages"):
        assert told[topic].level == "warn", topic
    assert "4.0 GiB of 128 GiB" in told["memory limit"].found
    assert "free space" in told


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    findings, _ = diagnose(tmp_path, downloaded_bytes=None, quick=True, root=tmp_path / "nothing")
    assert SUBJECTS - {"GPU"} <= set(by_topic(findings))


def test_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "PROBE_FILE_BYTES", 64 << 20)
    findings, measured = diagnose(tmp_path, downloaded_bytes=None)
    assert measured.memory_gb_s is not None
    assert measured.memory_gb_s > 0
    assert measured.disk is not None
    assert f"{measured.memory_gb_s:.1f} GB/s read" in by_topic(findings)["memory bandwidth"].found
    assert f"{measured.disk.gb_s:.2f} GB/s in" in by_topic(findings)["disk speed"].found


@pytest.fixture
def all_cpus() -> Iterator[list[int]]:
    """Those this process may use, and may use again: a model that ran before pinned this thread to one."""
    pinned = os.sched_getaffinity(0)
    os.sched_setaffinity(0, ALLOWED_CPUS)
    yield list(ALLOWED_CPUS)
    os.sched_setaffinity(0, pinned)


def test_two_nodes_are_measured_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, all_cpus: list[int]
) -> None:
    """Two of this machine's cores as if they were two nodes; the folder cannot be read for its speed."""
    cpus = all_cpus
    if len(cpus) < 2:
        pytest.skip("needs two CPUs")
    write_machine(tmp_path, [FakeNode(0, [[cpus[0]]]), FakeNode(4, [[cpus[1]]])])
    monkeypatch.setattr(diagnosis, "LEAST_PROBE_BYTES", 16 << 20)
    monkeypatch.setattr(disk, "SHARE_OF_FREE", 1 << 60)
    findings, measured = diagnose(tmp_path, downloaded_bytes=None, root=tmp_path)
    assert set(measured.node_gb_s) == {0, 4}
    assert measured.memory_gb_s == pytest.approx(sum(measured.node_gb_s.values()))
    told = by_topic(findings)
    assert f"node 4: {measured.node_gb_s[4]:.1f}" in told["bandwidth of nodes"].found
    assert measured.disk is None
    assert "too little free space" in told["disk speed"].found


def test_caches_that_cores_share_count_once(tmp_path: Path) -> None:
    for cpu in range(8):
        folder = f"sys/devices/system/cpu/cpu{cpu}/cache"
        shared = "0-3" if cpu < 4 else "4-7"
        for index, size, cpus in ((0, "32K", str(cpu)), (3, "32768K", shared)):
            put(tmp_path, {f"{folder}/index{index}/size": size})
            put(tmp_path, {f"{folder}/index{index}/shared_cpu_list": cpus})
    assert last_level_cache_bytes(tmp_path, tuple(range(8))) == 64 << 20
    assert last_level_cache_bytes(tmp_path, (0, 1)) == 32 << 20
    assert last_level_cache_bytes(tmp_path / "nothing", (0, 1)) == 0


def test_a_node_is_measured_by_its_own_cores() -> None:
    node = read_topology().compute_nodes[0]
    measured = node_gb_s([node], probe_bytes=16 << 20)
    assert list(measured) == [node.id]
    assert measured[node.id] > 0


def test_a_node_without_usable_cores_says_so() -> None:
    with pytest.raises(NativeError, match=r"node 5 could not be measured: .*Invalid argument"):
        node_gb_s([Node(5, (4095,), (4095,), 1, 1, (10,))])


def test_the_command_prints_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "doctor.json"
    assert main(["doctor", "--quick", "--model", str(tmp_path), "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    told = json.loads(out.read_text())
    assert {row["name"] for row in told["machine"]} >= {"CPU", "RAM", "kernels", "torch"}
    assert told["measured"] == {"memory_gb_s": None, "node_gb_s": {}, "disk": None}
    for finding in told["findings"]:
        assert any(
            line.startswith(f"{finding['level']:<5} {finding['topic']}") and finding["found"] in line
            for line in printed.splitlines()
        )
        if finding["level"] != "ok":
            assert f"why: {finding['why']}" in printed
            assert f"fix: {finding['fix']}" in printed
    assert "free space" not in {finding["topic"] for finding in told["findings"]}  # --model is there already


def test_something_bad_exits_with_1(tmp_path: Path) -> None:
    """With 200 descriptors 62 shards cannot be served."""
    command = [sys.executable, "-m", "k2hybrid", "doctor", "--quick", "--model", str(tmp_path)]
    limited = ["/bin/sh", "-c", 'ulimit -n 200 && exec "$@"', "sh", *command]
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "bad   open files           RLIMIT_NOFILE is 200" in done.stdout
    assert "fix: ulimit -n 65536" in done.stdout
    assert done.stdout.rstrip().endswith("1 bad")


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--quick", "--model", str(tmp_path / "missing")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("k2hybrid doctor: ")
    assert error.count("\n") == 1
