"""What doctor says of kernels, clocks and CPU time on machines that are not here."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from k2hybrid.hardware.cgroup import Limits
from k2hybrid.hardware.checks.cpu import check_cpu_limits, check_governor, check_kernels
from k2hybrid.hardware.checks.finding import Finding, Level
from tests.unit.hardware.judging import judged, machine, one
from tests.unit.hardware.sysfs import even_machine, put

NO_LIMITS = Limits(2, None, None, None, None)


def test_a_complaint_without_a_fix_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="lacks its reason or its fix"):
        Finding("x", "warn", "y", "why")
    with pytest.raises(ValueError, match="lacks its reason or its fix"):
        Finding("x", "bad", "y", fix="fix")


def test_kernels(tmp_path: Path) -> None:
    assert check_kernels(tmp_path, ("avx512_bf16", "avx2"))[0].level == "ok"
    judged(check_kernels(tmp_path, ("avx2", "scalar"))[0], "warn", "avx2 is picked", "BIOS", "-cpu host")
    put(tmp_path, {"proc/cpuinfo": "flags : avx2 avx512f\n"})
    judged(check_kernels(tmp_path, ("avx2",))[0], "warn", "AVX512-BW too")
    judged(check_kernels(tmp_path, ())[0], "warn", "k2hybrid[portable]")
    judged(check_kernels(tmp_path, None, "no such file")[0], "bad", "no such file", "pip install -e .")


@pytest.mark.parametrize(
    ("driver", "governor", "preference", "level"),
    [
        ("acpi-cpufreq", "performance", "", "ok"),
        ("acpi-cpufreq", "schedutil", "", "warn"),
        ("acpi-cpufreq", "powersave", "", "warn"),
        ("intel_pstate", "powersave", "balance_performance", "ok"),
        ("intel_pstate", "powersave", "power", "warn"),
        ("intel_pstate", "performance", "power", "ok"),
        ("amd-pstate-epp", "powersave", "balance_power", "warn"),
        ("amd-pstate-epp", "powersave", "performance", "ok"),
        ("amd-pstate", "ondemand", "", "warn"),
    ],
)
def test_governors(tmp_path: Path, driver: str, governor: str, preference: str, level: Level) -> None:
    for cpu in (0, 1):
        folder = f"sys/devices/system/cpu/cpu{cpu}/cpufreq"
        put(tmp_path, {f"{folder}/scaling_driver": driver, f"{folder}/scaling_governor": governor})
        if preference:
            put(tmp_path, {f"{folder}/energy_performance_preference": preference})
    (found,) = check_governor(tmp_path, (0, 1))
    judged(found, level, governor, driver)
    if level == "warn":
        judged(found, "warn", "cpupower frequency-set -g performance", "2 of 2 CPUs")
        assert ("energy_performance_preference" in found.fix) == bool(preference)


def test_one_slow_core_is_enough_and_none_told_is_fine(tmp_path: Path) -> None:
    assert check_governor(tmp_path, (0, 1))[0].level == "ok"
    for cpu in range(4):
        governor = "ondemand" if cpu == 3 else "performance"
        put(tmp_path, {f"sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor": governor})
    judged(check_governor(tmp_path, range(4))[0], "warn", "1 of 4 CPUs")
    assert check_governor(tmp_path, range(3))[0].level == "ok"


def test_limits_of_cpu_time_and_affinity(tmp_path: Path) -> None:
    topology = machine(tmp_path, even_machine(2, per_node=4))
    assert [finding.level for finding in check_cpu_limits(topology, NO_LIMITS)] == ["ok"]
    limits = Limits(2, None, None, 2.5, tuple(range(12)))
    findings = check_cpu_limits(topology, limits)
    judged(one(findings, "CPU limit"), "warn", "2.5 CPUs", "--cpus=8", "--threads 2", "CPUQuota=800%")
    judged(one(findings, "CPU affinity"), "warn", "0-7 of 0-11", "taskset")
    wide = dataclasses.replace(limits, cpus=8.0, cpuset=tuple(range(8)))
    assert [finding.level for finding in check_cpu_limits(topology, wide)] == ["ok"]
