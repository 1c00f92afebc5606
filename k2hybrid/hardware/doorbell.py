"""The doorbell of ``csrc/gpu/doorbell.h``: its words, and a CPU side that echoes, for checks and timing.

The protocol stands at the top of that header. Layer 1.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch

from k2hybrid.errors import EngineError
from k2hybrid.native.doorbell import EchoDoorbell, doorbell_bytes, doorbell_layout, play_device


@dataclass(frozen=True)
class StepOutcome:
    """One finished step; ``aborted`` is empty, or one of ``asked``, ``watchdog``, ``answer threw``."""

    epoch: int
    layers: int
    answered: int
    aborted: str

    def require_answered(self) -> None:
        """Raise `EngineError` unless every slot was answered."""
        if self.aborted:
            raise EngineError(
                f"step {self.epoch} was aborted ({self.aborted}) "
                f"after {self.answered} of {self.layers} layers"
            )


class DoorbellWords:
    """The words of a doorbell, in host memory.

    Args:
        slots: layers that one step may ring.
        pinned: page-locked memory that a device reaches; else ordinary, for threads that play one.

    Attributes:
        storage: owner of the memory.
        address: of the words themselves, aligned to 128 bytes.
        layout: sizes, offsets and values of the protocol.
    """

    def __init__(self, slots: int, *, pinned: bool = False) -> None:
        self.slots = slots
        self.layout: dict[str, int] = doorbell_layout()
        self.storage = torch.zeros(doorbell_bytes(slots) + 128, dtype=torch.uint8, pin_memory=pinned)
        self.address = -(-self.storage.data_ptr() // 128) * 128

    def word(self, slot: int, field: str) -> int:
        """Host address of ``request``, ``input``, ``reply`` or ``output`` of a slot."""
        return (
            self.address + self.layout["header_bytes"] + slot * self.layout["slot_bytes"] + self.layout[field]
        )

    def release_all(self) -> None:
        """Poison every reply whatever its state: the last resort for a device that waits in vain."""
        for slot in range(self.slots):
            ctypes.c_uint32.from_address(self.word(slot, "reply")).value = self.layout["poisoned"]


class Doorbell(DoorbellWords):
    """Words and a CPU side with the echo answer (input + 1), for checks and timing.

    Args:
        slots: layers that one step may ring.
        timeout_ms: a ring unanswered for longer aborts the step.
        work_us: busy time of each answer.
        pinned: see `DoorbellWords`.
    """

    def __init__(
        self, slots: int, *, timeout_ms: float = 1000.0, work_us: float = 0.0, pinned: bool = False
    ) -> None:
        super().__init__(slots, pinned=pinned)
        self._cpu = EchoDoorbell(self.storage, self.address, slots, timeout_ms, work_us)
        self.publish: Callable[..., int] = self._cpu.publish
        self.abort: Callable[[], None] = self._cpu.abort
        self.reset: Callable[[], None] = self._cpu.reset
        self.stall_at: Callable[[int], None] = self._cpu.stall_at
        self.throw_at: Callable[[int], None] = self._cpu.throw_at

    def finish(self) -> StepOutcome:
        return StepOutcome(**self._cpu.finish())

    def play_device(self, layers: int, *, seed: int = 0, limit_ms: float = 5000.0) -> dict[str, int]:
        """The device's side of one step, on the calling thread."""
        played: dict[str, int] = play_device(self.address, layers, seed, limit_ms)
        return played
