"""Pages of a card and pinned memory: every byte, after what computes, both ways at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from k2hybrid.cache.cuda_mover import CudaMover
from k2hybrid.cache.pages import LatentPages
from k2hybrid.cache.rows import Bf16Rows

pytestmark = pytest.mark.gpu
LAYERS, PAGES = 61, 40


@pytest.fixture
def pages() -> LatentPages:
    pool = LatentPages(LAYERS, PAGES, Bf16Rows(328), "cuda")
    pool._storage.random_(0, 256)
    return pool


@pytest.fixture
def mover(pages: LatentPages) -> Iterator[CudaMover]:
    moving = CudaMover(pages)
    yield moving
    moving.close()


def test_pages_go_out_and_come_back_with_every_byte(mover: CudaMover, pages: LatentPages) -> None:
    before = pages._storage.cpu()
    room = mover.room(PAGES)
    assert room.is_pinned()
    copies = [
        mover.out(list(range(at, at + 8)), list(room[at : at + 8]), mover.mark()) for at in range(0, PAGES, 8)
    ]
    for copy in copies:
        copy.result(30)
    assert torch.equal(room, before.transpose(0, 1))
    pages._storage.zero_()
    order = torch.randperm(PAGES).tolist()
    mover.into(order, [room[page] for page in order], mover.mark()).result(30)
    assert torch.equal(pages._storage.cpu(), before)


def test_copies_come_after_what_is_queued_and_do_not_disturb_other_pages(
    mover: CudaMover, pages: LatentPages
) -> None:
    room = mover.room(2)
    big = torch.randn(4096, 4096, device="cuda")
    for value in range(1, 11):
        for _ in range(20):
            big = (big @ big).clamp_(-1, 1)
        pages.page(0).fill_(value)  # behind a long queue
        out = mover.out([0], [room[0]], mover.mark())
        back = mover.into([1], [room[1].fill_(value)], mover.mark())
        out.result(60)
        back.result(60)
        assert (room[0] == value).all()
        assert (pages.page(1) == value).all()
    with pytest.raises(AssertionError):
        assert (pages.page(2) == 10).all()


def test_the_journal_sees_rows_in_memory_of_the_cpu(mover: CudaMover, pages: LatentPages) -> None:
    expected = pages.page(3)[:, :20].cpu().contiguous().numpy().tobytes()
    assert b"".join(mover.buffers(3, 20, mover.mark())) == expected

    def read(out: list[memoryview]) -> bool:
        for layer in out:
            layer[:] = b"\x07" * len(layer)
        return True

    assert mover.fill(4, 20, read, mover.mark())
    assert (pages.page(4)[:, :20] == 7).all()
