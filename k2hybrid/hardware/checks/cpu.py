"""CPU: which kernels run, clock governors, and time limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from k2hybrid.hardware.cgroup import Limits
from k2hybrid.hardware.checks.finding import Finding
from k2hybrid.hardware.sysfs import field, format_ids, read_text
from k2hybrid.hardware.topology import Topology

_GOVERNOR_FIX = "sudo cpupower frequency-set -g performance (again after every start of the machine)"
# Drivers whose "powersave" still clocks up by itself; how eagerly is a preference of its own.
_DRIVERS_WITH_PREFERENCE = ("intel_pstate", "amd-pstate-epp")
_EAGER = ("performance", "balance_performance", "default", "")


def check_kernels(root: Path, kernels: Sequence[str] | None, problem: str = "") -> list[Finding]:
    """Which instruction set would be picked.

    Args:
        kernels: what the extension offers here, best first; None if it cannot be imported.
        problem: why not.
    """
    if kernels is None:
        return [
            Finding(
                "kernels",
                "bad",
                f"the extension cannot be used: {problem}",
                "without it no model is loaded",
                "make build, or pip install -e . in the source tree (needs a C++20 compiler)",
            )
        ]
    if not kernels:
        return [
            Finding(
                "kernels",
                "warn",
                "the extension has no kernels for this CPU",
                "experts run through numba, several times slower than the kernels",
                "pip install 'k2hybrid[portable]', or use an x86-64 CPU with AVX2",
            )
        ]
    best = kernels[0]
    if best.startswith("avx512"):
        return [Finding("kernels", "ok", f"{best} is picked")]
    flags = field(read_text(root / "proc/cpuinfo"), "flags").split()
    if "avx512f" in flags:
        fix = "let the virtual machine have all of the host's features, AVX512-BW too (QEMU: -cpu host)"
    else:
        fix = (
            "a CPU with AVX-512 (Zen 4, Ice Lake-SP or newer); if this one has it, enable it in the BIOS, "
            "and "
            "in a virtual machine pass the host's CPU through (QEMU: -cpu host)"
        )
    return [
        Finding(
            "kernels",
            "warn",
            f"{best} is picked; AVX-512 is missing",
            "prefill is limited by arithmetic, of which AVX-512 does at least twice as much a clock",
            fix,
        )
    ]


def check_governor(root: Path, cpus: Sequence[int]) -> list[Finding]:
    """Clock governors of the CPUs that are used."""
    found: Counter[tuple[str, str, str]] = Counter()
    for cpu in cpus:
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/cpufreq"
        governor = read_text(folder / "scaling_governor")
        if governor:
            driver = read_text(folder / "scaling_driver")
            found[governor, driver, read_text(folder / "energy_performance_preference")] += 1
    if not found:
        return [Finding("CPU clock", "ok", "left to the firmware, or to the host of this virtual machine")]
    slow = [key for key in found if _is_slow(*key)]
    if not slow:
        governor, driver, preference = found.most_common(1)[0][0]
        preferring = f", preference {preference}" if preference else ""
        return [Finding("CPU clock", "ok", f"governor {governor} of {driver or 'unknown'}{preferring}")]
    governor, driver, preference = slow[0]
    count = sum(found[key] for key in slow)
    fix = _GOVERNOR_FIX
    if driver in _DRIVERS_WITH_PREFERENCE and preference not in _EAGER:
        fix += (
            "; or: echo balance_performance | sudo tee "
            "/sys/devices/system/cpu/cpu*/cpufreq/energy_performance_preference"
        )
    preferring = f" with preference {preference}" if preference else ""
    return [
        Finding(
            "CPU clock",
            "warn",
            f"governor {governor} of {driver or 'an unknown driver'}{preferring} on {count} of "
            f"{found.total()} CPUs",
            "cores that wait for memory, or for the GPU, look idle and are clocked down between two layers",
            fix,
        )
    ]


def _is_slow(governor: str, driver: str, preference: str) -> bool:
    if governor == "performance":
        return False
    if driver in _DRIVERS_WITH_PREFERENCE:
        return preference not in _EAGER
    return True


def check_cpu_limits(topology: Topology, limits: Limits) -> list[Finding]:
    """CPU time and CPUs that a control group leaves."""
    findings = []
    cores, threads = len(topology.cpus), tuple(cpu for node in topology.nodes for cpu in node.threads)
    if limits.cpus is not None and limits.cpus < cores:
        findings.append(
            Finding(
                "CPU limit",
                "warn",
                f"the control group allows {limits.cpus:g} CPUs' time on {cores} cores (version "
                f"{limits.version})",
                "all threads are stopped together when the share of a period is used up: tokens come in "
                "jerks",
                f"raise it (docker run --cpus={cores}; systemd: CPUQuota={cores * 100}%), or start with "
                f"--threads {max(1, int(limits.cpus))}",
            )
        )
    else:
        findings.append(Finding("CPU limit", "ok", f"none on the {cores} cores that may be used"))
    if limits.cpuset is not None and not set(threads) >= set(limits.cpuset):
        findings.append(
            Finding(
                "CPU affinity",
                "warn",
                f"this process may run on CPUs {format_ids(tuple(sorted(threads)))} of "
                f"{format_ids(limits.cpuset)}",
                "cores that are left out read no memory, and the bandwidth of their node with them",
                "start without taskset or numactl; systemd: remove CPUAffinity=",
            )
        )
    return findings
