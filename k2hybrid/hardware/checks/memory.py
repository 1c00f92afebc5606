"""Memory: what the modules promise and what is measured, pages, NUMA nodes, swap."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from k2hybrid.hardware.checks.finding import Finding, gib
from k2hybrid.hardware.dmi import Module, promised, read_modules
from k2hybrid.hardware.sysfs import chosen_word, kb_field, read_int, read_text
from k2hybrid.hardware.topology import Topology

# Reads reach 75 to 92 % of what the modules promise on healthy machines; less has a cause.
LEAST_SHARE = 0.65
EXPERT_BYTES = 60 * 384 * 24_772_608  # all routed experts of Kimi-K2-Thinking
HUGE = 2 << 20
LEAST_MAPS = 16384
SWAP_IN_USE = 256 << 20
UNEQUAL = 0.8  # a node with less than this share of what the best one has


def check_bandwidth(root: Path, measured_gb_s: float | None, failure: str = "") -> list[Finding]:
    """The modules, and the measured read bandwidth (10⁹ bytes/s, of all nodes) against their promise.

    Args:
        failure: why the measurement failed; empty if it did not, or was not tried.
    """
    findings = _check_promise(root, measured_gb_s)
    if failure:
        findings.append(
            Finding(
                "memory probe",
                "warn",
                f"failed: {failure}",
                "what the memory delivers stays unknown",
                "free some memory and stop what else runs here, then try again",
            )
        )
    return findings


def _check_promise(root: Path, measured_gb_s: float | None) -> list[Finding]:
    try:
        modules = read_modules(root)
    except PermissionError:
        return [
            _measured_alone(
                measured_gb_s, "which modules there are only root may read", "sudo k2hybrid doctor"
            )
        ]
    present = [module for module in modules or () if module.size_bytes]
    if not modules or not present:
        return [_measured_alone(measured_gb_s, "the firmware does not tell of memory modules", "")]
    findings = _check_modules(modules, present)
    promise = promised(modules)
    if promise is None:
        findings.append(_measured_alone(measured_gb_s, "the firmware tells no speed of the modules", ""))
        return findings
    if promise.empty:
        what = "channel" if promise.certain else "slot"
        what += " is" if len(promise.empty) == 1 else "s are"
        findings.append(
            Finding(
                "memory channels",
                "warn" if promise.certain else "ok",
                f"{len(promise.empty)} {what} empty: {', '.join(promise.empty)}",
                "decode is limited by memory bandwidth, and an empty channel adds none",
                "one module in every channel, all alike; the board's manual shows which slot is which",
            )
        )
    most = "" if promise.certain else "at most "
    text = f"{promise.channels} channels promise {most}{promise.gb_s:.0f} GB/s"
    if measured_gb_s is None:
        findings.append(Finding("memory bandwidth", "ok", f"{text}; not measured"))
        return findings
    share = measured_gb_s / promise.gb_s
    found = f"{measured_gb_s:.1f} GB/s read, {share:.0%} of what is promised ({text})"
    if share >= LEAST_SHARE or not promise.certain:
        findings.append(Finding("memory bandwidth", "ok", found))
    else:
        findings.append(
            Finding(
                "memory bandwidth",
                "warn",
                found,
                "decode runs at the speed at which memory is read",
                "stop what else runs here; check that all cores may be used; in the BIOS: memory "
                "interleaving "
                "on, NUMA nodes per socket as the CPU's vendor advises for bandwidth, no power saving of "
                "memory",
            )
        )
    return findings


def check_node_bandwidth(gb_s: Mapping[int, float]) -> list[Finding]:
    """GB/s of each node by its id, each read by its own cores: the slowest holds up the others."""
    told = ", ".join(f"node {node}: {speed:.1f}" for node, speed in gb_s.items())
    slow = [f"node {node}" for node, speed in gb_s.items() if speed < UNEQUAL * max(gb_s.values())]
    if not slow:
        return [Finding("bandwidth of nodes", "ok", f"GB/s of {told}")] if len(gb_s) > 1 else []
    return [
        Finding(
            "bandwidth of nodes",
            "warn",
            f"{', '.join(slow)} slower than the fastest; GB/s of {told}",
            "every node reads an equal share of each expert: all wait for the slowest",
            "equip all sockets alike, with a module in every channel; stop what else runs on that node",
        )
    ]


def _measured_alone(measured_gb_s: float | None, reason: str, fix: str) -> Finding:
    found = "not measured" if measured_gb_s is None else f"{measured_gb_s:.1f} GB/s read"
    return Finding("memory bandwidth", "ok", f"{found}; {reason}", fix=fix)


def _check_modules(modules: tuple[Module, ...], present: list[Module]) -> list[Finding]:
    kinds = sorted({f"{gib(module.size_bytes)} {module.kind}".strip() for module in present})
    size = sum(module.size_bytes for module in present)
    found = f"{len(present)} of {len(modules)} slots filled: {gib(size)} ({', '.join(kinds)})"
    slow = [module for module in present if 0 < module.mt_s < module.rated_mt_s]
    if not slow:
        return [Finding("memory modules", "ok", found)]
    worst = min(slow, key=lambda module: module.mt_s / module.rated_mt_s)
    return [
        Finding(
            "memory modules",
            "warn",
            f"{found}; {len(slow)} run below their rating, {worst.slot} at {worst.mt_s} of "
            f"{worst.rated_mt_s} MT/s",
            "bandwidth, and so decode, goes with the transfer rate",
            "BIOS: enable the XMP or EXPO profile, or set the memory clock; with two modules a channel the "
            "CPU "
            "may allow no more: then one larger module a channel",
        )
    ]


def check_huge_pages(root: Path, expert_bytes: int = EXPERT_BYTES) -> list[Finding]:
    """Which pages memory for experts would get: reserved huge ones, transparent ones, or 4 KB.

    Args:
        expert_bytes: of all routed experts; as much of it as fits nine tenths of the memory is asked for.
    """
    total = kb_field(read_text(root / "proc/meminfo"), "MemTotal") or 0
    wanted = min(expert_bytes, total * 9 // 10)
    pool = root / "sys/kernel/mm/hugepages/hugepages-2048kB"
    free, reserved = (
        max(0, read_int(pool / name) or 0) * HUGE for name in ("free_hugepages", "nr_hugepages")
    )
    reserve = (
        f"sudo sysctl vm.nr_hugepages={-(-wanted // HUGE)}  # {gib(wanted)}, for nothing else from then on"
    )
    why = "with 4 KB pages the core looks up an address for every row of an expert, and waits for it"
    transparent = root / "sys/kernel/mm/transparent_hugepage"
    mode, defrag = (chosen_word(read_text(transparent / name)) for name in ("enabled", "defrag"))
    if wanted and free >= wanted:
        return [Finding("huge pages", "ok", f"explicit: {gib(free)} of 2 MB pages are reserved and free")]
    findings = []
    if reserved >= HUGE * 512:
        findings.append(
            Finding(
                "reserved huge pages",
                "warn",
                f"{gib(free)} of {gib(reserved)} free, {gib(wanted)} wanted",
                "too few for the experts: they are not used, and other programs cannot have that memory",
                f"{reserve}; or none at all: sudo sysctl vm.nr_hugepages=0",
            )
        )
    if mode not in ("always", "madvise"):
        never = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
        told = f"off ({mode})" if mode else "not offered by this kernel"
        findings.append(
            Finding(
                "huge pages",
                "warn",
                f"none: 4 KB pages; transparent ones are {told}",
                why,
                f"{never}; or {reserve}" if mode else reserve,
            )
        )
    elif defrag == "never":
        findings.append(
            Finding(
                "huge pages",
                "warn",
                f"transparent ({mode}), but none are made where memory is fragmented",
                why,
                "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/defrag",
            )
        )
    else:
        findings.append(Finding("huge pages", "ok", f"transparent ({mode})", fix=f"explicit ones: {reserve}"))
    return findings


def check_nodes(root: Path, topology: Topology) -> list[Finding]:
    """NUMA nodes, and what the kernel does between them."""
    compute = topology.compute_nodes
    parts = [f"node {node.id}: {len(node.cpus)} cores, {gib(node.memory_bytes)}" for node in compute]
    parts += [f"node {node.id}: {gib(node.memory_bytes)} without CPUs" for node in topology.memory_only]
    findings = [Finding("NUMA nodes", "ok", "; ".join(parts))]
    if topology.notes:
        findings.append(
            Finding(
                "NUMA tables",
                "warn",
                "; ".join(topology.notes),
                "experts are dealt to nodes by these tables",
                "in a container, mount /sys read-only as it is on the host; else update the BIOS",
            )
        )
    computing = {node.id for node in compute}
    lonely = [node for node in topology.nodes if node.threads and node.id not in computing]
    most = max((node.memory_bytes for node in compute), default=0)
    parts = [f"node {node.id} has CPUs and no memory" for node in lonely]
    parts += [
        f"node {node.id} has {gib(node.memory_bytes)}, the largest {gib(most)}"
        for node in compute
        if node.memory_bytes < most * UNEQUAL
    ]
    if parts:
        findings.append(
            Finding(
                "memory of nodes",
                "warn",
                "; ".join(parts),
                "every node holds an equal share of each expert: the smallest one limits all",
                "equip all sockets alike; in a container or cpuset, allow all memory nodes (cpuset.mems)",
            )
        )
    if len(topology.nodes) > 1:
        balancing = read_int(root / "proc/sys/kernel/numa_balancing")
        if balancing:
            findings.append(
                Finding(
                    "NUMA balancing",
                    "warn",
                    f"kernel.numa_balancing={balancing}",
                    "the kernel keeps unmapping pages to see who reads them; experts already lie where they "
                    "are read",
                    "sudo sysctl kernel.numa_balancing=0",
                )
            )
        elif balancing == 0:
            findings.append(Finding("NUMA balancing", "ok", "off"))
    reclaim = read_int(root / "proc/sys/vm/zone_reclaim_mode")
    if reclaim:
        findings.append(
            Finding(
                "zone reclaim",
                "warn",
                f"vm.zone_reclaim_mode={reclaim}",
                "a full node drops cached pages of the checkpoint while others have room",
                "sudo sysctl vm.zone_reclaim_mode=0",
            )
        )
    return findings


def check_paging(root: Path) -> list[Finding]:
    """Swap in use, overcommit, and how many maps a process may have."""
    findings = []
    meminfo = read_text(root / "proc/meminfo")
    swap, free = kb_field(meminfo, "SwapTotal") or 0, kb_field(meminfo, "SwapFree") or 0
    if swap - free >= SWAP_IN_USE:
        findings.append(
            Finding(
                "swap",
                "warn",
                f"{gib(swap - free)} of {gib(swap)} in use",
                "an expert that was swapped out is read back in 4 KB pieces, a hundred times slower",
                "free memory, then: sudo swapoff -a && sudo swapon -a; and sudo sysctl vm.swappiness=1",
            )
        )
    else:
        findings.append(Finding("swap", "ok", f"{gib(swap)}, not in use" if swap else "none"))
    if read_int(root / "proc/sys/vm/overcommit_memory") == 2:
        findings.append(
            Finding(
                "overcommit",
                "warn",
                "vm.overcommit_memory=2",
                "memory that is only reserved counts as used: room for experts may be refused",
                "sudo sysctl vm.overcommit_memory=0",
            )
        )
    maps = read_int(root / "proc/sys/vm/max_map_count")
    if maps is not None and maps < LEAST_MAPS:
        findings.append(
            Finding(
                "maps",
                "warn",
                f"vm.max_map_count={maps}",
                "shards, arenas and threads' stacks are maps; a process that has none left is ended",
                "sudo sysctl vm.max_map_count=65530",
            )
        )
    return findings
