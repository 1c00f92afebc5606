"""Random experts that may be unreadable or slow, and slots for them, on the emulated device or a real one."""

from __future__ import annotations

import ctypes
import threading

import torch

from k2hybrid.experts.copies import CopyEngine, InlineCopies
from k2hybrid.experts.device_slots import DeviceSlots
from k2hybrid.experts.hot import Move
from k2hybrid.experts.store import ExpertStore
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

    def bytes_of(self, expert: int) -> torch.Tensor:
        raw = b"".join(ctypes.string_at(t.address, t.nbytes) for t in self.store.tensors(LAYER, expert))
        return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


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
