"""A linear over 8-bit weights: bf16 activations times int8 or e4m3 values, one fp32 scale an output.

Few rows read every weight once and the memory's rate decides: small column tiles, and K in parts so that
every multiprocessor reads. Many rows share a weight and the tensor cores decide: large tiles, which also
share the work of making bf16 of bytes. Values are exact in bf16, so products are too; the scale multiplies
the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from k2hybrid.errors import KernelError
from k2hybrid.kernels.card import Card, card_of, expect

VALUE_TYPES = {"int8": torch.int8, "fp8": torch.uint8}


class Weight(Protocol):
    """W[n, k] = scale[n] · value[n, k]."""

    @property
    def values(self) -> torch.Tensor:
        """int8 [N, K], or uint8 [N, K] with the codes of e4m3 (those of NaN read as ±480)."""

    @property
    def scale(self) -> torch.Tensor:
        """fp32 [N]."""

    @property
    def kind(self) -> str:
        """ "int8" or "fp8"."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How the kernel is compiled: rows of x, outputs, and columns of a step; warps, pipeline stages."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


FEW = Tile(16, 32, 256, 4, 3)
MANY = Tile(128, 128, 64, 8, 3)
FEW_ROWS = 32  # two tiles of FEW read a weight twice, the second time from the L2 cache


def choose_tile(rows: int) -> Tile:
    """By the rows of x alone."""
    return FEW if rows <= FEW_ROWS else MANY


def choose_parts(tile: Tile, rows: int, outputs: int, inner: int, card: Card) -> int:
    """Parts of K: about four blocks a multiprocessor where rows are few, none shorter than two steps."""
    if tile is not FEW:
        return 1
    blocks = -(-outputs // tile.columns) * -(-rows // tile.rows)
    return max(min(4 * card.multiprocessors // blocks, inner // (2 * tile.inner)), 1)


def linear8(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """y[t, n] = scale[n] · Σ x[t, k] · value[n, k].

    Args:
        x: bf16 [T, K], K a multiple of 4; rows may be strided.
        weight: [N, K].

    Returns:
        fp32 [T, N].

    Parts of K are summed in their order, and their number depends on the sizes and the card: results of equal
    shapes are the same bits on one card. Memory is torch's, under capture the graph's own.

    Raises:
        KernelError: a tensor of another type or shape, or no Triton.
    """
    rows, inner = x.shape
    values, scale, kind = weight.values, weight.scale, weight.kind
    outputs = values.shape[0]
    if inner % 4 or x.dtype != torch.bfloat16 or (rows and x.stride(1) != 1):
        raise KernelError(
            f"x must be bf16 [rows, a multiple of 4] with adjoining columns; it is {x.dtype} {list(x.shape)}"
        )
    if kind not in VALUE_TYPES:
        raise KernelError(f"8-bit weights are int8 or fp8, not {kind!r}")
    expect(values, "values", VALUE_TYPES[kind], (outputs, inner))
    expect(scale, "scale", torch.float32, (outputs,))
    card = card_of(x, values, scale)
    if rows == 0:
        return torch.empty((0, outputs), dtype=torch.float32, device=x.device)
    from k2hybrid.kernels.jit import linear8 as jit

    tile = choose_tile(rows)
    parts = choose_parts(tile, rows, outputs, inner, card)
    step = -(-inner // (parts * tile.inner)) * tile.inner
    parts = -(-inner // step)
    out = torch.empty((parts, rows, outputs), dtype=torch.float32, device=x.device)
    jit.linear[-(-outputs // tile.columns), -(-rows // tile.rows), parts](
        x,
        values.view(torch.int32),
        scale,
        out,
        rows,
        outputs,
        inner,
        x.stride(0),
        step,
        FP8=kind == "fp8",
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        INNER=tile.inner,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out[0] if parts == 1 else out.sum(0)
