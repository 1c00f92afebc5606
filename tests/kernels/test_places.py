"""Where an expert lies changes nothing: mapped, resident or streamed, on any nodes, by any reader."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from k2hybrid.checkpoint.loader import Checkpoint, open_checkpoint
from k2hybrid.checkpoint.synth import synthesize
from k2hybrid.errors import NativeError
from k2hybrid.experts.dispatch import CpuTicket, Dispatcher
from k2hybrid.experts.placement import ExpertSizes, Place, Placement, place_experts, shard_rows, slot_bytes
from k2hybrid.experts.simulate import replay_ids
from k2hybrid.experts.store import ExpertStore
from k2hybrid.native.machine import Machine
from k2hybrid.native.store import Loan, NativeFiller

EXPERTS, TOP_K, LAYERS = 12, 3, 4  # the first layer is dense
HIDDEN, INTER = 224, 96
ROWS = 25  # more results than wait for experts on their way
SIZES = ExpertSizes(LAYERS - 1, EXPERTS, HIDDEN, INTER)
READERS = ["uring", "threads"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("places") / "model"
    sizes = {
        "layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K, "hidden": HIDDEN, "moe_intermediate": INTER,
        "intermediate": 64, "heads": 2, "q_lora": 32, "kv_lora": 32, "nope": 32, "rope": 32, "v_head": 32,
        "positions": 512, "vocab_size": 600,
    }  # fmt: skip
    synthesize(out, "kimi-k2-thinking", sizes, seed=3, shard_bytes=300_000)
    return out


class Placed:
    """The routed experts of the checkpoint, where a placement puts them."""

    def __init__(
        self,
        model: Path,
        placement: Placement | None,
        *,
        machine: Machine | None = None,
        fill: bool = True,
        **slots: object,
    ) -> None:
        self.store = ExpertStore(
            layers=LAYERS, experts=EXPERTS, hidden=HIDDEN, inter=INTER, placement=placement
        )
        self.checkpoint: Checkpoint = open_checkpoint(model, self.store)
        if not fill:
            self.store._order = lambda placement: []  # type: ignore[method-assign]
        self.store.open_slots(self.checkpoint.maps, **slots)  # type: ignore[arg-type]
        self.dispatcher = Dispatcher(self.store, machine or Machine(2), max_rows=ROWS, top_k=TOP_K)

    def filled(self) -> None:
        deadline = time.monotonic() + 30
        while self.store.progress is not None and self.store.progress.running:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def submit(self, layer: int, ids: torch.Tensor, x: torch.Tensor, weights: torch.Tensor) -> CpuTicket:
        ticket = self.dispatcher.submit(layer, x, ids, weights)
        ticket.out = ticket.collect()  # type: ignore[attr-defined]
        return ticket


def placed(place: Place, nodes: int = 1, slots: int | None = None) -> Placement:
    count = SIZES.count if slots is None else slots
    bounds = shard_rows(INTER, nodes), shard_rows(HIDDEN, nodes)
    return Placement(place, (-1,) * nodes, *bounds, count, None, "test")


def steps(seed: int, count: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    draw = random.Random(seed)
    for i in range(count):
        rows = draw.choice([1, 1, 1, 2, 5, ROWS])
        ids = torch.stack([torch.randperm(EXPERTS, generator=g)[:TOP_K] for _ in range(rows)]).int()
        if draw.random() < 0.3:
            ids[0, 1] = -1
        yield (
            1 + i % (LAYERS - 1),
            ids,
            torch.randn(rows, HIDDEN, generator=g).bfloat16(),
            torch.rand(rows, TOP_K, generator=g),
        )


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[torch.Tensor]:
    mapped = Placed(folder, None)
    return [mapped.submit(*step).out for step in steps(5, 60)]  # type: ignore[attr-defined]


def check(made: Placed, expected: list[torch.Tensor]) -> None:
    for step, want in zip(steps(5, 60), expected, strict=True):
        ticket = made.submit(*step)
        assert ticket.failed_rows == ()
        assert torch.equal(ticket.out, want)  # type: ignore[attr-defined]


def test_slots_are_as_large_as_the_plan_says(folder: Path) -> None:
    for nodes in (1, 2, 3, 5):
        store = ExpertStore(
            layers=LAYERS, experts=EXPERTS, hidden=HIDDEN, inter=INTER, placement=placed("resident", nodes)
        )
        assert store.native.slot_bytes == slot_bytes(SIZES, nodes)


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_mapped_is_the_same_bits_for_every_node_count(
    folder: Path, expected: list[torch.Tensor], nodes: int, threads: int
) -> None:
    groups = min(nodes, threads)
    made = Placed(folder, placed("mapped", nodes, 0), machine=Machine(threads, nodes=[[]] * groups))
    check(made, expected)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("nodes", [1, 2, 3, 6])
def test_resident(folder: Path, expected: list[torch.Tensor], nodes: int, reader: str) -> None:
    made = Placed(
        folder, placed("resident", nodes), machine=Machine(nodes, nodes=[[]] * nodes), reader=reader
    )
    check(made, expected)  # while it fills
    made.filled()
    progress = made.store.progress
    assert progress is not None
    assert (progress.done, progress.failed) == (SIZES.count, 0)
    assert made.store.stats.filled == SIZES.count
    assert all(made.store.native.in_slot(layer, e) for layer in range(1, LAYERS) for e in range(EXPERTS))
    check(made, expected)
    assert made.store.stats.misses == 0


def test_moving_while_serving(folder: Path, expected: list[torch.Tensor]) -> None:
    made = Placed(folder, placed("resident"), machine=Machine(2))
    made.filled()
    moved = 0
    for i, (step, want) in enumerate(zip(steps(5, 60), expected, strict=True)):
        layer, expert = 1 + i % (LAYERS - 1), i // 3 % EXPERTS
        x, ids, weights = step[2], step[1], step[3]
        ticket = made.dispatcher.submit(step[0], x, ids, weights)
        used = set(ids.flatten().tolist()) - {-1}
        if layer == step[0] and expert in used:
            assert not made.store.native.release(layer, expert)  # pinned
        else:
            moved += made.store.native.release(layer, expert)
            assert not made.store.native.in_slot(layer, expert)
        assert torch.equal(ticket.collect(), want)
    assert moved > 20
    assert made.store.stats.filled == SIZES.count - moved
    back = NativeFiller(made.store.native, [(1 + i % 3, i // 3) for i in range(SIZES.count)], [[]], threads=3)
    check(made, expected)
    while back.progress().running:
        time.sleep(0.005)
    assert made.store.stats.filled == SIZES.count
    check(made, expected)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("nodes", [1, 3])
@pytest.mark.parametrize("slots", [EXPERTS, 2 * EXPERTS, SIZES.count - 1])
@pytest.mark.parametrize("half_life", [0.0, 10.0])
@pytest.mark.parametrize("fill", [True, False])
def test_streamed_is_lossless(
    folder: Path,
    expected: list[torch.Tensor],
    nodes: int,
    slots: int,
    reader: str,
    half_life: float,
    fill: bool,
) -> None:
    made = Placed(
        folder,
        placed("streamed", nodes, slots),
        machine=Machine(nodes, nodes=[[]] * nodes),
        fill=fill,
        reader=reader,
        half_life=half_life,
    )
    check(made, expected)
    stats = made.store.stats
    assert stats.filled <= slots
    assert stats.misses > 0
    assert stats.lost == 0


@pytest.mark.parametrize("reader", READERS)
def test_two_tickets_that_miss_the_same_experts(
    folder: Path, expected: list[torch.Tensor], reader: str
) -> None:
    made = Placed(folder, placed("streamed", 1, 3 * EXPERTS), fill=False, reader=reader)
    submit = made.dispatcher.submit
    pairs = [(x, ids, weights, layer) for layer, ids, x, weights in steps(5, 60)]
    for i, (x, ids, weights, layer) in enumerate(pairs):
        early = submit(layer, x, ids, weights)
        late = submit(layer, x, ids, weights)
        for ticket in (late, early) if i % 2 else (early, late):
            assert torch.equal(ticket.collect(), expected[i])
        assert late.report.misses == 0
    assert made.store.stats.misses > 0


def test_an_abort_while_experts_are_on_their_way(folder: Path, expected: list[torch.Tensor]) -> None:
    made = Placed(folder, placed("streamed", 1, EXPERTS), fill=False)
    for layer, ids, x, weights in list(steps(5, 60))[:6]:
        ticket = made.dispatcher.submit(layer, x, ids, weights)
        made.dispatcher.abort()
        ticket.collect()
        assert ticket.failed_rows == tuple(range(len(ids)))
        assert all(made.store.native.pins(layer, e) == 0 for e in range(EXPERTS))
        made.dispatcher = Dispatcher(made.store, Machine(2), max_rows=ROWS, top_k=TOP_K)
    check(made, expected)


def test_a_cold_start_misses_each_expert_once_if_all_fit(folder: Path, expected: list[torch.Tensor]) -> None:
    made = Placed(folder, placed("streamed"), fill=False)
    used: set[tuple[int, int]] = set()
    misses = 0
    for layer, ids, x, weights in steps(5, 60):
        asked = {(layer, e) for e in set(ids.flatten().tolist()) - {-1}}
        report = made.submit(layer, ids, x, weights).report
        assert report.misses == len(asked - used)
        used |= asked
        misses += report.misses
    assert made.store.stats.misses == misses == len(used)


@pytest.mark.parametrize("reader", READERS)
def test_short_reads_go_on(folder: Path, expected: list[torch.Tensor], reader: str) -> None:
    made = Placed(folder, placed("streamed", 2, 2 * EXPERTS), fill=False, reader=reader)
    made.store.native.inject_read_faults(short_every=2)
    check(made, expected)
    assert made.store.stats.lost == 0


@pytest.mark.parametrize("reader", READERS)
def test_a_read_error_fails_the_rows_that_needed_it_and_no_others(
    folder: Path, expected: list[torch.Tensor], reader: str
) -> None:
    made = Placed(folder, placed("streamed", 1, 2 * EXPERTS), fill=False, reader=reader)
    made.store.native.inject_read_faults(fail_every=7)
    failed = good = 0
    for (layer, ids, x, weights), want in zip(steps(5, 60), expected, strict=True):
        ticket = made.submit(layer, ids, x, weights)
        for row in range(len(ids)):
            if row in ticket.failed_rows:
                failed += 1
            else:
                good += 1
                assert torch.equal(ticket.out[row], want[row])  # type: ignore[attr-defined]
    assert failed > 0
    assert good > 0
    assert made.store.stats.lost > 0
    made.store.native.inject_read_faults()
    check(made, expected)  # as if nothing had been


def test_a_file_that_shrinks_and_comes_back(
    folder: Path, expected: list[torch.Tensor], tmp_path: Path
) -> None:
    own = tmp_path / "model"
    own.mkdir()
    for file in folder.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    made = Placed(own, placed("streamed", 1, 2 * EXPERTS), fill=False)
    shards = sorted(own.glob("*.safetensors"))
    kept = {shard: shard.read_bytes() for shard in shards}
    for shard in shards[1:]:
        os.truncate(shard, len(kept[shard]) // 3)
    failed = sum(len(made.submit(*step).failed_rows) for step in steps(5, 60))
    assert failed > 0
    for i, shard in enumerate(shards[1:]):
        if i % 2:
            shard.write_bytes(kept[shard])  # the same file again
        else:
            whole = shard.with_suffix(".whole")
            whole.write_bytes(kept[shard])
            whole.rename(shard)  # another one in its place
    # Whoever replaced a file is noticed at the next failure: the first reads may still fail.
    for step in steps(5, 60):
        made.submit(*step)
    check(made, expected)


@pytest.fixture
def shared_memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as made:
        yield Path(made)


def test_slots_that_last(folder: Path, expected: list[torch.Tensor], shared_memory: Path) -> None:
    first = Placed(
        folder, placed("resident", 2), machine=Machine(2, nodes=[[], []]), folder=shared_memory, digest="a"
    )
    with pytest.raises(NativeError, match="in use by another process"):
        Placed(folder, placed("resident", 2), folder=shared_memory, digest="a")
    first.filled()
    first.store.native.release(2, 5)
    del first
    again = Placed(
        folder,
        placed("resident", 2),
        machine=Machine(2, nodes=[[], []]),
        fill=False,
        folder=shared_memory,
        digest="a",
    )
    assert again.store.stats.filled == SIZES.count - 1
    assert not again.store.native.in_slot(2, 5)
    check(again, expected)
    del again
    other = Placed(
        folder,
        placed("resident", 2),
        machine=Machine(2, nodes=[[], []]),
        fill=False,
        folder=shared_memory,
        digest="b",
    )
    assert other.store.stats.filled == 0


def test_too_few_slots_for_a_step_are_named(folder: Path) -> None:
    made = Placed(folder, placed("streamed", 1, 2), fill=False)
    x, weights = torch.zeros(1, HIDDEN, dtype=torch.bfloat16), torch.ones(1, TOP_K)
    with pytest.raises(NativeError, match="--expert-ram"):
        made.dispatcher.submit(1, x, torch.tensor([[0, 1, 2]], dtype=torch.int32), weights)
    assert made.submit(1, torch.tensor([[0, 1, -1]], dtype=torch.int32), x, weights).failed_rows == ()
    assert all(made.store.native.pins(1, e) == 0 for e in range(EXPERTS))


def test_placements_are_what_the_store_takes(folder: Path, expected: list[torch.Tensor]) -> None:
    one = sum(slot_bytes(SIZES, 1))
    streamed = place_experts(SIZES, node_memory={0: 1 << 34}, expert_ram=(2 * EXPERTS + 1) * one)
    assert streamed.place == "streamed"
    check(Placed(folder, streamed), expected)


@pytest.mark.parametrize(("policy", "half_life"), [("lru", None), ("lrfu-ghost", 4.0)])
@pytest.mark.parametrize("slots", [2 * EXPERTS, 2 * EXPERTS + 5])
def test_what_the_simulator_says(folder: Path, policy: str, half_life: float | None, slots: int) -> None:
    made = Placed(
        folder,
        placed("streamed", 1, slots),
        fill=False,
        half_life=(half_life or 0.0) * SIZES.layers,
    )
    layers, asked, misses = [], [], []
    for layer, ids, x, weights in steps(11, 150):
        misses.append(made.submit(layer, ids, x, weights).report.misses)
        layers.append(layer)
        asked.append(ids.flatten().tolist())
    said = replay_ids(
        layers,
        asked,
        experts=EXPERTS,
        slots=slots,
        policy=policy,  # type: ignore[arg-type]
        half_life=half_life,
        moe_layers=SIZES.layers,
    )
    assert misses == said.missed_by_ticket().tolist()
    assert 0 < said.hits < sum(len(set(ids) - {-1}) for ids in asked)


def read(made: Placed, layer: int, expert: int) -> bytes:
    """The expert's bytes, out of its files."""
    found = b""
    for tensor in made.store.tensors(layer, expert):
        with tensor.path.open("rb") as file:
            file.seek(tensor.offset)
            found += file.read(tensor.nbytes)
    return found


