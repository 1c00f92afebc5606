"""Where experts are put: against all ways to deal rows, and against sums of what is placed."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2hybrid.errors import ConfigError
from k2hybrid.experts.placement import ExpertSizes, least_slots, place_experts, shard_rows, slot_bytes

K2 = ExpertSizes(layers=60, experts=384, hidden=7168, inter=2048)
TINY = ExpertSizes(layers=3, experts=8, hidden=96, inter=64)
GIB = 1 << 30

sizes_of_models = st.builds(
    ExpertSizes,
    layers=st.integers(1, 5),
    experts=st.integers(1, 9),
    hidden=st.integers(4, 20).map(lambda n: 32 * n),
    inter=st.integers(4, 20).map(lambda n: 32 * n),
)


def test_true_sizes_are_those_of_the_published_checkpoint() -> None:
    assert K2.expert_bytes == 3 * 7168 * 2048 // 2 + 3 * 7168 * 2048 // 32 * 2 == 24_772_608
    assert K2.total_bytes == 60 * 384 * 24_772_608


@pytest.mark.parametrize("rows", [16, 32, 40, 48, 56, 96, 120, 127])
@pytest.mark.parametrize("nodes", [1, 2, 3, 4])
def test_rows_are_dealt_as_evenly_as_steps_allow(rows: int, nodes: int) -> None:
    inner = range(16, rows, 16)
    ways = [
        (0, *cuts, rows)
        for cuts in itertools.combinations(inner, nodes - 1)
        if all(b - a >= 16 for a, b in itertools.pairwise((0, *cuts, rows)))
    ]
    if not ways:
        with pytest.raises(ConfigError, match=rf"1…{rows // 16} nodes"):
            shard_rows(rows, nodes)
        return
    bounds = shard_rows(rows, nodes)
    assert bounds in ways

    def largest(way: tuple[int, ...]) -> int:
        return max(b - a for a, b in itertools.pairwise(way))

    assert largest(bounds) == min(map(largest, ways))


@pytest.mark.parametrize(("rows", "nodes"), [(128, 0), (128, -1), (15, 1), (0, 1), (7168, 449)])
def test_rows_that_cannot_be_dealt_are_refused(rows: int, nodes: int) -> None:
    with pytest.raises(ConfigError, match="can be dealt to"):
        shard_rows(rows, nodes)


@given(sizes_of_models, st.integers(1, 4))
def test_a_slot_holds_its_rows_wherever_they_start_in_the_file(sizes: ExpertSizes, nodes: int) -> None:
    gate, down = shard_rows(sizes.inter, nodes), shard_rows(sizes.hidden, nodes)
    for node, room in enumerate(slot_bytes(sizes, nodes)):
        of_gate, of_down = gate[node + 1] - gate[node], down[node + 1] - down[node]
        segments = [of_gate * sizes.hidden // 2, of_gate * sizes.hidden // 16] * 2
        segments += [of_down * sizes.inter // 2, of_down * sizes.inter // 16]
        for start in (0, 8, 4088, 4095):  # blocks touched, counted one by one
            blocks = sum(len({byte // 4096 for byte in range(start, start + n)}) for n in segments)
            assert blocks * 4096 <= room
        assert room <= sum(segments) + 6 * 2 * 4096
    assert sum(slot_bytes(sizes, nodes)) >= sizes.expert_bytes


@given(
    sizes=sizes_of_models,
    memory=st.lists(st.integers(0, 1 << 23), min_size=1, max_size=4),
    reserved=st.integers(0, 1 << 22),
    expert_ram=st.none() | st.integers(0, 1 << 24),
    wanted=st.sampled_from(["auto", "mapped", "resident", "streamed"]),
)
@settings(max_examples=300)
def test_what_is_placed_fits_and_one_more_would_not(
    sizes: ExpertSizes, memory: list[int], reserved: int, expert_ram: int | None, wanted: Any
) -> None:
    by_node = {3 * i: room for i, room in enumerate(memory)}
    shares = slot_bytes(sizes, len(memory))

    def fits(slots: int) -> bool:
        on_nodes = all(slots * share <= room for share, room in zip(shares, memory, strict=True))
        in_budget = expert_ram is None or slots * sum(shares) <= expert_ram
        return on_nodes and in_budget and (slots == 0 or slots * sum(shares) + reserved <= sum(memory))

    try:
        found = place_experts(
            sizes, node_memory=by_node, wanted=wanted, expert_ram=expert_ram, reserved_bytes=reserved
        )
    except ConfigError:
        beyond = expert_ram is not None and expert_ram >= sum(shares) and expert_ram + reserved > sum(memory)
        uneven = expert_ram is not None and any(
            min(sizes.count, expert_ram // sum(shares)) * share > room
            for share, room in zip(shares, memory, strict=True)
        )
        if wanted == "mapped":
            assert expert_ram is not None
        elif not beyond and not uneven:
            assert not fits(sizes.count if wanted == "resident" else least_slots(sizes))
        return

    assert found.nodes == tuple(by_node)
    assert found.gate_bounds[-1] == sizes.inter
    assert found.down_bounds[-1] == sizes.hidden
    assert len(found.gate_bounds) == len(found.down_bounds) == len(memory) + 1
    if wanted != "auto":
        assert found.place == wanted
    if found.place == "mapped":
        assert found.slots == 0
        assert expert_ram is None
        if wanted == "auto":
            assert len(memory) == 1
            assert sizes.total_bytes + reserved <= memory[0]
        return
    assert fits(found.slots)
    if found.place == "resident":
        assert found.slots == sizes.count
    else:
        assert found.slots >= least_slots(sizes)
        assert found.slots == sizes.count or not fits(found.slots + 1)
        assert wanted == "streamed" or found.slots < sizes.count or len(memory) == 1


@pytest.mark.parametrize(
    ("memory", "reserved", "place"),
    [
        ({0: 768 * GIB}, 40 * GIB, "mapped"),
        ({0: 512 * GIB}, 40 * GIB, "streamed"),
        ({0: 384 * GIB, 1: 384 * GIB}, 40 * GIB, "resident"),
        ({0: 128 * GIB, 2: 128 * GIB}, 40 * GIB, "streamed"),
        ({0: 700 * GIB, 1: 100 * GIB}, 40 * GIB, "streamed"),  # its half does not fit the second node
    ],
)
def test_what_auto_takes_for_true_sizes(memory: dict[int, int], reserved: int, place: str) -> None:
    found = place_experts(K2, node_memory=memory, reserved_bytes=reserved)
    assert found.place == place
    assert found.reason


def test_a_budget_for_all_makes_them_resident_and_a_smaller_one_streams() -> None:
    room = {0: 768 * GIB}
    assert place_experts(K2, node_memory=room, expert_ram=600 * GIB).place == "resident"
    streamed = place_experts(K2, node_memory=room, expert_ram=200 * GIB)
    assert streamed.place == "streamed"
    assert streamed.slots == 200 * GIB // sum(slot_bytes(K2, 1))


@given(sizes_of_models, st.integers(1, 3))
def test_the_least_budget_that_an_error_names_works_and_so_does_the_largest(
    sizes: ExpertSizes, nodes: int
) -> None:
    room = dict.fromkeys(range(nodes), GIB)
    with pytest.raises(ConfigError) as caught:
        place_experts(sizes, node_memory=room, expert_ram=sum(slot_bytes(sizes, nodes)) - 1)
    least = _gib_in(str(caught.value))[-1]
    assert place_experts(sizes, node_memory=room, expert_ram=least).slots >= least_slots(sizes)

    small = dict.fromkeys(range(nodes), (least_slots(sizes) + 1) * max(slot_bytes(sizes, nodes)))
    if sizes.count > least_slots(sizes) + 2 and nodes == 1:
        with pytest.raises(ConfigError, match="at most"):
            place_experts(sizes, node_memory=small, expert_ram=GIB)


def _gib_in(text: str) -> list[int]:
    return [round(float(number) * GIB) for number in re.findall(r"([0-9.]+)GiB", text)]


@given(st.lists(st.lists(st.integers(0, 5), min_size=8, max_size=8), min_size=3, max_size=3))
def test_slots_are_filled_with_the_most_used(routing: list[list[int]]) -> None:
    budget = 17 * sum(slot_bytes(TINY, 1))
    found = place_experts(TINY, node_memory={0: GIB}, expert_ram=budget, routing=routing)
    assert found.fill_order is not None
    assert len(found.fill_order) == found.slots == 17
    assert len(set(found.fill_order)) == 17
    counts = [routing[layer][expert] for layer, expert in found.fill_order]
    assert counts == sorted(counts, reverse=True)
    left = [
        n for i, layer in enumerate(routing) for e, n in enumerate(layer) if (i, e) not in found.fill_order
    ]
    assert max(left) <= min(counts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"node_memory": {}}, "a node that computes"),
        ({"node_memory": {0: -1}}, "a node that computes"),
        ({"reserved_bytes": -1}, "a node that computes"),
        ({"wanted": "mapped", "expert_ram": 1 << 20}, "leave --expert-ram out"),
        ({"wanted": "resident", "expert_ram": 1 << 20}, "stream them"),
        ({"wanted": "resident", "node_memory": {0: 1000}}, "stream them"),
        ({"wanted": "streamed", "node_memory": {0: 1000}}, "free memory"),
        ({"routing": [[1] * 8] * 2}, "3 layers with 8 experts"),
        ({"routing": [[1] * 7] * 3}, "3 layers with 8 experts"),
        ({"node_memory": dict.fromkeys(range(5), GIB)}, "1…4 nodes"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place_experts(TINY, **{"node_memory": {0: GIB}, **options})


@pytest.mark.parametrize(("hidden", "inter"), [(100, 64), (96, 65), (0, 64), (96, -32)])
def test_widths_without_whole_groups_are_refused(hidden: int, inter: int) -> None:
    with pytest.raises(ConfigError):
        ExpertSizes(layers=1, experts=1, hidden=hidden, inter=inter)


def test_mapped_against_advice_says_what_will_happen() -> None:
    found = place_experts(TINY, node_memory={0: 1000}, wanted="mapped")
    assert found.place == "mapped"
    assert "do not fit" in found.reason


def test_a_model_without_routed_experts_needs_no_slots() -> None:
    found = place_experts(ExpertSizes(0, 0, 96, 64), node_memory={0: 0}, wanted="streamed")
    assert (found.place, found.slots) == ("mapped", 0)


def test_it_runs_without_torch_and_without_the_extension() -> None:
    code = (
        "import sys\nfrom k2hybrid.experts import placement, plan\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'k2hybrid._native')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
