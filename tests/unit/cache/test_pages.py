"""Latent pages: who holds what, and that rows come back as they were written."""

from __future__ import annotations

import pytest
import torch

from k2hybrid.cache.pages import LatentPages
from k2hybrid.cache.rows import Bf16Rows, Fp32Rows
from k2hybrid.errors import CapacityError, EngineError


def rows(count: int, width: int = 6) -> torch.Tensor:
    """Distinct values that bf16 holds exactly."""
    return torch.arange(count * width, dtype=torch.float32).remainder(256).view(count, width).bfloat16()


def test_a_row_of_kimi_k2_takes_1152_bytes() -> None:
    pages = LatentPages(61, 1, Bf16Rows(512 + 64))
    assert pages.format.row_bytes == 1152
    assert pages.page_bytes == 64 * 70_272


def test_pages_are_taken_lowest_first_and_come_back() -> None:
    pages = LatentPages(1, 4, Bf16Rows(6))
    assert pages.allocate(3) == [0, 1, 2]
    pages.release([1])
    assert pages.free_pages == 2
    assert pages.allocate(2) == [1, 3]
    assert pages.free_pages == 0


def test_too_many_pages_take_none() -> None:
    pages = LatentPages(1, 4, Bf16Rows(6))
    pages.allocate(2)
    with pytest.raises(CapacityError, match="latent_bytes"):
        pages.allocate(3)
    assert pages.free_pages == 2


def test_a_page_is_free_when_its_last_holder_lets_go() -> None:
    pages = LatentPages(1, 2, Bf16Rows(6))
    (page,) = pages.allocate(1)
    pages.retain([page])
    pages.release([page])
    assert pages.refcount(page) == 1
    assert pages.free_pages == 1
    pages.release([page])
    assert pages.refcount(page) == 0
    assert pages.free_pages == 2


def test_holding_a_free_page_or_letting_it_go_twice_is_an_error() -> None:
    pages = LatentPages(1, 2, Bf16Rows(6))
    with pytest.raises(EngineError, match="cannot be retained"):
        pages.retain([0])
    with pytest.raises(EngineError, match="more often"):
        pages.release([0])


@pytest.mark.parametrize("table", [[2, 3, 4], [4, 0, 2]], ids=["adjoining", "scattered"])
@pytest.mark.parametrize(("start", "stop"), [(0, 150), (63, 65), (64, 128), (70, 71), (130, 150)])
def test_gather_returns_what_write_stored(table: list[int], start: int, stop: int) -> None:
    pages = LatentPages(2, 5, Bf16Rows(6))
    page_table = torch.tensor(table)
    written = rows(150)
    for first, last in ((0, 1), (1, 100), (100, 150)):
        pages.write(1, page_table, first, written[first:last])
    pages.write(0, page_table, 0, torch.zeros(150, 6))  # another layer does not disturb it
    assert torch.equal(pages.gather(1, page_table, start, stop), written[start:stop])
    there = page_table.clone()
    assert torch.equal(pages.gather(1, page_table, start, stop, there), written[start:stop])


def test_gather_copies_nothing_where_pages_adjoin() -> None:
    pages = LatentPages(1, 4, Bf16Rows(6))
    page_table = torch.tensor([1, 2])
    pages.write(0, page_table, 0, rows(128))
    view = pages.gather(0, page_table, 0, 128)
    view[100] = 7.0
    assert torch.equal(pages.gather(0, page_table, 100, 101), torch.full((1, 6), 7.0).bfloat16())


def test_put_stores_rows_of_several_sequences_at_once() -> None:
    pages = LatentPages(1, 4, Bf16Rows(6))
    one, other = torch.tensor([3]), torch.tensor([0, 2])
    slots = torch.cat((pages.slots(one, 5, 7), pages.slots(other, 63, 65)))
    written = rows(4)
    pages.put(0, slots, written)
    assert torch.equal(pages.gather(0, one, 5, 7), written[:2])
    assert torch.equal(pages.gather(0, other, 63, 65), written[2:])


def test_fp32_rows_keep_every_bit() -> None:
    pages = LatentPages(1, 1, Fp32Rows(5))
    written = torch.randn(10, 5, generator=torch.Generator().manual_seed(0))
    pages.write(0, torch.tensor([0]), 3, written)
    assert torch.equal(pages.gather(0, torch.tensor([0]), 3, 13), written)


def test_copy_rows_copies_the_first_rows_of_every_layer_and_nothing_else() -> None:
    pages = LatentPages(3, 4, Bf16Rows(6))
    pages.allocate(4)
    written = [rows(128).roll(layer, 0) for layer in range(3)]
    for layer in range(3):
        pages.write(layer, torch.tensor([2, 1]), 0, written[layer])
        pages.write(layer, torch.tensor([0, 3]), 0, torch.full((128, 6), -1.0))
    pages.copy_rows(2, 3, 30)
    for layer in range(3):
        assert torch.equal(pages.gather(layer, torch.tensor([2, 1]), 0, 128), written[layer])
        copied = pages.gather(layer, torch.tensor([3]), 0, 64)
        assert torch.equal(copied[:30], written[layer][:30])
        assert (copied[30:] == -1).all()
        assert (pages.gather(layer, torch.tensor([0]), 0, 64) == -1).all()


def test_copy_rows_wants_held_pages_and_no_more_rows_than_there_are() -> None:
    pages = LatentPages(1, 3, Bf16Rows(6))
    pages.allocate(2)
    pages.copy_rows(0, 1, 64)
    for src, dst in ((0, 2), (2, 0)):
        with pytest.raises(EngineError, match="page 2 is free"):
            pages.copy_rows(src, dst, 1)
    with pytest.raises(EngineError, match="65 rows"):
        pages.copy_rows(0, 1, 65)
