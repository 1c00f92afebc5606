"""What doctor says of modules, pages, nodes and swap on machines that are not here."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path

import pytest

from k2hybrid.hardware.checks.finding import Level
from k2hybrid.hardware.checks.memory import (
    check_bandwidth,
    check_huge_pages,
    check_node_bandwidth,
    check_nodes,
    check_paging,
)
from k2hybrid.hardware.dmi import TABLE
from k2hybrid.hardware.topology import read_topology
from tests.unit.hardware.judging import judged, machine, one
from tests.unit.hardware.smbios import Slot, table
from tests.unit.hardware.sysfs import GIB, FakeNode, even_machine, put, write_machine


def put_table(root: Path, slots: list[Slot]) -> None:
    path = root / TABLE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(table(slots))


EIGHT = [Slot("DIMM", f"P0 CHANNEL {letter}") for letter in "ABCDEFGH"]  # 8 × 4800 × 8 = 307.2 GB/s


def test_bandwidth_against_the_promise(tmp_path: Path) -> None:
    put_table(tmp_path, EIGHT)
    judged(one(check_bandwidth(tmp_path, 260.0), "memory bandwidth"), "ok", "85%", "8 channels", "307 GB/s")
    judged(one(check_bandwidth(tmp_path, 150.0), "memory bandwidth"), "warn", "49%", "BIOS")
    judged(one(check_bandwidth(tmp_path, None), "memory bandwidth"), "ok", "307 GB/s", "not measured")
    judged(one(check_bandwidth(tmp_path, None, "busy"), "memory probe"), "warn", "busy")
    assert {finding.topic for finding in check_bandwidth(tmp_path, 1.0)} == {
        "memory modules",
        "memory bandwidth",
    }


def test_empty_channels_and_slow_modules(tmp_path: Path) -> None:
    put_table(tmp_path, [*EIGHT[:5], dataclasses.replace(EIGHT[5], size_mb=0), *EIGHT[6:]])
    judged(
        one(check_bandwidth(tmp_path, 250.0), "memory channels"), "warn", "1 channel is empty: P0 CHANNEL F"
    )
    put_table(tmp_path, [*EIGHT[:7], dataclasses.replace(EIGHT[7], mt_s=4000, rated_mt_s=5600)])
    judged(
        one(check_bandwidth(tmp_path, 250.0), "memory modules"), "warn", "4000 of 5600 MT/s", "XMP or EXPO"
    )


def test_unknown_channels_accuse_nobody(tmp_path: Path) -> None:
    put_table(tmp_path, [Slot("A1"), Slot("A2"), Slot("A3", size_mb=0)])
    findings = check_bandwidth(tmp_path, 20.0)
    judged(one(findings, "memory bandwidth"), "ok", "at most 77 GB/s", "26%")
    judged(one(findings, "memory channels"), "ok", "A3")


def test_bandwidth_without_a_table(tmp_path: Path) -> None:
    judged(check_bandwidth(tmp_path, 42.0)[0], "ok", "42.0 GB/s", "does not tell")
    put_table(tmp_path, [Slot("DIMM_A1", mt_s=0, rated_mt_s=0)])
    judged(one(check_bandwidth(tmp_path, 42.0), "memory bandwidth"), "ok", "no speed")
    (tmp_path / TABLE).write_bytes(b"\x11\xff\xff")
    judged(check_bandwidth(tmp_path, None)[0], "ok", "not measured")


def test_a_slow_node_is_named() -> None:
    judged(check_node_bandwidth({0: 200.0, 1: 190.0})[0], "ok", "node 0: 200.0, node 1: 190.0")
    judged(check_node_bandwidth({0: 200.0, 3: 120.0})[0], "warn", "node 3 slower", "node 3: 120.0")
    assert check_node_bandwidth({0: 200.0}) == check_node_bandwidth({}) == []


def test_a_table_for_root_alone_says_sudo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_table(tmp_path, EIGHT)

    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    judged(check_bandwidth(tmp_path, 42.0)[0], "ok", "42.0 GB/s", "root", "sudo k2hybrid doctor")


POOL = "sys/kernel/mm/hugepages/hugepages-2048kB"
THP = "sys/kernel/mm/transparent_hugepage"


@pytest.mark.parametrize(
    ("free", "reserved", "enabled", "defrag", "expected"),
    [
        (9 << 9, 9 << 9, "never", "madvise", [("huge pages", "ok", "explicit")]),
        ((9 << 9) - 1, 9 << 9, "madvise", "madvise",
         [("reserved huge pages", "warn", "too few"), ("huge pages", "ok", "transparent")]),
        (0, 0, "always", "madvise", [("huge pages", "ok", "vm.nr_hugepages=4608")]),
        (0, 0, "madvise", "never", [("huge pages", "warn", "transparent_hugepage/defrag")]),
        (0, 0, "never", "madvise", [("huge pages", "warn", "echo madvise | sudo tee")]),
        (0, 0, "", "", [("huge pages", "warn", "not offered by this kernel")]),
    ],
)  # fmt: skip
def test_huge_pages(
    tmp_path: Path,
    free: int,
    reserved: int,
    enabled: str,
    defrag: str,
    expected: list[tuple[str, Level, str]],
) -> None:
    choices = {"enabled": "always madvise never", "defrag": "always defer defer+madvise madvise never"}
    put(tmp_path, {"proc/meminfo": f"MemTotal: {10 * GIB >> 10} kB\n"})  # nine tenths: 4608 pages of 2 MB
    put(tmp_path, {f"{POOL}/free_hugepages": f"{free}\n", f"{POOL}/nr_hugepages": f"{reserved}\n"})
    for name, chosen in (("enabled", enabled), ("defrag", defrag)):
        words = (f"[{word}]" if word == chosen else word for word in choices[name].split())
        put(tmp_path, {f"{THP}/{name}": " ".join(words) + "\n"})
    findings = check_huge_pages(tmp_path)
    assert len(findings) == len(expected)
    for topic, level, word in expected:
        judged(one(findings, topic), level, word)


def test_small_models_need_fewer_huge_pages(tmp_path: Path) -> None:
    put(tmp_path, {"proc/meminfo": f"MemTotal: {10 * GIB >> 10} kB\n", f"{POOL}/free_hugepages": "100\n"})
    assert check_huge_pages(tmp_path, expert_bytes=100 << 21)[-1].level == "ok"
    assert check_huge_pages(tmp_path, expert_bytes=(100 << 21) + 1)[-1].level == "warn"
    assert check_huge_pages(tmp_path / "nothing")[-1].level == "warn"


def test_nodes(tmp_path: Path) -> None:
    topology = machine(tmp_path, even_machine(2))
    put(tmp_path, {"proc/sys/kernel/numa_balancing": "1\n", "proc/sys/vm/zone_reclaim_mode": "1\n"})
    findings = check_nodes(tmp_path, topology)
    judged(one(findings, "NUMA nodes"), "ok", "node 0: 4 cores, 64.0 GiB; node 1: 4 cores, 64.0 GiB")
    judged(one(findings, "NUMA balancing"), "warn", "sudo sysctl kernel.numa_balancing=0")
    judged(one(findings, "zone reclaim"), "warn", "sudo sysctl vm.zone_reclaim_mode=0")
    put(tmp_path, {"proc/sys/kernel/numa_balancing": "0\n", "proc/sys/vm/zone_reclaim_mode": "0\n"})
    assert {finding.level for finding in check_nodes(tmp_path, topology)} == {"ok"}


def test_nodes_that_are_equipped_unequally(tmp_path: Path) -> None:
    nodes = [
        FakeNode(0, [[0]]),
        FakeNode(1, [[1]], memory_bytes=32 * GIB),
        FakeNode(2, [[2]], memory_bytes=0),
        FakeNode(3, [], memory_bytes=16 * GIB),
    ]
    findings = check_nodes(tmp_path, machine(tmp_path, nodes))
    judged(
        one(findings, "memory of nodes"),
        "warn",
        "node 1 has 32.0 GiB, the largest 64.0 GiB",
        "node 2 has CPUs and no",
    )
    judged(one(findings, "NUMA nodes"), "ok", "node 3: 16.0 GiB without CPUs")


def test_balancing_does_not_matter_on_one_node(tmp_path: Path) -> None:
    put(tmp_path, {"proc/sys/kernel/numa_balancing": "1\n"})
    assert {finding.level for finding in check_nodes(tmp_path, machine(tmp_path, even_machine(1)))} == {"ok"}


def test_garbled_tables_are_told(tmp_path: Path) -> None:
    write_machine(tmp_path, even_machine(2))
    (tmp_path / "sys/devices/system/node/node1/distance").write_text("far")
    findings = check_nodes(tmp_path, read_topology(tmp_path, range(8)))
    judged(one(findings, "NUMA tables"), "warn", "distances of node 1")


def test_paging(tmp_path: Path) -> None:
    put(tmp_path, {"proc/meminfo": f"SwapTotal: {8 << 20} kB\nSwapFree: {8 << 20} kB\n",
                   "proc/sys/vm/overcommit_memory": "0", "proc/sys/vm/max_map_count": "65530"})  # fmt: skip
    assert [finding.level for finding in check_paging(tmp_path)] == ["ok"]
    put(tmp_path, {"proc/meminfo": f"SwapTotal: {8 << 20} kB\nSwapFree: {6 << 20} kB\n",
                   "proc/sys/vm/overcommit_memory": "2", "proc/sys/vm/max_map_count": "1024"})  # fmt: skip
    findings = check_paging(tmp_path)
    judged(one(findings, "swap"), "warn", "2.0 GiB of 8.0 GiB", "swapoff")
    judged(one(findings, "overcommit"), "warn", "vm.overcommit_memory=0")
    judged(one(findings, "maps"), "warn", "vm.max_map_count=65530")
    assert [finding.level for finding in check_paging(tmp_path / "nothing")] == ["ok"]