def copied(made: Placed, layer: int, expert: int) -> bytes | None:
    to = torch.zeros(made.store.expert_bytes + 8, dtype=torch.uint8)
    whole = made.store.copy_expert(layer, expert, to)
    assert not to[-8:].any()
    return bytes(to[:-8].numpy().tobytes()) if whole else None


@pytest.mark.parametrize("nodes", [1, 2, 3, 5])
@pytest.mark.parametrize("place", ["mapped", "resident", "streamed"])
def test_copies_are_the_files_bytes(folder: Path, place: Place, nodes: int) -> None:
    made = Placed(folder, placed(place, nodes, 0 if place == "mapped" else 2 * EXPERTS))
    made.filled()
    assert sum(made.store.native.in_slot(1, e) for e in range(EXPERTS)) == EXPERTS * (place != "mapped")
    for layer in range(1, LAYERS):  # of the last, nothing is in a slot
        for expert in range(EXPERTS):
            assert copied(made, layer, expert) == read(made, layer, expert)


def lent_bytes(loan: Loan) -> bytes:
    return b"".join(ctypes.string_at(part.address, part.nbytes) for part in loan.parts)


@pytest.mark.parametrize("nodes", [1, 2, 3, 5])
@pytest.mark.parametrize("place", ["resident", "streamed"])
def test_a_loan_is_the_files_bytes(folder: Path, place: Place, nodes: int) -> None:
    made = Placed(folder, placed(place, nodes, 2 * EXPERTS))
    made.filled()
    for expert in range(EXPERTS):
        loan = made.store.lend(1, expert)
        assert loan is not None
        assert lent_bytes(loan) == read(made, 1, expert)
        assert len(loan.memory) == nodes
        for part in loan.parts:  # all within the slot
            assert any(m.address <= part.address <= part.address + part.nbytes <= m.address + m.nbytes
                       for m in loan.memory)  # fmt: skip
        made.store.give_back(1, expert)
        assert made.store.lend(LAYERS - 1, expert) is None  # of the last layer, nothing is in a slot
    with pytest.raises(NativeError, match="nobody borrowed"):
        made.store.give_back(1, 0)
    made.store.close()


