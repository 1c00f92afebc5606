"""INT4 experts in slots against float64, and against the oracle that the CPU's kernels are held to."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch

from bench.device_cases import ExpertCase, expert_case
from k2hybrid.errors import KernelError
from k2hybrid.experts.reference import ReferenceExperts
from k2hybrid.kernels import experts
from k2hybrid.kernels.experts import FEW, MANY, choose_tile, deal, expert_bytes
from k2hybrid.types import ExpertRef, Int4Ref, TensorRef
from tests.random_experts import EXPERTS, LAYER, SIZES, TOP_K, RandomExperts

# The rounding of silu(gate) · up against none; and two ways to round it against each other: docs/numerics.md.
BOUND = 3e-3
SAME_ROUNDING = 5e-4


def slot_of(ref: ExpertRef) -> torch.Tensor:
    """An expert's published bytes one after the other."""
    matrices: list[Int4Ref] = [ref.gate, ref.up, ref.down]
    parts: list[TensorRef] = [m.packed for m in matrices] + [m.scale for m in matrices]
    return torch.frombuffer(
        bytearray(b"".join(ctypes.string_at(part.address, part.nbytes) for part in parts)), dtype=torch.uint8
    )


# (rows, choices of a row, slots, hidden, intermediate): a row; fewer rows than a tile, one more; many rows;
# sizes that are no multiple of what is read at once.
CASES = [
    (1, 1, 1, 32, 32),
    (1, 4, 3, 160, 96),
    (5, 3, 7, 96, 64),
    (17, 2, 2, 32, 64),
    (150, 2, 2, 64, 96),
    (70, 4, 8, 160, 32),
]


@pytest.mark.parametrize(("rows", "top_k", "slots", "hidden", "inter"), CASES)
def test_against_float64(rows: int, top_k: int, slots: int, hidden: int, inter: int) -> None:
    case = expert_case(rows, top_k, slots, hidden, inter, absent=0.0 if rows == 1 else 0.3)
    assert case.error(case.run()) < BOUND


@pytest.mark.parametrize(("hidden", "inter"), SIZES)
def test_against_the_oracle_of_the_cpu(hidden: int, inter: int) -> None:
    """The same roundings: only sums in another order, which now and then round to the other neighbour."""
    made = RandomExperts(hidden, inter)
    oracle = ReferenceExperts()
    made.give(oracle)
    x, ids, weights = made.rows(9)
    ids[2] = -1
    ids[4, 1] = -1
    slots = torch.stack([slot_of(ref) for ref in made.refs])
    # Slots hold experts in another order than their ids.
    moved = torch.randperm(EXPERTS, generator=made.g)
    chosen = torch.where(ids < 0, -1, moved[ids.long()]).int()
    holding = torch.empty_like(slots)
    holding[moved] = slots
    got = experts.int4_experts(x, holding, chosen, weights, hidden=hidden, inter=inter)
    want = oracle.submit(LAYER, x, ids, weights).collect()
    assert chosen.shape[1] == TOP_K
    assert ((got - want).norm() / want.norm()).item() < SAME_ROUNDING
    assert got[2].count_nonzero() == 0


@pytest.mark.parametrize(("hidden", "inter"), [(7168, 32), (32, 2048)])
def test_rows_as_long_as_those_of_kimi_k2(hidden: int, inter: int) -> None:
    """One width at a time: both together are 44 million weights, minutes for the interpreter."""
    case = expert_case(1, 1, 1, hidden, inter, absent=0.0)
    assert case.error(case.run()) < BOUND


def test_nothing_chosen_and_no_rows() -> None:
    case = expert_case(3, 2, 2, 32, 32)
    none = replace(case, chosen=torch.full_like(case.chosen, -1))
    assert none.run().count_nonzero() == 0
    empty = replace(case, x=case.x[:0], chosen=case.chosen[:0], weights=case.weights[:0])
    assert empty.run().shape == (0, 32)


def test_a_row_is_the_same_bits_alone_or_among_others() -> None:
    case = expert_case(6, 3, 4, 96, 64)
    together = case.run()
    for t in range(6):
        one = slice(t, t + 1)
        alone = replace(case, x=case.x[one], chosen=case.chosen[one], weights=case.weights[one]).run()
        assert torch.equal(alone[0], together[t])


def test_a_bound_on_the_choices_saves_memory_and_is_seen_when_wrong() -> None:
    case = expert_case(12, 4, 3, 32, 64, absent=0.6)
    here = int((case.chosen >= 0).sum())
    assert torch.equal(case.run(choices=here), case.run())
    assert case.run(choices=here - 1).isnan().any()
    assert case.run(choices=0).isnan().any(1).tolist() == (case.chosen >= 0).any(1).tolist()


@pytest.mark.parametrize(
    ("rows", "top_k", "slots", "tile"),
    [(1, 1, 1, 16), (40, 3, 5, 4), (32, 2, 1, 16), (33, 2, 1, 16), (64, 1, 9, 4), (100, 3, 7, 8)],
)
def test_every_choice_has_one_place_in_a_tile_of_its_slot(
    rows: int, top_k: int, slots: int, tile: int
) -> None:
    g = torch.Generator().manual_seed(rows)
    chosen = torch.randint(-1, slots, (rows, top_k), generator=g, dtype=torch.int32)
    dealt = deal(chosen, slots, tile, rows * top_k)
    flat = chosen.flatten()
    seen = []
    tables = (dealt.tile_slots, dealt.tile_first, dealt.tile_counts)
    for slot, first, count in zip(*(table.tolist() for table in tables), strict=True):
        if slot < 0:
            continue
        assert 1 <= count <= tile
        for place in range(first, first + count):
            choice = int(dealt.order[place])
            assert int(flat[choice]) == slot
            assert int(dealt.places[choice]) == place
            seen.append(choice)
    assert sorted(seen) == (flat >= 0).nonzero().flatten().tolist()
    assert sorted(dealt.places.tolist()) == list(range(rows * top_k))


def test_sizes_and_tiles() -> None:
    assert expert_bytes(7168, 2048) == 24_772_608
    assert choose_tile(8, 8, 1) is FEW
    assert choose_tile(16, 8, 20) is FEW
    assert choose_tile(4096, 8, 384) is MANY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 32)}, "x must be contiguous torch.bfloat16"),
        ({"slots": torch.zeros(2, 100, dtype=torch.uint8)}, r"slots must be .*\[2, 1728\]"),
        ({"slots": torch.zeros(0, 1728, dtype=torch.uint8)}, "a slot at least"),
        ({"chosen": torch.zeros(3, 2, dtype=torch.int64)}, "chosen must be contiguous torch.int32"),
        ({"weights": torch.zeros(3, 1)}, "weights must be"),
        ({"hidden": 48}, "multiples of 32"),
    ],
)
def test_what_it_does_not_take(change: dict[str, torch.Tensor | int], message: str) -> None:
    case: ExpertCase = replace(expert_case(3, 2, 2, 32, 32), **change)  # type: ignore[arg-type]
    with pytest.raises(KernelError, match=message):
        case.run()
