"""NUMA topologies read from trees of made-up machines, held against what was written into them."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from k2hybrid.hardware.topology import Topology, read_topology
from tests.unit.hardware.sysfs import GIB, FakeNode, cores_of, even_machine, put, write_machine

NODE = "sys/devices/system/node"


def everything(nodes: list[FakeNode]) -> list[int]:
    return [thread for node in nodes for core in node.cores for thread in core]


def read(root: Path, nodes: list[FakeNode]) -> Topology:
    return read_topology(root, everything(nodes))


@pytest.mark.parametrize("smt", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 8])
def test_even_machines(tmp_path: Path, count: int, smt: bool) -> None:
    nodes = even_machine(count, per_node=3, smt=smt)
    write_machine(tmp_path, nodes)
    topology = read(tmp_path, nodes)
    assert topology.notes == ()
    assert topology.compute_nodes == topology.nodes
    assert topology.memory_only == ()
    assert [node.id for node in topology.nodes] == list(range(count))
    for node, made in zip(topology.nodes, nodes, strict=True):
        assert node.cpus == tuple(core[0] for core in made.cores)
        assert node.threads == tuple(sorted(thread for core in made.cores for thread in core))
        assert (node.memory_bytes, node.free_bytes) == (64 * GIB, 48 * GIB)
        assert node.distances == tuple(10 if other == node.id else 21 for other in range(count))
    assert topology.capacity_bytes == count * 64 * GIB
    assert topology.cpus == tuple(range(3 * count))


def test_sparse_ids_keep_their_distances(tmp_path: Path) -> None:
    nodes = [FakeNode(0, [[0], [1]]), FakeNode(3, [[2], [3]]), FakeNode(8, [[4]], memory_bytes=0)]
    write_machine(tmp_path, nodes, distances={(8, 0): 30, (8, 3): 12, (8, 8): 10})
    topology = read(tmp_path, nodes)
    assert [node.id for node in topology.nodes] == [0, 3, 8]
    assert topology.nodes[2].distances == (30, 12, 10)
    assert {node.id: node.cpus for node in topology.compute_nodes} == {0: (0, 1), 3: (2, 3, 4)}


def test_a_node_without_memory_joins_the_lowest_of_equally_near_ones(tmp_path: Path) -> None:
    nodes = [
        FakeNode(0, [[0]]), FakeNode(1, [[1]]), FakeNode(2, [[2]]), FakeNode(3, [[3, 4]], memory_bytes=0)
    ]  # fmt: skip
    write_machine(tmp_path, nodes, distances={(3, 0): 32, (3, 1): 16, (3, 2): 16})
    compute = read(tmp_path, nodes).compute_nodes
    assert [(node.id, node.cpus, node.threads) for node in compute] == [
        (0, (0,), (0,)),
        (1, (1, 3), (1, 3, 4)),
        (2, (2,), (2,)),
    ]


def test_memory_without_cpus_is_capacity_only(tmp_path: Path) -> None:
    """A CXL card: no shard, even where it is nearest to the CPUs of a node whose own slots are empty."""
    nodes = [FakeNode(0, [[0]]), FakeNode(1, [[1]], memory_bytes=0), FakeNode(2, [], memory_bytes=256 * GIB)]
    write_machine(tmp_path, nodes, distances={(1, 0): 21, (1, 2): 14})
    topology = read(tmp_path, nodes)
    assert [(node.id, node.cpus) for node in topology.compute_nodes] == [(0, (0, 1))]
    assert [node.id for node in topology.memory_only] == [2]
    assert topology.capacity_bytes == 320 * GIB


def test_where_no_node_has_both_the_nearest_memory_counts(tmp_path: Path) -> None:
    nodes = [FakeNode(0, [[0], [1]], memory_bytes=0), FakeNode(1, []), FakeNode(2, [])]
    write_machine(tmp_path, nodes, distances={(0, 1): 30, (0, 2): 20})
    topology = read(tmp_path, nodes)
    assert [(node.id, node.cpus) for node in topology.compute_nodes] == [(2, (0, 1))]
    assert [node.id for node in topology.memory_only] == [1]


def test_offline_threads_leave_their_core(tmp_path: Path) -> None:
    nodes = even_machine(2, per_node=2, smt=True)  # cores (0,4) (1,5) | (2,6) (3,7)
    write_machine(tmp_path, nodes, offline=(0, 2, 6))
    topology = read(tmp_path, nodes)  # the affinity still names them
    assert [node.cpus for node in topology.nodes] == [(1, 4), (3,)]
    assert [node.threads for node in topology.nodes] == [(1, 4, 5), (3, 7)]


def test_a_restricted_cpuset_takes_the_first_allowed_sibling(tmp_path: Path) -> None:
    nodes = even_machine(2, per_node=4, smt=True)  # core c has threads c and c + 8
    write_machine(tmp_path, nodes)
    topology = read_topology(tmp_path, allowed_cpus={1, 9, 10, 12, 13, 5})
    assert [node.cpus for node in topology.nodes] == [(1, 10), (5, 12)]
    assert [node.threads for node in topology.nodes] == [(1, 9, 10), (5, 12, 13)]


def test_memory_that_may_not_be_used_does_not_count(tmp_path: Path) -> None:
    nodes = even_machine(4, per_node=1)
    write_machine(tmp_path, nodes, mems_allowed="1,3", distances={(0, 1): 12, (2, 3): 12})
    topology = read(tmp_path, nodes)
    assert [node.memory_bytes // GIB for node in topology.nodes] == [0, 64, 0, 64]
    assert {node.id: node.cpus for node in topology.compute_nodes} == {1: (0, 1), 3: (2, 3)}
    explicit = read_topology(tmp_path, everything(nodes), allowed_mems={0})
    assert [(node.id, node.cpus) for node in explicit.compute_nodes] == [(0, (0, 1, 2, 3))]


def test_cpus_of_one_node_with_the_memory_of_two(tmp_path: Path) -> None:
    nodes = even_machine(2)
    write_machine(tmp_path, nodes)
    topology = read_topology(tmp_path, allowed_cpus={0, 1})
    assert [node.id for node in topology.compute_nodes] == [0]
    assert [node.id for node in topology.memory_only] == [1]


def test_a_kernel_without_numa_is_one_node(tmp_path: Path) -> None:
    nodes = even_machine(2, per_node=2, smt=True)
    write_machine(tmp_path, nodes, numa=False)
    (node,) = read(tmp_path, nodes).compute_nodes
    assert (node.id, node.cpus, node.threads) == (0, (0, 1, 2, 3), tuple(range(8)))
    assert (node.memory_bytes, node.free_bytes, node.distances) == (128 * GIB, 96 * GIB, (10,))


def test_a_system_that_tells_nothing_is_one_node(tmp_path: Path) -> None:
    topology = read_topology(tmp_path, {2, 5})
    (node,) = topology.compute_nodes
    assert node.cpus == node.threads == (2, 5)
    assert node.memory_bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert any("memory" in note for note in topology.notes)


def test_free_huge_pages_are_counted_apart(tmp_path: Path) -> None:
    nodes = [FakeNode(0, [[0]], huge_pages=512), FakeNode(1, [[1]], huge_pages=3)]
    write_machine(tmp_path, nodes)
    assert [node.huge_bytes for node in read(tmp_path, nodes).nodes] == [GIB, 6 << 20]


GARBAGE = ["", "\x00\xff", "0-", "3-1", "0-99999999999", "-1", "1;2", "a" * 4096, "0,,1", "\n\n"]


@pytest.mark.parametrize("text", GARBAGE)
@pytest.mark.parametrize("name", ["cpulist", "distance", "meminfo"])
def test_a_garbled_file_of_a_node_never_loses_a_cpu(tmp_path: Path, name: str, text: str) -> None:
    nodes = even_machine(3, per_node=2)
    write_machine(tmp_path, nodes)
    (tmp_path / NODE / "node1" / name).write_text(text)
    topology = read(tmp_path, nodes)
    assert sorted(cpu for node in topology.compute_nodes for cpu in node.cpus) == list(range(6))
    assert topology.notes  # also for an empty cpulist: CPUs that no node has are named
    assert all(len(node.distances) == 3 for node in topology.nodes)
    if name == "meminfo":
        assert [node.id for node in topology.compute_nodes] == [0, 2]


def test_cpus_of_a_garbled_list_are_found_by_their_links(tmp_path: Path) -> None:
    nodes = even_machine(2, per_node=2)
    write_machine(tmp_path, nodes)
    (tmp_path / NODE / "node1/cpulist").write_text("?")
    for cpu in (2, 3):
        (tmp_path / NODE / f"node1/cpu{cpu}").mkdir()
    (tmp_path / NODE / "node1/cpufreq").mkdir()
    topology = read(tmp_path, nodes)
    assert [node.cpus for node in topology.nodes] == [(0, 1), (2, 3)]
    assert topology.notes == ("the CPUs of node 1 cannot be read",)


@pytest.mark.parametrize("text", GARBAGE)
def test_other_garbled_files_fall_back(tmp_path: Path, text: str) -> None:
    nodes = even_machine(2, per_node=2, smt=True)
    write_machine(tmp_path, nodes, mems_allowed=text)
    put(
        tmp_path,
        {
            "sys/devices/system/cpu/online": text,
            "sys/devices/system/cpu/cpu0/topology/thread_siblings_list": text,
            f"{NODE}/node0/hugepages/hugepages-2048kB/free_hugepages": text,
        },
    )
    topology = read(tmp_path, nodes)
    assert topology.cpus == (0, 1, 2, 3, 4)  # core (0, 4) fell apart into two
    assert {cpu for node in topology.nodes for cpu in node.threads} == set(range(8))
    assert len(topology.compute_nodes) == 2


def test_folders_and_links_in_place_of_files(tmp_path: Path) -> None:
    nodes = even_machine(2, per_node=1)
    write_machine(tmp_path, nodes)
    for name in ("cpulist", "meminfo", "distance"):
        (tmp_path / NODE / f"node1/{name}").unlink()
        (tmp_path / NODE / f"node1/{name}").mkdir()
    (compute,) = read(tmp_path, nodes).compute_nodes
    assert (compute.id, compute.cpus) == (0, (0, 1))


@pytest.mark.parametrize("seed", range(40))
def test_random_machines_against_a_plain_search(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(1, 8)
    ids = sorted(rng.sample(range(20), count))
    nodes = [
        FakeNode(
            number,
            cores_of(at, count, 3, rng.random() < 0.5) if rng.random() < 0.75 else [],
            memory_bytes=rng.choice([0, 16, 64]) * GIB,
        )
        for at, number in enumerate(ids)
    ]
    threads = everything(nodes)
    if not threads or not any(node.memory_bytes for node in nodes):
        return
    table = {(a, b): 10 if a == b else rng.choice([12, 20, 30]) for a in ids for b in ids}
    write_machine(tmp_path, nodes, distances=table)
    allowed = set(rng.sample(threads, rng.randint(1, len(threads))))
    topology = read_topology(tmp_path, allowed)

    home = {}
    both = {n.id for n in nodes if n.memory_bytes and allowed & {t for core in n.cores for t in core}}
    targets = both or {n.id for n in nodes if n.memory_bytes}
    for node in nodes:
        for core in node.cores:
            for thread in core:
                if node.id in targets:
                    home[thread] = node.id
                else:
                    home[thread] = sorted(targets, key=lambda to, at=node.id: (table[at, to], to))[0]
    cores = [sorted(allowed.intersection(core)) for node in nodes for core in node.cores]
    first = {core[0] for core in cores if core}
    compute = topology.compute_nodes
    assert [node.id for node in compute] == sorted({home[thread] for thread in allowed})
    for node in compute:
        assert node.threads == tuple(sorted(t for t in allowed if home[t] == node.id))
        assert node.cpus == tuple(sorted(t for t in first if home[t] == node.id))
    memory_only = {node.id for node in topology.memory_only}
    assert memory_only == {n.id for n in nodes if n.memory_bytes} - {node.id for node in compute}


def test_this_machine() -> None:
    topology = read_topology()
    mine = os.sched_getaffinity(0)
    assert {thread for node in topology.compute_nodes for thread in node.threads} == mine
    assert set(topology.cpus) <= mine
    assert topology.capacity_bytes > 0
