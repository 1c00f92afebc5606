"""CPUs, memory and distances of the NUMA nodes, from sysfs, and over which of them experts are dealt.

Pure reading: the root of /proc and /sys is an argument, so that trees of other machines can be read as well.
What is missing or garbled falls back to something that works, and `Topology.notes` says what was assumed.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from k2hybrid.hardware.sysfs import kb_field, numbered, parse_ids, read_ids, read_int, read_text

NODES = "sys/devices/system/node"
CPUS = "sys/devices/system/cpu"
# ACPI's numbers for "here" and, where a table is silent, "elsewhere".
HERE, ELSEWHERE = 10, 20


@dataclass(frozen=True, slots=True)
class Node:
    """One NUMA node, as far as this process may use it.

    Attributes:
        cpus: one CPU per physical core, the lowest allowed one, ascending.
        threads: all allowed CPUs, ascending.
        memory_bytes: of the node in all; 0 if it has none or this process may not use it.
        free_bytes: of them free, or page cache of files that the kernel drops when memory is asked for.
        distances: to every node of the topology, in its order; 10 is the node itself.
        huge_bytes: reserved huge pages of 2 MB that are free; they are not in `free_bytes`.
    """

    id: int
    cpus: tuple[int, ...]
    threads: tuple[int, ...]
    memory_bytes: int
    free_bytes: int
    distances: tuple[int, ...]
    huge_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Topology:
    """All nodes, ascending by id; `notes` says what could not be read and was assumed instead."""

    nodes: tuple[Node, ...]
    notes: tuple[str, ...] = ()

    @property
    def compute_nodes(self) -> tuple[Node, ...]:
        """The nodes over which experts are dealt: with memory, and with the CPUs that work for it.

        CPUs of a node without memory join the nearest node that has CPUs and memory, or, where no node has
        both, the nearest that has memory; of equally near ones the lowest id.
        """
        homes = [node for node in self.nodes if node.memory_bytes and node.threads]
        homes = homes or [node for node in self.nodes if node.memory_bytes]
        joined = {node.id: [node] for node in homes}
        for node in self.nodes:
            if node.threads and node.id not in joined:
                joined[self._nearest(node, homes)].append(node)
        return tuple(_joined(group) for group in joined.values() if any(node.threads for node in group))

    @property
    def memory_only(self) -> tuple[Node, ...]:
        """Nodes with memory that no CPU works for, such as CXL cards: capacity, but no share of experts."""
        computing = {node.id for node in self.compute_nodes}
        return tuple(node for node in self.nodes if node.memory_bytes and node.id not in computing)

    @property
    def capacity_bytes(self) -> int:
        """Memory of all nodes together."""
        return sum(node.memory_bytes for node in self.nodes)

    @property
    def cpus(self) -> tuple[int, ...]:
        """One allowed CPU per physical core of the whole machine, ascending."""
        return tuple(sorted(cpu for node in self.nodes for cpu in node.cpus))

    def _nearest(self, node: Node, homes: Sequence[Node]) -> int:
        place = {other.id: at for at, other in enumerate(self.nodes)}
        return min(homes, key=lambda home: (node.distances[place[home.id]], home.id)).id


def read_topology(
    root: Path = Path("/"),
    allowed_cpus: Collection[int] | None = None,
    allowed_mems: Collection[int] | None = None,
) -> Topology:
    """The machine below `root`, as far as this process may use it.

    Args:
        root: the folder that holds proc/ and sys/.
        allowed_cpus: default those of the calling thread's affinity: ask before threads are pinned.
        allowed_mems: ids of nodes whose memory may be used; default what the process's cpuset allows.
    """
    notes: list[str] = []
    threads = _usable(root, os.sched_getaffinity(0) if allowed_cpus is None else allowed_cpus)
    cores = _first_siblings(root, threads)
    folders = numbered(root / NODES, "node")
    if not folders:
        return _one_node(root, threads, cores, ())
    mems = _allowed_mems(root) if allowed_mems is None else frozenset(allowed_mems)
    owner = _owners(folders, threads, notes)
    nodes = [
        Node(
            id=number,
            cpus=tuple(cpu for cpu in cores if owner[cpu] == number),
            threads=tuple(cpu for cpu in threads if owner[cpu] == number),
            memory_bytes=0,
            free_bytes=0,
            distances=_distances(folder, number, tuple(folders), notes),
        )
        for number, folder in folders.items()
    ]
    nodes = [
        _with_memory(node, folders[node.id], notes) if mems is None or node.id in mems else node
        for node in nodes
    ]
    if not any(node.memory_bytes for node in nodes):
        notes.append("no node tells of memory that may be used; taken as one node")
        return _one_node(root, threads, cores, notes)
    return Topology(tuple(nodes), tuple(notes))


def _usable(root: Path, allowed: Collection[int]) -> tuple[int, ...]:
    """Allowed CPUs that are online; all allowed ones where that is not told, or would leave none."""
    online = read_ids(root / CPUS / "online")
    both = sorted(set(allowed).intersection(online or ()))
    return tuple(both or sorted(set(allowed)))


def _first_siblings(root: Path, threads: Sequence[int]) -> tuple[int, ...]:
    seen: set[int] = set()
    first = []
    for cpu in threads:
        if cpu in seen:
            continue
        first.append(cpu)
        siblings = read_ids(root / CPUS / f"cpu{cpu}" / "topology/thread_siblings_list") or ()
        # A list that lacks the CPU itself is garbled: then it is a core of its own.
        seen.update(siblings if cpu in siblings else ())
    return tuple(first)


def _allowed_mems(root: Path) -> frozenset[int] | None:
    for line in read_text(root / "proc/self/status").splitlines():
        if line.startswith("Mems_allowed_list:"):
            mems = parse_ids(line.partition(":")[2])
            return frozenset(mems) if mems else None
    return None


def _owners(folders: Mapping[int, Path], threads: Sequence[int], notes: list[str]) -> dict[int, int]:
    """The node of every CPU; one that no node claims goes to the first."""
    owner: dict[int, int] = {}
    for number, folder in folders.items():
        claimed = read_ids(folder / "cpulist")
        if claimed is None:
            notes.append(f"the CPUs of node {number} cannot be read")
            claimed = tuple(numbered(folder, "cpu"))
        for cpu in claimed:
            owner.setdefault(cpu, number)
    first = next(iter(folders))
    lost = [cpu for cpu in threads if cpu not in owner]
    if lost:
        notes.append(f"no node has CPU {', '.join(map(str, lost))}; counted with node {first}")
    return {**dict.fromkeys(lost, first), **owner}


def _distances(folder: Path, number: int, ids: Sequence[int], notes: list[str]) -> tuple[int, ...]:
    words = read_text(folder / "distance").split()
    if len(words) == len(ids) and all(word.isascii() and word.isdigit() and len(word) < 6 for word in words):
        return tuple(map(int, words))
    if len(ids) > 1:
        notes.append(f"the distances of node {number} cannot be read; all others count as equally far")
    return tuple(HERE if other == number else ELSEWHERE for other in ids)


def _with_memory(node: Node, folder: Path, notes: list[str]) -> Node:
    meminfo = read_text(folder / "meminfo")
    total = kb_field(meminfo, "MemTotal")
    if total is None:
        notes.append(f"the memory of node {node.id} cannot be read; counted as none")
        return node
    huge = read_int(folder / "hugepages/hugepages-2048kB/free_hugepages") or 0
    return replace(node, memory_bytes=total, free_bytes=_free(meminfo, total), huge_bytes=max(0, huge) << 21)


def _free(meminfo: str, total: int) -> int:
    parts = (kb_field(meminfo, key) or 0 for key in ("MemFree", "Active(file)", "Inactive(file)"))
    return min(total, sum(parts))


def _one_node(root: Path, threads: tuple[int, ...], cores: tuple[int, ...], notes: Sequence[str]) -> Topology:
    meminfo = read_text(root / "proc/meminfo")
    total = kb_field(meminfo, "MemTotal")
    huge = read_int(root / "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages") or 0
    if not total:
        notes = (*notes, "the size of the memory cannot be read; asked of the C library")
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = kb_field(meminfo, "MemAvailable")
    free = _free(meminfo, total) if available is None else min(available, total)
    return Topology((Node(0, cores, threads, total, free, (HERE,), max(0, huge) << 21),), tuple(notes))


def _joined(group: Sequence[Node]) -> Node:
    """The first node, with the CPUs of all."""
    return replace(
        group[0],
        cpus=tuple(sorted(cpu for node in group for cpu in node.cpus)),
        threads=tuple(sorted(thread for node in group for thread in node.threads)),
    )
