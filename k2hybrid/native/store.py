"""Where the bytes of all routed experts lie, and what brings them there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from k2hybrid.errors import NativeError
from k2hybrid.native.extension import ERRORS, EXTENSION


class StoreStats(NamedTuple):
    """What `NativeStore.stats` tells; slots hold one expert each."""

    slots: int
    filled: int
    hits: int  # experts that hand-offs found in memory
    misses: int  # those that had to be fetched
    lost: int  # reads of an expert that failed
    bytes_read: int


class FillProgress(NamedTuple):
    """What `NativeFiller.progress` tells, in experts."""

    experts: int
    done: int
    failed: int
    running: bool


class MemorySpan(NamedTuple):
    """Memory of this process."""

    address: int
    nbytes: int


class Loan(NamedTuple):
    """An expert in its slot: its bytes in the order of `NativeStore.copy`, and the slot's memory by node."""

    parts: tuple[MemorySpan, ...]
    memory: tuple[MemorySpan, ...]


class NativeStore:
    """Where the bytes of all routed experts lie, [layer][expert]; see `csrc/experts/store.h`.

    Args:
        gate_bounds, down_bounds: nodes + 1 ascending rows; node n has rows [b[n], b[n + 1]) of gate and
            up, and of down.
    """

    def __init__(
        self,
        layers: int,
        experts: int,
        hidden: int,
        inter: int,
        gate_bounds: Sequence[int] = (),
        down_bounds: Sequence[int] = (),
    ) -> None:
        with ERRORS:
            self.handle = EXTENSION.ExpertStore(
                layers, experts, hidden, inter, list(gate_bounds), list(down_bounds)
            )
        self.expert_bytes: int = self.handle.expert_bytes
        self.nodes: int = self.handle.nodes
        self.slot_bytes: tuple[int, ...] = tuple(self.handle.slot_bytes)  # of an expert, on each node

    def add_source(self, path: Path) -> int:
        """A file that experts are read from; its number."""
        with ERRORS:
            return int(self.handle.add_source(os.fspath(path)))

    def put(self, layer: int, expert: int, packed: Sequence[int], scale: Sequence[int]) -> None:
        """Addresses of gate, up and down, which must outlive the store."""
        with ERRORS:
            self.handle.put(layer, expert, list(packed), list(scale))

    def locate(self, layer: int, expert: int, places: Sequence[tuple[int, int]]) -> None:
        """Tell where in their files an expert's bytes lie; its addresses must be a map of these files.

        Args:
            places: (source, offset) of the packed weights of gate, up and down, then of their scales.
        """
        with ERRORS:
            self.handle.locate(layer, expert, list(places))

    def open_slots(
        self,
        count: int,
        node_ids: Sequence[int],
        *,
        streamed: bool,
        half_life: float = 0.0,
        folder: Path | None = None,
        digest: str = "",
        reader: str = "",
        depth: int = 16,
        piece_bytes: int = 2 << 20,
    ) -> None:
        """Memory for `count` experts; once, when all were put.

        Args:
            node_ids: the NUMA node of each shard; −1: not bound.
            streamed: hand-offs fetch what they miss; else experts are read mapped until they have a slot.
            half_life: of an expert's uses, in hand-offs; 0: the last use alone decides who leaves.
            folder: on hugetlbfs or shared memory, for slots that outlive the process.
            digest: of what such slots are filled from.
            reader: "uring", "threads", or "": the first that works.
            depth: pieces in flight.
            piece_bytes: of one read, a multiple of 4096.
        """
        with ERRORS:
            self.handle.open_slots(
                count, list(node_ids), os.fspath(folder) if folder else "", digest, reader, depth,
                piece_bytes, streamed, half_life,
            )  # fmt: skip

    def close_slots(self) -> None:
        """Give the slots back; every expert is mapped again. What fills them must have stopped."""
        with ERRORS:
            self.handle.close_slots()

    def copy(self, layer: int, expert: int, to: torch.Tensor) -> bool:
        """Copy an expert's bytes, as its file has them, to `to`, uint8 [at least expert_bytes]. Any thread.

        Packed rows of gate, up and down, then their scales; from its slot, or else through the map.

        Returns:
            False: they could not be read.
        """
        if to.dtype != torch.uint8 or to.device.type != "cpu" or not to.is_contiguous():
            raise NativeError("an expert is copied to contiguous bytes on the CPU")
        if to.numel() < self.expert_bytes:
            raise NativeError(f"an expert has {self.expert_bytes} bytes, and {to.numel()} are no room for it")
        with ERRORS:
            return bool(self.handle.copy(layer, expert, to.data_ptr()))

    def lend(self, layer: int, expert: int) -> Loan | None:
        """An expert's bytes in its slot, which stays as it is until `give_back`, once a loan. Any thread.

        The slot's memory stays the process's own until the slots are closed, so that it can be page-locked.

        Returns:
            None: it is in no slot, or not yet.
        """
        with ERRORS:
            found = self.handle.lend(layer, expert)
        if found is None:
            return None
        parts, memory = found
        return Loan(tuple(MemorySpan(*part) for part in parts), tuple(MemorySpan(*slot) for slot in memory))

    def give_back(self, layer: int, expert: int) -> None:
        """End a loan.

        Raises:
            NativeError: nobody borrowed it.
        """
        with ERRORS:
            self.handle.give_back(layer, expert)

    def pins(self, layer: int, expert: int) -> int:
        """Tickets that read this expert now."""
        return int(self.handle.pins(layer, expert))

    def in_slot(self, layer: int, expert: int) -> bool:
        """Whether the expert is in memory of its own."""
        return bool(self.handle.in_slot(layer, expert))

    def release(self, layer: int, expert: int) -> bool:
        """Back to the map, the slot free; False if it is pinned, in no slot, or streamed."""
        with ERRORS:
            return bool(self.handle.release(layer, expert))

    def stats(self) -> StoreStats:
        """Counts since the start."""
        return StoreStats(**self.handle.stats())

    def arenas(self) -> list[tuple[int, str, bool]]:
        """(bytes, kind of pages, bound to its node) of each node's slots."""
        with ERRORS:
            return [(int(nbytes), str(pages), bool(bound)) for nbytes, pages, bound in self.handle.arenas()]

    @property
    def reader(self) -> str:
        """What reads: "uring" or "threads"."""
        with ERRORS:
            return str(self.handle.reader)

    def inject_read_faults(self, *, fail_every: int = 0, short_every: int = 0) -> None:
        """For tests: every n-th piece fails, or ends early; 0: none."""
        with ERRORS:
            self.handle.inject_read_faults(fail_every, short_every)


class NativeFiller:
    """Threads that bring experts into slots behind the scenes; see `csrc/experts/filler.h`.

    Args:
        order: (layer, expert), first come first filled.
        cpus: of each node; an empty list does not bind its threads.
        threads: of each node.
    """

    def __init__(
        self,
        store: NativeStore,
        order: Sequence[tuple[int, int]],
        cpus: Sequence[Sequence[int]],
        *,
        threads: int = 1,
    ) -> None:
        with ERRORS:
            self.handle = EXTENSION.Filler(store.handle, list(order), [list(c) for c in cpus], threads)

    def progress(self) -> FillProgress:
        """How far it is."""
        return FillProgress(*self.handle.progress())

    def stop(self) -> None:
        """Finish what is on its way and end."""
        self.handle.stop()
