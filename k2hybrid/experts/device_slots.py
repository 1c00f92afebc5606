"""Card memory for experts: which slot holds which, and how one comes into it.

    bring ──► what leaves is gone from `slot_of` ──► a thread reads the bytes into a pinned buffer
          ──► they go over the bus, after the last step that may read the slot ──► settle: `slot_of` names it

`slot_of` changes between steps only, and names an expert only when its bytes are there. One whose bytes could
not be read leaves its slot empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch

from k2hybrid.errors import EngineError
from k2hybrid.experts.copies import Arrival, CopyEngine, Fence
from k2hybrid.experts.hot import Counts, Key, Move
from k2hybrid.experts.locked_slots import Lender
from k2hybrid.experts.placement import ExpertSizes


class ExpertSource(Lender, Protocol):
    """Where experts' bytes come from (`store.ExpertStore`)."""

    def copy_expert(self, layer: int, expert: int, to: torch.Tensor) -> bool:
        """Copy an expert's bytes to host memory, from any thread; False: they could not be read."""


class DeviceSlots:
    """Slots for `count` experts on `device`. One thread calls, between steps.

    Args:
        layers: all layers of the model, dense ones included.
        experts, hidden, inter: as in `ExpertStore`.

    Attributes:
        bytes: uint8 [count, expert_bytes] on the device, laid out as `compute` says.
        slot_of: int32 [layers, experts] on the device; −1: not there.
        padded: the same behind a column of −1, so that an id plus one is an index: [layers, experts + 1].
        counts: fp32 [layers, experts] on the device, uses since they were last fetched.
    """

    def __init__(
        self,
        source: ExpertSource,
        copies: CopyEngine,
        device: torch.device,
        *,
        layers: int,
        experts: int,
        hidden: int,
        inter: int,
        count: int,
    ) -> None:
        self.layers, self.experts = layers, experts
        self.hidden, self.inter = hidden, inter
        self.count = count
        self.expert_bytes = ExpertSizes(layers, experts, hidden, inter).expert_bytes
        self.bytes = torch.zeros(count, self.expert_bytes, dtype=torch.uint8, device=device)
        self.padded = torch.full((layers, experts + 1), -1, dtype=torch.int32, device=device)
        self.slot_of = self.padded[:, 1:]
        self.counts = torch.zeros(layers, experts, dtype=torch.float32, device=device)
        self._source = source
        self._copies = copies
        self._table = copies.buffer(self.padded.nbytes).view(torch.int32).view(self.padded.shape)
        self._table.fill_(-1)
        self._sent: Arrival | None = None
        self._counts = copies.buffer(self.counts.nbytes).view(torch.float32).view(self.counts.shape)
        self._staging = copies.buffer(self.expert_bytes if count else 0)
        self._free = list(range(count - 1, -1, -1))
        self._where: dict[Key, int] = {}
        self._coming: list[tuple[Key, int, Future[bool]]] = []
        self._filler = ThreadPoolExecutor(1, thread_name_prefix="hot-experts")

    @property
    def nbytes(self) -> int:
        """On the device."""
        return self.bytes.nbytes + self.padded.nbytes + self.counts.nbytes

    @property
    def staging_bytes(self) -> int:
        """Page-locked, on the host."""
        return self._staging.nbytes + self._table.nbytes + self._counts.nbytes

    @property
    def there(self) -> dict[Key, int]:
        """Experts that steps find on the device, and their slots; a copy."""
        return dict(self._where)

    @property
    def coming(self) -> bool:
        """Whether experts are on their way."""
        return bool(self._coming)

    def bring(self, moves: Sequence[Move]) -> None:
        """Begin to bring experts; what they replace is gone for the steps that follow.

        Raises:
            EngineError: others are on their way still, one is there already, or there is no room.
        """
        if self._coming:
            raise EngineError("experts are on their way to the card; settle them before others are brought")
        leaving = [move.leaves for move in moves if move.leaves is not None]
        if not all(key in self._where for key in leaving) or any(m.comes in self._where for m in moves):
            raise EngineError("what leaves the card must be there, and what comes must not")
        if len(moves) - len(leaving) > len(self._free):
            raise EngineError(f"there is no room for {len(moves) - len(leaving)} more experts on the card")
        slots = [self._free.pop() if m.leaves is None else self._where.pop(m.leaves) for m in moves]
        self._send(dict.fromkeys(leaving, -1))
        fence = self._copies.fence()  # behind the steps that may read what leaves
        self._coming = [
            (move.comes, slot, self._filler.submit(self._fill, move.comes, slot, fence))
            for move, slot in zip(moves, slots, strict=True)
        ]

    def settle(self) -> list[Key]:
        """Let the next steps find what has arrived since.

        Returns:
            Those that could not be read.
        """
        over = [item for item in self._coming if item[2].done()]
        self._coming = [item for item in self._coming if not item[2].done()]
        arrived = {key: slot for key, slot, whole in over if whole.result()}
        self._where.update(arrived)
        self._send(arrived)
        self._free += [slot for key, slot, _ in over if key not in arrived]
        return [key for key, _, _ in over if key not in arrived]

    def wait(self) -> None:
        """Until nothing is on its way: before a graph is captured, which copies of others would break."""
        for _, _, whole in self._coming:
            whole.result()

    def fetch_counts(self) -> Arrival:
        """Begin to fetch `counts`, and set them to zero; once that is over, `fetched` has them."""
        arrival = self._copies.in_order(self._counts, self.counts)
        self.counts.zero_()
        return arrival

    @property
    def fetched(self) -> Counts:
        """[layers, experts], a copy."""
        return self._counts.numpy().astype(np.float64)

    def close(self) -> None:
        """Finish what is on its way, and bring no more."""
        self._filler.shutdown()

    def _fill(self, key: Key, slot: int, after: Fence) -> bool:
        if not self._source.copy_expert(*key, self._staging):
            return False
        self._copies.copy(self.bytes[slot], [self._staging], after).wait()
        return True

    def _send(self, changes: dict[Key, int]) -> None:
        if not changes:
            return
        if self._sent is not None:
            self._sent.wait()  # the table is read until then
        for (layer, expert), slot in changes.items():
            self._table[layer, expert + 1] = slot
        self._sent = self._copies.in_order(self.padded, self._table)
