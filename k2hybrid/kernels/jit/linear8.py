"""The kernel of `linear8`."""

from __future__ import annotations

import importlib
from typing import Any

from k2hybrid.kernels.jit.bits import E4M3_UNIT, dot, e4m3, int8, to_bf16, to_fp32

triton: Any = importlib.import_module("triton")
tl: Any = importlib.import_module("triton.language")


@triton.jit
def linear(
    x,
    words,
    scale,
    out,
    rows,
    N,
    K,
    x_stride,
    step,
    FP8: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Grid (column tiles, row tiles, parts of K): `out` fp32 [parts, rows, N].

    A part is `step` columns of x long, a multiple of INNER.
    """
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.program_id(2) * step
    end = tl.minimum(start + step, K)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    of_x = x + row.to(tl.int64)[:, None] * x_stride
    of_words = words + column.to(tl.int64)[:, None] * (K // 4)
    for at in range(start, end, INNER):
        inner = at + tl.arange(0, INNER)
        word = at + 4 * tl.arange(0, INNER // 4)
        a = tl.load(of_x + inner[None, :], mask=(row < rows)[:, None] & (inner < K)[None, :], other=0.0)
        mask = (column < N)[:, None] & (word < K)[None, :]
        w = tl.load(of_words + (word // 4)[None, :], mask=mask, other=0)
        if FP8:
            values = to_bf16(to_fp32(e4m3(w)) * E4M3_UNIT)
        else:
            values = int8(w)
        acc = dot(a, tl.trans(values), acc)
    factor = tl.load(scale + column, mask=column < N, other=0.0)
    at = (tl.program_id(2) * rows + row).to(tl.int64)[:, None] * N + column[None, :]
    tl.store(out + at, acc * factor[None, :], mask=(row < rows)[:, None] & (column < N)[None, :])
