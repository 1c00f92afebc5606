"""What computes experts out of card memory: the protocol, the layout of a slot, and plain torch for it.

A slot holds one expert's bytes as its file has them, one part after the other: packed rows of gate, up and
down, then the scales of gate, up and down.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F

from k2hybrid.checkpoint.int4 import dequantize

GROUP = 32  # weights that share a scale


class ExpertCompute(Protocol):
    """Runs routed experts on a device, in the order of its stream, without waiting."""

    def __call__(
        self,
        x: torch.Tensor,
        slots: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        *,
        hidden: int,
        inter: int,
    ) -> torch.Tensor:
        """Σ weight · expert(x) over the chosen slots of each row, fp32 [rows, hidden].

        Args:
            x: bf16 [rows, hidden].
            slots: uint8 [slots, expert_bytes].
            chosen: int32 [rows, k], slot numbers, or −1: none.
            weights: fp32 [rows, k].
        """


def expert_matrices(slot: torch.Tensor, hidden: int, inter: int) -> tuple[torch.Tensor, ...]:
    """gate, up [inter, hidden] and down [hidden, inter] of a slot, uint8 [expert_bytes], as fp32."""
    shapes = ((inter, hidden), (inter, hidden), (hidden, inter))
    sizes = [(torch.int32, out, inner // 8) for out, inner in shapes]
    sizes += [(torch.bfloat16, out, inner // GROUP) for out, inner in shapes]
    parts: list[torch.Tensor] = []
    at = 0
    for dtype, *shape in sizes:
        end = at + math.prod(shape) * dtype.itemsize
        parts.append(slot[at:end].view(dtype).view(shape))
        at = end
    return tuple(dequantize(parts[i], parts[i + 3]) for i in range(3))


def plain_experts(
    x: torch.Tensor,
    slots: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    *,
    hidden: int,
    inter: int,
) -> torch.Tensor:
    """`ExpertCompute` in torch: unpacks whole matrices, and looks at `chosen`, which waits for a real card.

    A row's experts are added in ascending slot number. As on the CPU, all is fp32 but the SwiGLU output,
    which is rounded to bf16 once.
    """
    out = torch.zeros(x.shape[0], hidden, dtype=torch.float32, device=x.device)
    for slot in torch.unique(chosen[chosen >= 0]).tolist():
        gate, up, down = expert_matrices(slots[slot], hidden, inter)
        row, column = (chosen == slot).nonzero(as_tuple=True)
        inputs = x[row].float()
        between = (F.silu(inputs @ gate.T) * (inputs @ up.T)).bfloat16().float()
        out.index_add_(0, row, (between @ down.T) * weights[row, column, None])
    return out