def test_nothing_mapped_is_lent(folder: Path) -> None:
    assert Placed(folder, None).store.lend(1, 0) is None


def test_what_is_lent_stays(folder: Path, expected: list[torch.Tensor]) -> None:
    """It does not leave, and its memory serves whoever comes next."""
    made = Placed(folder, placed("resident", 2, EXPERTS))
    made.filled()
    native = made.store.native
    first = made.store.lend(1, 0)
    again = made.store.lend(1, 0)
    assert first is not None
    assert again == first
    assert not native.release(1, 0)
    made.store.give_back(1, 0)
    assert not native.release(1, 0)
    made.store.give_back(1, 0)
    assert native.release(1, 0)
    assert made.store.lend(1, 0) is None
    assert native.release(1, 5)
    filler = NativeFiller(native, [(2, 7), (2, 8)], [(), ()])
    deadline = time.monotonic() + 30
    while filler.progress().running:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    filler.stop()
    loans = {expert: made.store.lend(2, expert) for expert in (7, 8)}
    for expert, loan in loans.items():
        assert loan is not None
        assert lent_bytes(loan) == read(made, 2, expert)
        made.store.give_back(2, expert)
    assert first.memory in {loan.memory for loan in loans.values() if loan is not None}
    check(made, expected)
    left: list[str] = []
    made.store.before_close(lambda: left.append("first"))
    made.store.before_close(lambda: left.append("second"))
    made.store.close()
    assert left == ["second", "first"]
    assert made.store.lend(2, 7) is None


