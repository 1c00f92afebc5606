"""Dense weights in 8 bits, made as the model takes them; the bytes they came from are let go. Layer 5."""

from __future__ import annotations

from k2hybrid.checkpoint.dense8 import quantize
from k2hybrid.checkpoint.dense_bytes import DENSE8_ROLES
from k2hybrid.checkpoint.loader import Checkpoint
from k2hybrid.types import LinearWeight, Weight8Kind


class Dense8Weights:
    """A `WeightSource` that hands out `DENSE8_ROLES` of a checkpoint in 8 bits, all else in place."""

    def __init__(self, checkpoint: Checkpoint, kind: Weight8Kind) -> None:
        self._checkpoint = checkpoint
        self._kind = kind

    def take(self, layer: int | None, role: str) -> LinearWeight:
        """See `WeightSource.take`.

        Raises:
            ShardIndexError: bytes of it were lost before they were read.
            TensorError: as `Checkpoint.take`; or a weight is not finite.
        """
        weight = self._checkpoint.take(layer, role)
        if role not in DENSE8_ROLES:
            return weight
        what = role if layer is None else f"{role} of layer {layer}"
        # What was lost is read as zeros, or as anything: that is told before what it may contain.
        try:
            made = quantize(weight, self._kind, what)
        finally:
            self._checkpoint.let_go(layer, role)
        return made
