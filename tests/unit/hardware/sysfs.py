"""Writes the /proc and /sys of machines that are not here: nodes, cores, threads, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30


@dataclass(frozen=True)
class FakeNode:
    """A node of a machine: its cores (each a list of thread numbers) and its memory."""

    id: int
    cores: Sequence[Sequence[int]]
    memory_bytes: int = 64 * GIB
    free_bytes: int = 40 * GIB
    cache_bytes: int = 8 * GIB
    huge_pages: int = 0  # of 2 MB, free


def cores_of(node: int, nodes: int, per_node: int, smt: bool) -> list[list[int]]:
    """Cores numbered as Linux on x86 does: all first threads node by node, then all second ones."""
    first = range(node * per_node, (node + 1) * per_node)
    return [[core, core + nodes * per_node] if smt else [core] for core in first]


def even_machine(nodes: int, per_node: int = 4, smt: bool = False) -> list[FakeNode]:
    """`nodes` equal nodes."""
    return [FakeNode(node, cores_of(node, nodes, per_node, smt)) for node in range(nodes)]


def put(root: Path, files: Mapping[str, str]) -> None:
    """Write files below `root`."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def write_machine(
    root: Path,
    nodes: Sequence[FakeNode],
    *,
    distances: Mapping[tuple[int, int], int] | None = None,
    offline: Sequence[int] = (),
    mems_allowed: str | None = None,
    numa: bool = True,
) -> None:
    """The tree that `nodes` would have. `distances` default to 10 here and 21 elsewhere."""
    table = dict(distances or {})
    online = sorted(
        thread for node in nodes for core in node.cores for thread in core if thread not in offline
    )
    put(root, {"sys/devices/system/cpu/online": ",".join(map(str, online)) + "\n"})
    total = sum(node.memory_bytes for node in nodes)
    available = sum(node.free_bytes + node.cache_bytes for node in nodes)
    put(root, {"proc/meminfo": f"MemTotal: {total >> 10} kB\nMemAvailable: {available >> 10} kB\n"})
    if mems_allowed is not None:
        put(root, {"proc/self/status": f"Name:\tx\nMems_allowed_list:\t{mems_allowed}\n"})
    for node in nodes:
        for core in node.cores:
            here = [thread for thread in core if thread not in offline]
            for thread in here:
                siblings = ",".join(map(str, here)) + "\n"
                put(root, {f"sys/devices/system/cpu/cpu{thread}/topology/thread_siblings_list": siblings})
        if numa:
            write_node(root, node, nodes, table, offline)


def write_node(
    root: Path,
    node: FakeNode,
    nodes: Sequence[FakeNode],
    table: Mapping[tuple[int, int], int],
    offline: Sequence[int],
) -> None:
    """One folder of /sys/devices/system/node."""
    folder = f"sys/devices/system/node/node{node.id}"
    row = [table.get((node.id, other.id), 10 if other.id == node.id else 21) for other in nodes]
    cpus = sorted(thread for core in node.cores for thread in core if thread not in offline)
    meminfo = {
        "MemTotal": node.memory_bytes,
        "MemFree": node.free_bytes,
        "Active(file)": node.cache_bytes // 4,
        "Inactive(file)": node.cache_bytes - node.cache_bytes // 4,
    }
    put(
        root,
        {
            f"{folder}/cpulist": ",".join(map(str, cpus)) + "\n",
            f"{folder}/distance": " ".join(map(str, row)) + "\n",
            f"{folder}/meminfo": "".join(
                f"Node {node.id} {key}:       {size >> 10} kB\n" for key, size in meminfo.items()
            ),
            f"{folder}/hugepages/hugepages-2048kB/free_hugepages": f"{node.huge_pages}\n",
        },
    )