def while_serving(made: Placed, expected: list[torch.Tensor], take: Callable[[], int]) -> None:
    """Tickets beside a thread that takes experts in whatever way, again and again; it says how many."""
    stop = threading.Event()
    count = 0

    def work() -> None:
        nonlocal count
        while not stop.is_set():
            count += take()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        check(made, expected)
    finally:
        stop.set()
        thread.join()
    assert count > 0


def test_loans_while_serving_and_moving(folder: Path, expected: list[torch.Tensor]) -> None:
    """With the fewest slots, every ticket needs those that are lent."""
    made = Placed(folder, placed("streamed", 2, EXPERTS), machine=Machine(1))
    wanted = {key: read(made, *key) for key in made.store.keys}
    wrong: list[tuple[int, int]] = []

    def borrow() -> int:
        count = 0
        for key, want in wanted.items():
            loan = made.store.lend(*key)
            if loan is not None:
                count += 1
                wrong.extend([key] if lent_bytes(loan) != want else [])
                made.store.give_back(*key)
        return count

    while_serving(made, expected, borrow)
    assert wrong == []
    made.store.close()


def test_copies_while_serving_and_moving(folder: Path, expected: list[torch.Tensor]) -> None:
    """With the fewest slots, every ticket needs those that are being copied."""
    made = Placed(folder, placed("streamed", 2, EXPERTS), machine=Machine(1))
    wanted = {key: read(made, *key) for key in made.store.keys}
    wrong: list[tuple[int, int]] = []

    def copy() -> int:
        for key, want in wanted.items():
            wrong.extend([key] if copied(made, *key) != want else [])
        return len(wanted)

    while_serving(made, expected, copy)
    assert wrong == []
    made.store.close()
    assert copied(made, 1, 0) == wanted[1, 0]


