"""Experts whose slots are page-locked: their bytes go over the bus from where they lie, through no buffer.

A slot's memory is locked when an expert in it is borrowed for the first time, and stays so until `close`:
other experts may come into it meanwhile. Once the driver refuses, no more is locked. An expert in no
locked slot, as a mapped one, is nobody's to borrow: it takes the way through a buffer.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from typing import Protocol

import torch

from k2hybrid.experts.copies import CopyEngine
from k2hybrid.native.store import Loan, MemorySpan

log = logging.getLogger(__name__)


class Lender(Protocol):
    """Who has experts in slots (`store.ExpertStore`)."""

    def lend(self, layer: int, expert: int) -> Loan | None:
        """An expert's bytes in its slot, which stays as it is until they are given back; None: in none."""

    def give_back(self, layer: int, expert: int) -> None:
        """End a loan."""


class LockedSlots:
    """Borrows experts for copies; any thread. `close` it before the slots are closed.

    Attributes:
        nbytes: page-locked.
    """

    def __init__(self, lender: Lender, copies: CopyEngine) -> None:
        self._lender = lender
        self._copies = copies
        self._mutex = threading.Lock()
        self._locked: set[int] = set()
        self._refused = False
        self.nbytes = 0

    def borrow(self, layer: int, expert: int) -> list[torch.Tensor] | None:
        """The expert's bytes, piece after piece: uint8 on the CPU, until `give_back`. None: take a copy."""
        loan = self._lender.lend(layer, expert)
        if loan is None:
            return None
        locked = False
        try:
            locked = all(self._lock(span) for span in loan.memory)
        finally:
            if not locked:
                self.give_back(layer, expert)
        return [_bytes_at(span) for span in loan.parts if span.nbytes] if locked else None

    def give_back(self, layer: int, expert: int) -> None:
        """No copy of it is under way any more."""
        self._lender.give_back(layer, expert)

    def close(self) -> None:
        """Unlock all; nothing may be borrowed."""
        with self._mutex:
            while self._locked:
                self._copies.unlock(self._locked.pop())
            self.nbytes = 0

    def _lock(self, span: MemorySpan) -> bool:
        with self._mutex:
            if span.address in self._locked or not span.nbytes:
                return True
            if self._refused:
                return False
            problem = self._copies.lock(span.address, span.nbytes)
            if problem:
                self._refused = True
                log.warning(
                    "experts go to the card through buffers, which costs long prompts time: their memory "
                    "cannot be locked (%s)",
                    problem,
                )
                return False
            self._locked.add(span.address)
            self.nbytes += span.nbytes
            return True


def _bytes_at(span: MemorySpan) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_uint8 * span.nbytes).from_address(span.address), dtype=torch.uint8)
