"""Random experts that may be unreadable or slow, and slots for them, on the emulated device or a real one."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import threading
from collections import Counter

import torch

from k2hybrid.experts.copies import CopyEngine, InlineCopies
from k2hybrid.experts.device_slots import DeviceSlots
from k2hybrid.experts.hot import Move
from k2hybrid.experts.store import ExpertStore
from k2hybrid.native.store import Loan, MemorySpan
from tests.random_experts import EXPERTS, LAYER, RandomExperts

LAYERS = 2
CPU = torch.device("cpu")


class Source:
    """Random experts in a store, of which some cannot be read."""

    def __init__(self, hidden: int = 160, inter: int = 96) -> None:
        self.made = RandomExperts(hidden, inter, shift=8)
        self.store = ExpertStore(layers=LAYERS, experts=EXPERTS, hidden=hidden, inter=inter)
        self.made.give(self.store)
        self.broken: set[int] = set()
        self.asked: list[int] = []
        self.go = threading.Event()
        self.go.set()

    def copy_expert(self, layer: int, expert: int, to: torch.Tensor) -> bool:
        self.go.wait()
        self.asked.append(expert)
        return self.store.copy_expert(layer, expert, to) and expert not in self.broken

    def lend(self, layer: int, expert: int) -> Loan | None:
        """All are mapped."""
        return None

    def give_back(self, layer: int, expert: int) -> None:
        """Nobody borrowed it."""
        raise AssertionError(f"expert {expert} is given back, and nobody borrowed it")

    def bytes_of(self, expert: int) -> torch.Tensor:
        raw = b"".join(ctypes.string_at(t.address, t.nbytes) for t in self.store.tensors(LAYER, expert))
        return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


class SlottedSource(Source):
    """One whose experts of `lent` lie in slots, in pieces; who reads one after giving it back reads rubbish.

    A slot is two stretches of whole pages, as of two nodes.

    Attributes:
        loans: that are not given back, by expert.
        most: there were at once.
    """

    def __init__(self, lent: set[int], hidden: int = 160, inter: int = 96) -> None:
        super().__init__(hidden, inter)
        self.lent = lent
        self.loans: Counter[int] = Counter()
        self.most = 0
        self._mutex = threading.Lock()
        half = self.store.expert_bytes // 2
        self._sizes = (half, self.store.expert_bytes - half)
        self._slots = {expert: [_pages(nbytes) for nbytes in self._sizes] for expert in lent}
        self.slot_bytes = sum(len(pages) for pages in map(_pages, self._sizes))

    def lend(self, layer: int, expert: int) -> Loan | None:
        assert layer == LAYER
        if expert not in self.lent:
            return None
        with self._mutex:
            slot = self._slots[expert]
            if not self.loans[expert]:
                for pages, some in zip(slot, self.bytes_of(expert).split(self._sizes), strict=True):
                    pages[: len(some)] = some
            self.loans[expert] += 1
            self.most = max(self.most, self.loans.total())
        parts = []
        for pages, nbytes in zip(slot, self._sizes, strict=True):
            cuts = [0, 1, nbytes // 3, nbytes // 3, nbytes]
            parts += [MemorySpan(pages.data_ptr() + a, b - a) for a, b in itertools.pairwise(cuts)]
        return Loan(tuple(parts), tuple(MemorySpan(pages.data_ptr(), len(pages)) for pages in slot))

    def give_back(self, layer: int, expert: int) -> None:
        with self._mutex:
            self.loans[expert] -= 1
            assert self.loans[expert] >= 0
            if not self.loans[expert]:
                for pages in self._slots[expert]:
                    pages.fill_(0x5A)


def _pages(nbytes: int) -> torch.Tensor:
    """Whole pages of memory, uint8, for so many bytes at least."""
    return torch.frombuffer(mmap.mmap(-1, -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE), dtype=torch.uint8)


def slots_of(
    source: Source, count: int, copies: CopyEngine | None = None, device: torch.device = CPU
) -> DeviceSlots:
    store = source.store
    return DeviceSlots(
        source, copies or InlineCopies(), device,
        layers=LAYERS, experts=EXPERTS, hidden=store.hidden, inter=store.inter, count=count,
    )  # fmt: skip


def settled(slots: DeviceSlots) -> list[tuple[int, int]]:
    slots.wait()
    return slots.settle()


def coming(*experts: int) -> list[Move]:
    return [Move((LAYER, expert)) for expert in experts]