def test_a_copy_of_what_is_lost_tells(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    made = Placed(model, None)
    last = max(made.store.keys, key=lambda key: max(t.offset for t in made.store.tensors(*key)))
    shard = made.store.tensors(*last)[0].path
    end = max(t.offset + t.nbytes for t in made.store.tensors(*last) if t.path == shard)
    others = [key for key in made.store.keys if made.store.tensors(*key)[0].path != shard]
    whole = shard.read_bytes()
    os.truncate(shard, end - 1)  # within a page: no signal tells
    assert copied(made, *last) is None
    assert copied(made, *others[0]) == read(made, *others[0])
    assert copied(made, *last) is None
    shard.write_bytes(whole)
    watch = made.checkpoint.watch()
    deadline = time.monotonic() + 30
    while not watch.whole:
        assert time.monotonic() < deadline
        watch.restore()
        time.sleep(0.05)
    assert copied(made, *last) == read(made, *last)


def test_copies_are_checked(folder: Path) -> None:
    made = Placed(folder, None)
    nbytes = made.store.expert_bytes
    for to in (
        torch.zeros(nbytes - 1, dtype=torch.uint8),
        torch.zeros(nbytes, dtype=torch.int8),
        torch.zeros(2 * nbytes, dtype=torch.uint8)[::2],
    ):
        with pytest.raises(NativeError, match=r"copied to contiguous|no room"):
            made.store.copy_expert(1, 0, to)
    with pytest.raises(NativeError, match="no expert"):
        made.store.copy_expert(0, 0, torch.zeros(nbytes, dtype=torch.uint8))
