"""What a process and a machine have, from files as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

from k2hybrid.hardware.memory import MachineMemory, MemoryUse


def test_of_a_process(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text(
        "Name:\tpython\nVmRSS:\t  60 kB\nRssAnon:\t  10 kB\nRssFile:\t  20 kB\nRssShmem:\t 30 kB\n"
    )
    assert MemoryUse.now(status) == MemoryUse(10 * 1024, 50 * 1024)


def test_of_a_machine(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       2000 kB\nMemFree:          1 kB\nMemAvailable:    500 kB\n")
    assert MachineMemory.now(meminfo) == MachineMemory(2000 * 1024, 500 * 1024)
    meminfo.write_text("MemTotal:       2000 kB\n")
    assert MachineMemory.now(meminfo) == MachineMemory(2000 * 1024, None)
    assert MachineMemory.now(tmp_path / "absent") == MachineMemory(None, None)


def test_of_this_one() -> None:
    machine, use = MachineMemory.now(), MemoryUse.now()
    assert machine.total_bytes is not None
    assert 0 < use.private_bytes < machine.total_bytes
