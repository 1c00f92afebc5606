"""System calls tried for real, also under a filter that refuses them as a container's does."""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
import sys

import pytest

from k2hybrid.hardware.attempts import Attempt, attempt_all, bind_memory

# mbind, set_mempolicy, io_uring_setup: asm/unistd.h of x86-64
FILTERED = (237, 238, 425)

# Installs a seccomp filter (linux/filter.h: load the number, compare, return) in a process of its own.
UNDER_A_FILTER = """
import ctypes, json, struct, sys
from k2hybrid.hardware.attempts import attempt_all
number, code = map(int, sys.argv[1:])
program = b"".join(
    struct.pack("<HBBI", *step)
    for step in (
        (0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50000 | code), (0x06, 0, 0, 0x7FFF0000)
    )
)
steps = ctypes.create_string_buffer(program, len(program))
filter_program = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", 4, ctypes.addressof(steps)), 16)
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0, "no_new_privs"
if libc.prctl(22, 2, filter_program, 0, 0) != 0:
    print("null")
else:
    tried = attempt_all(0)
    print(json.dumps([tried.mbind.error, tried.set_mempolicy.error, tried.io_uring_setup.error]))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the filter names system calls of x86-64")
@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS])
@pytest.mark.parametrize("which", range(3))
def test_a_refusal_is_seen(which: int, code: int) -> None:
    command = [sys.executable, "-c", UNDER_A_FILTER, str(FILTERED[which]), str(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    if found is None:
        pytest.skip("this system does not let a process filter itself")
    usual = attempt_all(0)
    expected = [usual.mbind.error, usual.set_mempolicy.error, usual.io_uring_setup.error]
    expected[which] = code
    assert found == expected


def test_nothing_is_left_behind() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        attempt_all(0)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_node_that_is_not_there_is_refused_by_the_kernel() -> None:
    if bind_memory(1023) is None:
        pytest.skip("memory policies are not known for this kind of CPU")
    assert attempt_all(1023).mbind.error in (errno.EINVAL, errno.EPERM, errno.ENOSYS)


def test_words() -> None:
    assert not Attempt("mbind", 0).refused
    assert not Attempt("mbind", None).refused
    assert Attempt("mbind", errno.EPERM).refused
    assert Attempt("mbind", errno.EPERM).error_name == "EPERM"
    assert Attempt("mbind", 4711).error_name == "4711"
