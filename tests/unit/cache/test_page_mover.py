"""Copies of pages: every byte, in order, errors told; on a card, after what was queued before."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from k2hybrid.cache import cuda_mover
from k2hybrid.cache.cuda_mover import UNDER_WAY, CudaMover
from k2hybrid.cache.page_mover import Lane, MemoryMover, PageMover
from k2hybrid.cache.pages import LatentPages
from k2hybrid.cache.rows import Bf16Rows
from k2hybrid.errors import EngineError

LAYERS, PAGES = 3, 5


@pytest.fixture
def pages() -> LatentPages:
    pool = LatentPages(LAYERS, PAGES, Bf16Rows(6))
    pool._storage.random_(generator=torch.Generator().manual_seed(4))
    return pool


class FakeCuda:
    """Streams that queue what is recorded on them and run it when somebody waits; copies are queued too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.registered: dict[int, int] = {}
        self.code = 0
        self.computing = SimpleNamespace(name="compute")

        def record(event: Any, stream: Any) -> None:
            self.log.append(f"record on {stream.name}")

        def make_event() -> Any:
            event = SimpleNamespace(synchronize=lambda: self.log.append("synchronize"))
            event.record = lambda stream: record(event, stream)
            return event

        def make_stream(_: Any) -> Any:
            name = "out" if not any("made out" in line for line in self.log) else "in"
            self.log.append(f"made {name}")
            return SimpleNamespace(name=name, wait_event=lambda event: self.log.append(f"{name} waits"))

        @contextmanager
        def stream(current: Any) -> Iterator[None]:
            self.log.append(f"on {current.name}")
            yield

        fake = SimpleNamespace(
            Event=make_event, Stream=make_stream, stream=stream, current_stream=lambda _: self.computing,
            cudart=lambda: SimpleNamespace(
                cudaHostRegister=self.register, cudaHostUnregister=self.registered.pop
            ),
        )  # fmt: skip
        monkeypatch.setattr(cuda_mover, "torch", SimpleNamespace(
            cuda=fake, empty=torch.empty, uint8=torch.uint8, Tensor=torch.Tensor
        ))  # fmt: skip

    def register(self, address: int, size: int, _flags: int) -> int:
        self.registered[address] = size
        return self.code


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


@pytest.fixture(params=["memory", "cuda"])
def mover(request: pytest.FixtureRequest, pages: LatentPages) -> Iterator[PageMover]:
    if request.param == "cuda":
        request.getfixturevalue("cuda")
    moving: PageMover = MemoryMover(pages) if request.param == "memory" else CudaMover(pages)
    yield moving
    moving.close()


def test_a_page_goes_out_and_comes_back_with_every_byte(mover: PageMover, pages: LatentPages) -> None:
    room = mover.room(2)
    assert room.shape == (2, LAYERS, 64, 12)
    before = pages._storage.clone()
    mover.out([3, 0], [room[1], room[0]], mover.mark()).result()
    assert torch.equal(room[1], before[:, 3])
    assert torch.equal(room[0], before[:, 0])
    assert torch.equal(pages._storage, before)
    pages._storage[:, 3] = 0
    mover.into([4], [room[1]], mover.mark()).result()
    assert torch.equal(pages._storage[:, 4], before[:, 3])
    assert torch.equal(pages._storage[:, :3], before[:, :3])


def test_the_journal_reads_and_writes_rows_of_a_page(mover: PageMover, pages: LatentPages) -> None:
    buffers = mover.buffers(2, 10, mover.mark())
    assert b"".join(buffers) == pages._storage[:, 2, :10].contiguous().numpy().tobytes()

    def read(out: list[memoryview]) -> bool:
        assert [len(layer) for layer in out] == [7 * 12] * LAYERS
        for n, layer in enumerate(out):
            layer[:] = bytes([n + 1]) * len(layer)
        return True

    others = pages._storage[:, [0, 2, 3, 4]].clone()
    assert mover.fill(1, 7, read, mover.mark())
    for n in range(LAYERS):
        assert (pages._storage[n, 1, :7] == n + 1).all()
    assert torch.equal(pages._storage[:, [0, 2, 3, 4]], others)
    assert not mover.fill(1, 7, lambda out: False, mover.mark())


def test_copies_of_one_way_are_made_in_order(mover: PageMover, pages: LatentPages) -> None:
    room = mover.room(1)
    copies = [mover.out([page], [room[0]], mover.mark()) for page in (0, 1, 2) * 20]
    for copy in copies:
        copy.result()
    assert torch.equal(room[0], pages._storage[:, 2])


def test_close_ends_what_was_begun_and_takes_no_more(pages: LatentPages) -> None:
    mover = MemoryMover(pages)
    room = mover.room(20)
    copies = [mover.out([n % PAGES], [room[n]]) for n in range(20)]
    mover.close()
    assert all(copy.done() and copy.exception() is None for copy in copies)
    with pytest.raises(EngineError, match="no longer"):
        mover.out([0], [room[0]])


def test_a_card_waits_for_what_was_computed_and_is_waited_for(cuda: FakeCuda, pages: LatentPages) -> None:
    mover = CudaMover(pages)
    room = mover.room(2)
    assert cuda.registered == {room.data_ptr(): room.numel()}
    cuda.log.clear()
    mover.out([0, 2], [room[0], room[1]], mover.mark()).result()
    mover.into([1], [room[0]], mover.mark()).result()
    one_way = ["record on compute", "on {0}", "{0} waits", "record on {0}", "synchronize"]
    assert cuda.log == [line.format(way) for way in ("out", "in") for line in one_way]
    mover.close()
    assert cuda.registered == {}


def test_memory_that_cannot_be_pinned_is_no_room(cuda: FakeCuda, pages: LatentPages) -> None:
    mover = CudaMover(pages)
    cuda.code = 2
    with pytest.raises(RuntimeError, match="cudaHostRegister failed with 2"):
        mover.room(1)
    cuda.registered.clear()
    mover.close()


def started(log: list[str], name: str, fails: str = "") -> Callable[[], Callable[[], None]]:
    def finish() -> None:
        log.append(f"end {name}")
        if fails == "end":
            raise OSError(f"{name} was lost")

    def start() -> Callable[[], None]:
        log.append(f"begin {name}")
        if fails == "begin":
            raise OSError(f"{name} cannot begin")
        return finish

    return start


def test_a_lane_begins_several_jobs_before_the_first_ends() -> None:
    lane = Lane("test", 2)
    log: list[str] = []
    gate = threading.Event()

    def held() -> Callable[[], None]:
        gate.wait()
        return started(log, "first")()

    first = lane.submit(held)
    rest = [lane.submit(started(log, name)) for name in ("a", "b", "c")]
    gate.set()
    for future in (first, *rest):
        future.result()
    assert log == [
        "begin first", "begin a", "end first", "begin b", "end a", "begin c", "end b", "end c",
    ]  # fmt: skip
    lane.close()


def test_a_job_that_fails_is_told_and_the_next_goes_on() -> None:
    lane = Lane("test", UNDER_WAY)
    log: list[str] = []
    bad = [lane.submit(started(log, "x", "begin")), lane.submit(started(log, "y", "end"))]
    good = lane.submit(started(log, "z"))
    assert good.result() is None
    for future, message in zip(bad, ("cannot begin", "was lost"), strict=True):
        with pytest.raises(OSError, match=message):
            future.result()
    lane.close()
