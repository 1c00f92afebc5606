"""The typed face of the C++ expert store: which bytes are which expert."""

from __future__ import annotations

from k2hybrid.errors import NativeError
from k2hybrid.native import NativeStore
from k2hybrid.types import ExpertRef, Int4Ref


class ExpertStore:
    """Takes experts from the loader (`types.ExpertSink`) and keeps them where they lie.

    Args:
        layers: all layers of the model, dense ones included (they stay empty).
        experts: routed experts per MoE layer.
        hidden, inter: `hidden_size` and `moe_intermediate_size`, multiples of 32.
    """

    def __init__(self, *, layers: int, experts: int, hidden: int, inter: int) -> None:
        self.native = NativeStore(layers, experts, hidden, inter)
        self.layers = layers
        self.experts = experts
        self.hidden = hidden
        self.inter = inter
        self.count = 0
        self.expert_bytes = self.native.expert_bytes

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
        self.count += 1

    @staticmethod
    def _check(what: str, matrix: Int4Ref, out: int, inner: int) -> None:
        if matrix.packed.nbytes != out * inner // 2 or matrix.scale.nbytes != out * inner // 32 * 2:
            raise NativeError(
                f"{what}: {matrix.packed.nbytes} packed and {matrix.scale.nbytes} scale bytes do not make "
                f"a [{out}, {inner}] INT4 matrix with groups of 32"
            )
