"""The typed face of the C++ expert store: which bytes are which expert, and where they are kept."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from k2hybrid.errors import NativeError
from k2hybrid.experts.placement import Placement
from k2hybrid.native.files import file_changes
from k2hybrid.native.store import FillProgress, Loan, NativeFiller, NativeStore, StoreStats
from k2hybrid.types import ExpertRef, Int4Ref, TensorRef

Order = Sequence[tuple[int, int]]  # (layer, expert)


class ExpertStore:
    """Takes experts from the loader (`types.ExpertSink`) and keeps them where `placement` says.

    Until `open_slots` every expert is `mapped`: read in place from its file.

    Args:
        layers: all layers of the model, dense ones included (they stay empty).
        experts: routed experts per MoE layer.
        hidden, inter: `hidden_size` and `moe_intermediate_size`, multiples of 32.
        placement: which rows are whose, and how many experts have a slot; None: mapped, on one node.
    """

    def __init__(
        self, *, layers: int, experts: int, hidden: int, inter: int, placement: Placement | None = None
    ) -> None:
        gate, down = (placement.gate_bounds, placement.down_bounds) if placement else ((), ())
        self.native = NativeStore(layers, experts, hidden, inter, gate, down)
        self.layers = layers
        self.experts = experts
        self.hidden = hidden
        self.inter = inter
        self.placement = placement
        self.expert_bytes = self.native.expert_bytes
        self._refs: dict[tuple[int, int], ExpertRef] = {}
        self.closing = threading.Event()  # set by `close`, for those that follow what the store does
        self._guests: list[Callable[[], None]] = []
        self._filler: NativeFiller | None = None
        self._maps: Sequence[object] = ()  # after the filler, which lets go of their pages: it ends first

    @property
    def count(self) -> int:
        """Experts that were added."""
        return len(self._refs)

    def add_expert(self, layer: int, expert: int, ref: ExpertRef) -> None:
        """Keep the expert `mapped`: its bytes are read in place and must outlive the store.

        Raises:
            NativeError: a shape does not fit the store's sizes.
        """
        for name, matrix, out, inner in (
            ("gate", ref.gate, self.inter, self.hidden),
            ("up", ref.up, self.inter, self.hidden),
            ("down", ref.down, self.hidden, self.inter),
        ):
            self._check(f"layer {layer} expert {expert} {name}", matrix, out, inner)
        parts = (ref.gate, ref.up, ref.down)
        self.native.put(layer, expert, [m.packed.address for m in parts], [m.scale.address for m in parts])
        self._refs[layer, expert] = ref

    def open_slots(
        self,
        maps: Sequence[object],
        *,
        folder: Path | None = None,
        digest: str = "",
        reader: str = "",
        half_life: float = 0.0,
        cpus: Sequence[Sequence[int]] | None = None,
        fill_threads: int = 1,
    ) -> None:
        """Make the slots of the placement, and begin to fill those that nobody has to wait for.

        Args:
            maps: owners of the files' maps that the experts' addresses lie in, kept until `close`.
            folder, digest: of slots that outlive the process; the digest says what they are filled from.
            reader: "uring", "threads", or "": the first that works.
            half_life: of an expert's uses, in hand-offs, for `streamed`; 0: the least recently used leaves.
            cpus: of each node, for the threads that fill its slots.
            fill_threads: of each node.

        Raises:
            NativeError: memory, files or reader cannot be had.
        """
        placement = self.placement
        if placement is None or placement.slots == 0:
            return
        self._maps = maps
        sources: dict[Path, int] = {}
        for layer, expert in self._refs:
            tensors = self.tensors(layer, expert)
            for tensor in tensors:
                if tensor.path not in sources:
                    sources[tensor.path] = self.native.add_source(tensor.path)
            self.native.locate(layer, expert, [(sources[t.path], t.offset) for t in tensors])
        # Slots that last are found again by the expert's number; those of dense layers cost no memory.
        count = self.layers * self.experts if folder else placement.slots
        self.native.open_slots(
            count,
            placement.nodes,
            streamed=placement.place == "streamed",
            half_life=half_life,
            folder=folder,
            digest=digest,
            reader=reader,
        )
        self._filler = NativeFiller(
            self.native, self._order(placement), cpus or [()] * self.native.nodes, threads=fill_threads
        )

    @property
    def keys(self) -> list[tuple[int, int]]:
        """(layer, expert) of all that were added, ascending."""
        return sorted(self._refs)

    def tensors(self, layer: int, expert: int) -> list[TensorRef]:
        """Where an expert's bytes are: packed weights of gate, up and down, then their scales."""
        ref = self._refs[layer, expert]
        parts = (ref.gate, ref.up, ref.down)
        return [m.packed for m in parts] + [m.scale for m in parts]

    def copy_expert(self, layer: int, expert: int, to: torch.Tensor) -> bool:
        """Copy an expert's bytes to `to`, in the order of `tensors`, wherever they lie. Any thread.

        Args:
            to: uint8 [at least expert_bytes] on the CPU.

        Returns:
            False: they could not be read, or files changed meanwhile; try again later.
        """
        before = file_changes()
        # A file that is mapped again, or was written to, may have given anything, and no mark tells.
        return self.native.copy(layer, expert, to) and file_changes() == before

    def lend(self, layer: int, expert: int) -> Loan | None:
        """See `NativeStore.lend`."""
        return self.native.lend(layer, expert)

    def give_back(self, layer: int, expert: int) -> None:
        """See `NativeStore.give_back`."""
        self.native.give_back(layer, expert)

    def _order(self, placement: Placement) -> list[tuple[int, int]]:
        """(layer, expert) as they are to be filled: the most used first, or from the first layer on."""
        known = self.keys
        if placement.fill_order is None:
            return known[: placement.slots]
        layers = sorted({layer for layer, _ in known})
        return [(layers[layer], expert) for layer, expert in placement.fill_order]

    @property
    def progress(self) -> FillProgress | None:
        """How far the slots are filled; None where there are none."""
        filler = self._filler  # `close` may take it away meanwhile
        return filler.progress() if filler is not None else None

    @property
    def stats(self) -> StoreStats:
        """Counts since the start."""
        return self.native.stats()

    def before_close(self, leave: Callable[[], None]) -> None:
        """Call `leave` before the slots are given back: of somebody who borrows or locks them."""
        self._guests.append(leave)

    def close(self) -> None:
        """Stop filling and give the slots back. No hand-off may be under way; afterwards all is mapped."""
        self.closing.set()
        try:
            while self._guests:
                self._guests.pop()()
        finally:
            if self._filler:
                self._filler.stop()
                self._filler = None
                self.native.close_slots()
                self._maps = ()

    @staticmethod
    def _check(what: str, matrix: Int4Ref, out: int, inner: int) -> None:
        if matrix.packed.nbytes != out * inner // 2 or matrix.scale.nbytes != out * inner // 32 * 2:
            raise NativeError(
                f"{what}: {matrix.packed.nbytes} packed and {matrix.scale.nbytes} scale bytes do not make "
                f"a [{out}, {inner}] INT4 matrix with groups of 32"
            )
