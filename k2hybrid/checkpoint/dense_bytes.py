"""Which dense weights may be of 8 bits, and what a dense weight takes in memory. Pure."""

from __future__ import annotations

import math

from k2hybrid.config import DenseWeights

# What nothing but `LinearKernels.linear` reads, and decides no routing. Of the others kv_b is folded into
# query and output by heads, router and norms are small, and of the embedding a step reads some rows.
DENSE8_ROLES = frozenset(
    {"q_proj", "q_a_proj", "q_b_proj", "kv_a_proj", "o_proj", "lm_head"}
    | {f"{kind}{part}_proj" for kind in ("", "shared_") for part in ("gate", "up", "down")}
)


def weight_bytes(role: str, shape: tuple[int, ...], kind: DenseWeights) -> int:
    """Of a bf16 tensor of the checkpoint, as it lies in memory with dense weights of `kind`."""
    if kind == "bf16" or role not in DENSE8_ROLES:
        return 2 * math.prod(shape)
    return math.prod(shape) + 4 * shape[0]  # an fp32 scale for each row
