"""The routed experts in plain torch, from dequantized weights: an oracle, and the fp32 test dtype.

It keeps the contract of the real hand-off: rows go to their experts, −1 is padding, the sum runs in ascending
expert id in fp32, and in bf16 the SwiGLU output is rounded to bf16 once, between the halves.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from k2hybrid.checkpoint.int4 import dequantize
from k2hybrid.errors import EngineError
from k2hybrid.types import ExpertRef, Int4Ref, TensorRef, TicketStats

KEPT_BYTES = 1 << 20  # matrices up to this size stay unpacked: those of tests; a true-size one has 59 MB

Matrices = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

NO_COST = TicketStats(bytes_read=0, misses=0, wait_ms=0.0, busy_ms=0.0)


@dataclass(frozen=True, slots=True)
class ReferenceTicket:
    """A hand-off that was worked off at once."""

    out: torch.Tensor
    failed_rows: tuple[int, ...] = ()
    stats: TicketStats = NO_COST

    def collect(self) -> torch.Tensor:
        return self.out


class ReferenceExperts:
    """An `ExpertSink` and the `RoutedExperts` over what it was given. The refs' bytes must stay mapped.

    dtype bfloat16: bf16 activations times fp32 weights (nibble − 8) · scale, and the SwiGLU output is rounded
    to bf16. float32: nothing is rounded.
    """

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype
        self._refs: dict[tuple[int, int], ExpertRef] = {}
        self._unpacked: dict[tuple[int, int], Matrices] = {}

    def add_expert(self, layer: int, expert: int, ref: ExpertRef) -> None:
        """Take one expert; each (layer, expert) once."""
        if (layer, expert) in self._refs:
            raise EngineError(f"expert {expert} of layer {layer} was added twice")
        self._refs[layer, expert] = ref

    def submit(
        self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> ReferenceTicket:
        """x [rows, hidden], ids int32 [rows, top_k] (−1: padding), weights fp32 [rows, top_k]."""
        out = torch.zeros(x.shape, dtype=torch.float32)
        for expert in sorted(set(ids.flatten().tolist()) - {-1}):
            row, column = (ids == expert).nonzero(as_tuple=True)
            out[row] += self.expert(layer, expert, x[row].float()) * weights[row, column, None]
        return ReferenceTicket(out)

    def expert(self, layer: int, expert: int, x: torch.Tensor) -> torch.Tensor:
        """down(silu(gate(x)) · up(x)) of one expert, fp32 [rows, hidden] -> fp32 [rows, hidden]."""
        if (layer, expert) not in self._refs:
            raise EngineError(f"there is no expert {expert} in layer {layer}")
        ref = self._refs[layer, expert]
        gate, up, down = self._unpacked.get((layer, expert)) or self._unpack(layer, expert, ref)
        return self.round(F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def _unpack(self, layer: int, expert: int, ref: ExpertRef) -> Matrices:
        matrices = _weight(ref.gate), _weight(ref.up), _weight(ref.down)
        if matrices[0].nbytes <= KEPT_BYTES:
            self._unpacked[layer, expert] = matrices
        return matrices

    def round(self, h: torch.Tensor) -> torch.Tensor:
        """fp32 -> fp32 with the values that the dtype can hold."""
        return h.to(self.dtype).float()


def _weight(ref: Int4Ref) -> torch.Tensor:
    return dequantize(_tensor(ref.packed, torch.int32), _tensor(ref.scale, torch.bfloat16))


def _tensor(ref: TensorRef, dtype: torch.dtype) -> torch.Tensor:
    """A copy of a mapped tensor: alignment in a file is any multiple of 2."""
    data = bytearray(ctypes.string_at(ref.address, ref.nbytes))
    return torch.frombuffer(data, dtype=dtype).view(ref.shape)
