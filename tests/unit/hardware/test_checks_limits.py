"""What doctor says of control groups, refused system calls and limits of a process."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path

import pytest

from k2hybrid.hardware.attempts import Attempt, Attempts
from k2hybrid.hardware.cgroup import Limits
from k2hybrid.hardware.checks.limits import check_calls, check_memory_limit, check_process_limits
from tests.unit.hardware.judging import judged, one
from tests.unit.hardware.sysfs import GIB, put

NO_LIMITS = Limits(2, None, None, None, None)
ALLOWED = Attempts(Attempt("mbind", 0), Attempt("set_mempolicy", 0), Attempt("io_uring_setup", 0))


def test_memory_limit(tmp_path: Path) -> None:
    put(tmp_path, {"proc/meminfo": f"MemTotal: {64 * GIB >> 10} kB\n"})
    assert check_memory_limit(tmp_path, NO_LIMITS)[0].level == "ok"
    limited = dataclasses.replace(NO_LIMITS, memory_bytes=8 * GIB)
    judged(
        check_memory_limit(tmp_path, limited)[0], "warn", "8.0 GiB of 64.0 GiB", "--expert-ram", "MemoryMax"
    )
    wide = dataclasses.replace(NO_LIMITS, memory_bytes=65 * GIB)
    assert check_memory_limit(tmp_path, wide)[0].level == "ok"


def refused(code: int, *names: str) -> Attempts:
    calls = (ALLOWED.mbind, ALLOWED.set_mempolicy, ALLOWED.io_uring_setup)
    return Attempts(*(dataclasses.replace(call, error=code if call.name in names else 0) for call in calls))


def test_calls(tmp_path: Path) -> None:
    assert {finding.level for finding in check_calls(tmp_path, ALLOWED, 2)} == {"ok"}
    both = refused(errno.EPERM, "mbind", "set_mempolicy")
    judged(one(check_calls(tmp_path, both, 1), "memory policies"), "ok", "mbind is refused (EPERM)")
    judged(
        one(check_calls(tmp_path, both, 2), "memory policies"),
        "warn",
        "seccomp=PROFILE",
        "mbind, set_mempolicy",
    )
    put(tmp_path, {".dockerenv": ""})
    judged(one(check_calls(tmp_path, both, 2), "memory policies"), "warn", "--cap-add SYS_NICE")
    gone = refused(errno.ENOSYS, "mbind")
    judged(one(check_calls(tmp_path, gone, 4), "memory policies"), "warn", "CONFIG_NUMA", "4 nodes")
    untried = Attempts(Attempt("mbind", None), Attempt("set_mempolicy", None), ALLOWED.io_uring_setup)
    judged(one(check_calls(tmp_path, untried, 2), "memory policies"), "ok", "could not be tried")


@pytest.mark.parametrize(
    ("code", "disabled", "words"),
    [
        (errno.EPERM, None, ("EPERM", "--security-opt seccomp=", "io_uring_setup, io_uring_enter")),
        (errno.EPERM, "2", ("kernel.io_uring_disabled=2", "sudo sysctl kernel.io_uring_disabled=0")),
        (errno.EPERM, "1", ("kernel.io_uring_group",)),
        (errno.ENOSYS, "0", ("ENOSYS", "CONFIG_IO_URING")),
        (errno.ENOMEM, None, ("memlock=-1",)),
    ],
)
def test_io_uring(tmp_path: Path, code: int, disabled: str | None, words: tuple[str, ...]) -> None:
    if disabled is not None:
        put(tmp_path, {"proc/sys/kernel/io_uring_disabled": disabled})
    judged(one(check_calls(tmp_path, refused(code, "io_uring_setup"), 1), "io_uring"), "warn", *words)


def test_process_limits() -> None:
    assert {finding.level for finding in check_process_limits(None, None, gpu=True)} == {"ok"}
    few = check_process_limits(8 << 20, 1024, gpu=True)
    judged(one(few, "locked memory"), "warn", "8192 KiB", "ulimit -l unlimited", "LimitMEMLOCK=infinity")
    judged(one(few, "open files"), "warn", "1024", "ulimit -n 65536")
    judged(one(check_process_limits(0, 255, gpu=False), "open files"), "bad", "255")
    assert one(check_process_limits(0, 255, gpu=False), "locked memory").level == "ok"
