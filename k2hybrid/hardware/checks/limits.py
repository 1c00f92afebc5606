"""What the kernel, a container or a control group does not let this process do."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from k2hybrid.hardware.attempts import Attempts
from k2hybrid.hardware.cgroup import Limits
from k2hybrid.hardware.checks.finding import Finding, gib
from k2hybrid.hardware.sysfs import kb_field, read_int, read_text

# 62 shards, each opened for maps and for direct reads, one socket a client, and libraries.
LEAST_FILES, FEW_FILES = 256, 4096
_SECCOMP = (
    "docker run --security-opt seccomp=PROFILE.json, the default profile with {calls} added "
    "(or seccomp=unconfined where you trust the image)"
)


def in_container(root: Path) -> bool:
    """Whether the files that Docker, Podman and Kubernetes leave in containers are there."""
    return any(
        os.path.exists(root / name)
        for name in (".dockerenv", "run/.containerenv", "var/run/secrets/kubernetes.io")
    )


def check_memory_limit(root: Path, limits: Limits) -> list[Finding]:
    """How much of the machine's memory the control group leaves."""
    total = kb_field(read_text(root / "proc/meminfo"), "MemTotal")
    limit = limits.memory_bytes
    if limit is None or (total is not None and limit >= total):
        version = f" (control groups, version {limits.version})" if limits.version else ""
        return [Finding("memory limit", "ok", f"none{version}")]
    share = f" of {gib(total)}" if total else ""
    return [
        Finding(
            "memory limit",
            "warn",
            f"the control group allows {gib(limit)}{share} (version {limits.version})",
            "pages of the checkpoint count as well: beyond the limit they are dropped and read again, and "
            "the "
            "process is ended when its own memory reaches it",
            "raise it (docker run without --memory; systemd: MemoryMax=infinity; Kubernetes: "
            "resources.limits), "
            "or plan for it with --expert-ram",
        )
    ]


def check_calls(root: Path, attempts: Attempts, nodes: int) -> list[Finding]:
    """Memory policies and io_uring, as they were tried.

    Args:
        nodes: NUMA nodes with memory.
    """
    return [*_check_policies(root, attempts, nodes), _check_uring(root, attempts)]


def _check_policies(root: Path, attempts: Attempts, nodes: int) -> list[Finding]:
    policies = (attempts.mbind, attempts.set_mempolicy)
    refused = [call for call in policies if call.refused]
    if not refused:
        told = (
            "could not be tried on this kind of CPU"
            if policies[0].error is None
            else "mbind and set_mempolicy work"
        )
        return [Finding("memory policies", "ok", told)]
    found = ", ".join(f"{call.name} is refused ({call.error_name})" for call in refused)
    if nodes < 2:
        return [Finding("memory policies", "ok", f"{found}; with one NUMA node they are not needed")]
    if all(call.error == errno.ENOSYS for call in refused):
        fix = "a kernel with CONFIG_NUMA; gVisor and other user-space kernels have none"
    elif in_container(root):
        fix = (
            "docker run --cap-add SYS_NICE (its default profile then allows both calls); Kubernetes: "
            "securityContext.capabilities.add [SYS_NICE]"
        )
    else:
        fix = "systemd: remove SystemCallFilter= or add @resources; else " + _SECCOMP.format(
            calls="mbind, set_mempolicy"
        )
    return [
        Finding(
            "memory policies",
            "warn",
            found,
            f"experts cannot be bound to their node: where first touch fails, a read crosses between {nodes} "
            "nodes",
            fix,
        )
    ]


def _check_uring(root: Path, attempts: Attempts) -> Finding:
    call = attempts.io_uring_setup
    if not call.refused:
        return Finding("io_uring", "ok", "works")
    disabled = read_int(root / "proc/sys/kernel/io_uring_disabled") or 0
    if disabled:
        fix = "on the host: sudo sysctl kernel.io_uring_disabled=0"
        if disabled == 1:
            fix += ", or put this user into the group of kernel.io_uring_group"
    elif call.error == errno.ENOSYS:
        fix = "Linux 5.6 or newer with CONFIG_IO_URING; in a container also: " + _seccomp_uring()
    elif call.error == errno.ENOMEM:
        fix = "ulimit -l unlimited (docker run --ulimit memlock=-1), or Linux 5.12 or newer"
    else:
        fix = _seccomp_uring()
    switch = f", kernel.io_uring_disabled={disabled}" if disabled else ""
    return Finding(
        "io_uring",
        "warn",
        f"refused ({call.error_name}{switch})",
        "streamed experts are then read by a pool of threads: the same bytes, more CPU time",
        fix,
    )


def _seccomp_uring() -> str:
    return _SECCOMP.format(calls="io_uring_setup, io_uring_enter and io_uring_register")


def check_process_limits(memlock_bytes: int | None, files: int | None, *, gpu: bool) -> list[Finding]:
    """RLIMIT_MEMLOCK and RLIMIT_NOFILE; None: unlimited.

    Args:
        gpu: whether there is one, for which memory is pinned.
    """
    findings = []
    if memlock_bytes is not None and gpu and memlock_bytes < 1 << 30:
        findings.append(
            Finding(
                "locked memory",
                "warn",
                f"RLIMIT_MEMLOCK is {memlock_bytes >> 10} KiB",
                "buffers between CPU and GPU are pinned; some drivers and kernels count them",
                "ulimit -l unlimited (docker run --ulimit memlock=-1; systemd: LimitMEMLOCK=infinity; else "
                "/etc/security/limits.conf: * - memlock unlimited)",
            )
        )
    else:
        told = "unlimited" if memlock_bytes is None else f"{memlock_bytes >> 10} KiB"
        findings.append(
            Finding(
                "locked memory", "ok", told if memlock_bytes is None or gpu else f"{told}; none is needed"
            )
        )
    if files is not None and files < FEW_FILES:
        findings.append(
            Finding(
                "open files",
                "bad" if files < LEAST_FILES else "warn",
                f"RLIMIT_NOFILE is {files}",
                "62 shards are opened twice, and each client holds a socket",
                "ulimit -n 65536 (docker run --ulimit nofile=65536; systemd: LimitNOFILE=65536)",
            )
        )
    else:
        findings.append(Finding("open files", "ok", "unlimited" if files is None else f"{files}"))
    return findings
