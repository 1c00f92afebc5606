"""Dense weights on a device, copied as the model takes them; the bytes they came from are let go. Layer 5."""

from __future__ import annotations

from collections.abc import Callable

import torch

from k2hybrid.types import LinearWeight, Weight8, WeightSource


class DeviceWeights:
    """A `WeightSource` that hands out copies on a device; the embedding stays in RAM.

    Args:
        source: a checkpoint, or 8-bit weights of it.
        let_go: of a tensor that was copied from the checkpoint.
    """

    def __init__(
        self, source: WeightSource, device: torch.device, let_go: Callable[[int | None, str], None]
    ) -> None:
        self._source = source
        self._device = device
        self._let_go = let_go

    def take(self, layer: int | None, role: str) -> LinearWeight:
        """See `WeightSource.take`.

        Raises:
            ShardIndexError: bytes of it were lost before they were copied.
        """
        weight = self._source.take(layer, role)
        if isinstance(weight, Weight8):
            return Weight8(weight.values.to(self._device), weight.scale.to(self._device), weight.kind)
        if role == "embed_tokens" or weight.device == self._device:
            return weight
        try:
            return weight.to(self._device)
        finally:
            self._let_go(layer, role)
