"""Dense weights of 8 bits: made from bf16, a scale for each output row, and what they mean in plain torch.

int8: value = round(w / scale), scale = amax / 127. fp8: value = e4m3(w / scale), scale = amax / 448, the
largest e4m3, so that nothing becomes NaN. Both round to nearest even; amax is a row's largest magnitude.
"""

from __future__ import annotations

import mmap

import torch

from k2hybrid.errors import TensorError
from k2hybrid.types import Weight8, Weight8Kind

_LARGEST: dict[str, float] = {"int8": 127.0, "fp8": 448.0}
# Below it a scale would lose bits of its own; rows as small as that get fewer steps instead.
_LEAST_SCALE = torch.finfo(torch.float32).tiny
_SLICE_BYTES = 32 << 20  # of a matrix in fp32
_HUGE_PAGE = 2 << 20


def quantize(weight: torch.Tensor, kind: Weight8Kind, what: str) -> Weight8:
    """Round a bf16 or fp32 matrix [N, K], some rows at a time: beside the result little memory is needed.

    |w − scale · value| is at most scale / 2 for int8; for fp8 |w| / 16, or scale · 2⁻¹⁰ where that is more.
    A row of zeros has scale 0.

    Args:
        what: names it in an error.

    Raises:
        TensorError: a weight is not finite.
    """
    rows, columns = weight.shape
    dtype = torch.int8 if kind == "int8" else torch.uint8
    values = _room(rows * columns).view(dtype).view(rows, columns)
    scale = torch.empty(rows)
    step = max(1, _SLICE_BYTES // (4 * columns))
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        some = weight[part].to(torch.float32, copy=True)
        most = some.abs().amax(1)
        if not most.isfinite().all():
            raise TensorError(f"{what} holds NaN or infinity and cannot be quantized; use bf16 dense weights")
        scale[part] = torch.where(most == 0, 0.0, (most / _LARGEST[kind]).clamp_min(_LEAST_SCALE))
        some.div_(torch.where(most == 0, 1.0, scale[part])[:, None])
        some.clamp_(-_LARGEST[kind], _LARGEST[kind])  # a quotient may be rounded up
        if kind == "int8":
            values[part] = some.round_()
        else:
            values[part] = some.to(torch.float8_e4m3fn).view(torch.uint8)
    return Weight8(values, scale, kind)


def dequantize(weight: Weight8) -> torch.Tensor:
    """fp32 [N, K], each product rounded once."""
    values = weight.values if weight.kind == "int8" else weight.values.view(torch.float8_e4m3fn)
    return values.float() * weight.scale[:, None]


def _room(nbytes: int) -> torch.Tensor:
    """uint8 [nbytes], in huge pages where it is large and the kernel has them; freed with the tensor."""
    if nbytes < _HUGE_PAGE:
        return torch.empty(nbytes, dtype=torch.uint8)
    room = mmap.mmap(-1, nbytes)
    room.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(room, dtype=torch.uint8)
