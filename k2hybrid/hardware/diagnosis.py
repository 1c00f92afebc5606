"""Runs all checks of `k2hybrid doctor`: asks, tries and measures what they judge, then lets them judge."""

from __future__ import annotations

import resource
from dataclasses import dataclass, field
from pathlib import Path

from k2hybrid.errors import K2Error, NativeError
from k2hybrid.hardware.attempts import attempt_all
from k2hybrid.hardware.cgroup import read_limits
from k2hybrid.hardware.checks.cpu import check_cpu_limits, check_governor, check_kernels
from k2hybrid.hardware.checks.disk import check_disk, check_free_space
from k2hybrid.hardware.checks.finding import Finding
from k2hybrid.hardware.checks.gpu import check_driver, check_link, nvidia_cards
from k2hybrid.hardware.checks.limits import check_calls, check_memory_limit, check_process_limits
from k2hybrid.hardware.checks.memory import (
    check_bandwidth,
    check_huge_pages,
    check_node_bandwidth,
    check_nodes,
    check_paging,
)
from k2hybrid.hardware.cuda_driver import CudaDriver
from k2hybrid.hardware.disk import ReadRate, direct_read_gb_s
from k2hybrid.hardware.storage import storage_of
from k2hybrid.hardware.sysfs import parse_size, read_text
from k2hybrid.hardware.topology import Topology, read_topology

ROUNDS = 3
LEAST_PROBE_BYTES = 256 << 20
CACHES = 4  # the probe is this many times the last-level caches


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured, for reports; None where it was not."""

    memory_gb_s: float | None = None  # of all nodes together
    node_gb_s: dict[int, float] = field(default_factory=dict)  # by node id, where there are several
    disk: ReadRate | None = None


def diagnose(
    folder: Path, *, downloaded_bytes: int | None, quick: bool = False, root: Path = Path("/")
) -> tuple[list[Finding], Measured]:
    """All findings, by subject.

    Args:
        folder: where the checkpoint lies, or would be downloaded to.
        downloaded_bytes: of the published checkpoint, that are there already; None if none is to be fetched.
        quick: measure nothing.
        root: the folder that holds proc/ and sys/. Kernels, system calls and speeds are this system's.
    """
    topology = read_topology(root)
    limits = read_limits(root)
    kernels, problem = _kernels()
    by_node, failure = ({}, "") if quick or not kernels else _memory_gb_s(root, topology)
    memory_gb_s = sum(by_node.values()) or None
    memory_nodes = [node.id for node in topology.nodes if node.memory_bytes]
    findings = [
        *check_kernels(root, kernels, problem),
        *check_governor(root, topology.cpus),
        *check_cpu_limits(topology, limits),
        *check_bandwidth(root, memory_gb_s, failure),
        *check_node_bandwidth(by_node),
        *check_nodes(root, topology),
        *check_huge_pages(root),
        *check_paging(root),
        *check_memory_limit(root, limits),
        *check_calls(root, attempt_all(memory_nodes[0]), len(memory_nodes)),
        *check_process_limits(
            _soft_limit(resource.RLIMIT_MEMLOCK),
            _soft_limit(resource.RLIMIT_NOFILE),
            gpu=bool(nvidia_cards(root)),
        ),
    ]
    found, rate = _disk(folder, downloaded_bytes, quick, root)
    return [*findings, *found, *_gpu(root)], Measured(memory_gb_s, by_node if len(by_node) > 1 else {}, rate)


def _kernels() -> tuple[tuple[str, ...] | None, str]:
    try:
        from k2hybrid.native.extension import INSTRUCTION_SETS
    except NativeError as error:
        return None, str(error)
    return INSTRUCTION_SETS, ""


def _memory_gb_s(root: Path, topology: Topology) -> tuple[dict[int, float], str]:
    """Of each node, read by its own cores; or nothing and what failed."""
    from k2hybrid.hardware.bandwidth import measure
    from k2hybrid.hardware.node_bandwidth import node_gb_s
    from k2hybrid.native.machine import Machine

    probe_bytes = max(LEAST_PROBE_BYTES, CACHES * last_level_cache_bytes(root, topology.cpus))
    try:
        if len(topology.compute_nodes) > 1:
            return node_gb_s(topology.compute_nodes, probe_bytes), ""
        return {topology.compute_nodes[0].id: measure(Machine(), probe_bytes, ROUNDS).gb_s}, ""
    except (NativeError, OSError) as error:
        return {}, str(error)


def last_level_cache_bytes(root: Path, cpus: tuple[int, ...]) -> int:
    """Bytes of all last-level caches that `cpus` have, shared ones counted once; 0 if not told."""
    found: dict[str, int] = {}
    for cpu in cpus:
        levels = sorted((root / f"sys/devices/system/cpu/cpu{cpu}/cache").glob("index[0-9]*"))
        if levels:
            shared = read_text(levels[-1] / "shared_cpu_list") or str(cpu)
            found[shared] = parse_size(read_text(levels[-1] / "size")) or 0
    return sum(found.values())


def _disk(
    folder: Path, downloaded_bytes: int | None, quick: bool, root: Path
) -> tuple[list[Finding], ReadRate | None]:
    storage = storage_of(folder, root)
    rate, problem = None, ""
    if not quick:
        try:
            rate = direct_read_gb_s(storage.folder)
        except (K2Error, OSError) as error:
            problem = str(error)
    findings = check_disk(storage, rate, problem)
    if downloaded_bytes is not None:
        findings += check_free_space(storage, downloaded_bytes)
    return findings, rate


def _gpu(root: Path) -> list[Finding]:
    driver_cuda, problem = None, ""
    try:
        driver_cuda = CudaDriver().version()
    except NativeError as error:
        problem = str(error)
    import torch.version

    return [*check_driver(root, torch.version.cuda, driver_cuda, problem), *check_link(root)]


def _soft_limit(which: int) -> int | None:
    soft = resource.getrlimit(which)[0]
    return None if soft == resource.RLIM_INFINITY else soft
