"""The INT4 format of the experts, in plain torch: the reference definition that kernels are tested against.

compressed-tensors "pack-quantized", symmetric, groups along the in-features: element i of a row sits in
word i // 8, bits 4·(i % 8), as q + 8 (offset binary); `w[o, i] = q[o, i] · scale[o, i // group]`. So byte b
of a row, little-endian, holds element 2b in its low nibble and 2b + 1 in its high one.
"""

from __future__ import annotations

import torch

from k2hybrid.errors import TensorError

WORD_NIBBLES = 8


def pack(q: torch.Tensor) -> torch.Tensor:
    """int8 [out, in] with values −8…7 → int32 [out, in/8].

    Raises:
        TensorError: in is not a multiple of 8, or a value does not fit four bits.
    """
    if q.dtype != torch.int8 or q.ndim != 2 or q.shape[1] % WORD_NIBBLES:
        raise TensorError(f"pack takes int8 [out, multiple of 8], not {q.dtype} {list(q.shape)}")
    if q.numel() and (int(q.min()) < -8 or int(q.max()) > 7):
        raise TensorError("pack takes values in −8…7")
    nibbles = (q + 8).view(torch.uint8)
    return (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).contiguous().view(torch.int32)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """int32 [out, in/8] → int8 [out, in] with values −8…7.

    Raises:
        TensorError: not int32 [out, words].
    """
    if packed.dtype != torch.int32 or packed.ndim != 2:
        raise TensorError(f"unpack takes int32 [out, in/8], not {packed.dtype} {list(packed.shape)}")
    data = packed.contiguous().view(torch.uint8)
    return torch.stack((data & 15, data >> 4), dim=-1).flatten(1).view(torch.int8) - 8


def quantize(weight: torch.Tensor, group_size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a float [out, in] matrix → packed int32 [out, in/8], scale bf16 [out, in/group].

    q lies in −7…7 and a group's scale is amax/7.

    The rounding uses the scale as stored in bf16, so that the error of an element stays at half a step
    (a little more at the group's largest, where bf16 rounded the scale down).

    Raises:
        TensorError: in is not a multiple of `group_size`, or `group_size` not of 8.
    """
    if weight.ndim != 2 or group_size % WORD_NIBBLES or weight.shape[1] % group_size:
        raise TensorError(f"quantize takes [out, multiple of {group_size}], not {list(weight.shape)}")
    groups = weight.float().reshape(weight.shape[0], -1, group_size)
    scale = (groups.abs().amax(-1) / 7).to(torch.bfloat16)
    step = torch.where(scale == 0, 1.0, scale.float()).unsqueeze(-1)  # an all-zero group stays zero
    q = (groups / step).round().clamp(-7, 7).to(torch.int8)
    return pack(q.flatten(1)), scale


def dequantize(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """int32 [out, in/8], bf16 [out, in/group] → fp32 [out, in], products not rounded further.

    Raises:
        TensorError: the two do not belong together.
    """
    q = unpack(packed)
    if scale.ndim != 2 or scale.shape[0] != q.shape[0] or not scale.shape[1] or q.shape[1] % scale.shape[1]:
        raise TensorError(f"scale {list(scale.shape)} does not divide weights {list(q.shape)} into groups")
    return (q.float().reshape(*scale.shape, -1) * scale.float().unsqueeze(-1)).flatten(1)
