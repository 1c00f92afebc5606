"""Random experts in memory, and what they make of rows, in float64: for tests of whatever runs experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from k2hybrid.checkpoint import int4
from k2hybrid.experts.store import ExpertStore
from k2hybrid.types import ExpertRef, ExpertSink, Int4Ref, TensorRef

SIZES = [(160, 96), (128, 128), (32, 64), (224, 32), (416, 160)]  # tails of 32, 64 and 96 in either half
EXPERTS = 7
TOP_K = 3
LAYER = 1


class RandomExperts:
    """Random experts in memory, each matrix `shift` bytes after a 64-byte boundary."""

    def __init__(self, hidden: int, inter: int, shift: int = 0) -> None:
        self.hidden, self.inter, self.shift = hidden, inter, shift
        self.g = torch.Generator().manual_seed(hidden * inter + shift)
        self.keep: list[np.ndarray] = []
        self.weights: dict[tuple[int, int], torch.Tensor] = {}
        shapes = [(inter, hidden), (inter, hidden), (hidden, inter)]
        self.refs = [
            ExpertRef(*(self._matrix(expert, i, *shape) for i, shape in enumerate(shapes)))
            for expert in range(EXPERTS)
        ]

    def _matrix(self, expert: int, part: int, out: int, inner: int) -> Int4Ref:
        q = torch.randint(-8, 8, (out, inner), generator=self.g, dtype=torch.int8)
        scale = (torch.rand(out, inner // 32, generator=self.g) * 0.1 + 0.01).bfloat16()
        packed = int4.pack(q)
        self.weights[expert, part] = int4.dequantize(packed, scale).double()
        return Int4Ref(self._place("I32", packed), self._place("BF16", scale))

    def _place(self, dtype: str, tensor: torch.Tensor) -> TensorRef:
        raw = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
        room = np.zeros(raw.size + 192, dtype=np.uint8)
        start = -room.ctypes.data % 64 + self.shift
        room[start : start + raw.size] = raw
        self.keep.append(room)
        shape = tuple(tensor.shape)
        return TensorRef("t", Path("memory"), 0, raw.size, dtype, shape, room.ctypes.data + start)

    def give(self, sink: ExpertSink) -> None:
        for expert, ref in enumerate(self.refs):
            sink.add_expert(LAYER, expert, ref)

    def rows(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = torch.randn(count, self.hidden, generator=self.g).bfloat16()
        ids = torch.stack([torch.randperm(EXPERTS, generator=self.g)[:TOP_K] for _ in range(count)]).int()
        return x, ids, torch.rand(count, TOP_K, generator=self.g)

    def want(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(x.shape, dtype=torch.float64)
        for t, k in np.ndindex(*ids.shape):
            expert = int(ids[t, k])
            if expert >= 0:
                gate, up = (self.weights[expert, i] @ x[t].double() for i in (0, 1))
                hidden = torch.nn.functional.silu(gate) * up
                out[t] += weights[t, k].double() * (self.weights[expert, 2] @ hidden)
        return out


class RandomLayers(RandomExperts):
    """A store with the same random experts in several layers, in another order in each."""

    def __init__(self, hidden: int, inter: int, layers: Sequence[int]) -> None:
        super().__init__(hidden, inter)
        self.store = ExpertStore(layers=max(layers) + 1, experts=EXPERTS, hidden=hidden, inter=inter)
        for layer in layers:
            for expert in range(EXPERTS):
                self.store.add_expert(layer, expert, self.refs[(expert + layer) % EXPERTS])


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Of the whole, as a root mean square."""
    return float((got.double() - want).norm() / want.norm())
