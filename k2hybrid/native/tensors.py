"""Tensors at the border: what they must be, and views of memory that the extension owns."""

from __future__ import annotations

import ctypes

import torch

from k2hybrid.errors import NativeError
from k2hybrid.types import LinearWeight, Weight8

GivenWeight = tuple[str, int, int, int, int, int, int, int]

PAGE_ROWS = 64  # of `cache.pages`


def require_bf16(name: str, tensor: torch.Tensor, dims: int) -> None:
    """bf16 on the CPU, its last dimension contiguous; else `NativeError`."""
    if tensor.dtype != torch.bfloat16 or tensor.device.type != "cpu":
        raise NativeError(f"{name} must be bfloat16 on the CPU, not {tensor.dtype} on {tensor.device}")
    if tensor.dim() != dims or (tensor.shape[-1] > 1 and tensor.stride(-1) != 1):
        raise NativeError(
            f"{name} must have {dims} dimensions, the last contiguous; shape {list(tensor.shape)}, "
            f"strides {list(tensor.stride())}"
        )


def require_fp32(name: str, x: torch.Tensor, dims: int, *, whole: bool = False) -> None:
    """fp32 on the CPU, its last dimension contiguous, or with `whole` all of it; else `NativeError`."""
    fits = x.dtype == torch.float32 and x.device.type == "cpu" and x.dim() == dims
    if not fits or (not x.is_contiguous() if whole else x.shape[-1] > 1 and x.stride(-1) != 1):
        raise NativeError(
            f"{name} must be contiguous float32 of {dims} dimensions on the CPU, not {x.dtype} "
            f"{list(x.shape)}, strides {list(x.stride())}, on {x.device}"
        )


def require_weight8(weight: Weight8) -> None:
    """Values [N, K] of its kind and a scale for each row, on the CPU; else `NativeError`."""
    values, scale = weight.values, weight.scale
    dtype = {"int8": torch.int8, "fp8": torch.uint8}.get(weight.kind)
    if values.dtype != dtype or values.device.type != "cpu":
        raise NativeError(f"weight of {weight.kind!r} has values of {values.dtype} on {values.device}")
    if values.dim() != 2 or not values.shape[1] or (values.shape[1] > 1 and values.stride(1) != 1):
        raise NativeError(
            f"values must have 2 dimensions, the last contiguous and not empty; shape {list(values.shape)}, "
            f"strides {list(values.stride())}"
        )
    fits = scale.dtype == torch.float32 and scale.device == values.device and scale.is_contiguous()
    if not fits or scale.shape != values.shape[:1]:
        raise NativeError(
            f"scale must be contiguous float32 [{values.shape[0]}] beside the values, not {scale.dtype} "
            f"{list(scale.shape)} on {scale.device}"
        )


def require_heads(what: str, x: torch.Tensor, weight: torch.Tensor, contracted: int) -> None:
    """x bf16 [T, H, K] and weight [H, …] with K in dimension `contracted`; else `NativeError`."""
    require_bf16("x", x, 3)
    require_bf16("weight", weight, 3)
    if x.shape[1] != weight.shape[0] or x.shape[2] != weight.shape[contracted]:
        raise NativeError(f"{what}: x {list(x.shape)} does not fit weight {list(weight.shape)}")


def given_weight(name: str, weight: LinearWeight) -> GivenWeight:
    """A weight [N, K], or bf16 [H, N, K], as the bindings of whole steps take it; else `NativeError`.

    Kind, addresses of values and scales, heads, rows, columns, strides of heads and rows.
    """
    if isinstance(weight, Weight8):
        require_weight8(weight)
        values = weight.values
        return (
            weight.kind, values.data_ptr(), weight.scale.data_ptr(), 1, *values.shape, 0, values.stride(0)
        )  # fmt: skip
    require_bf16(name, weight, weight.dim())
    if weight.dim() == 2:
        return "bf16", weight.data_ptr(), 0, 1, *weight.shape, 0, weight.stride(0)
    heads, rows, columns = weight.shape
    return "bf16", weight.data_ptr(), 0, heads, rows, columns, weight.stride(0), weight.stride(1)


def view_of(owner: object, address: int, dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
    """Memory of `owner` as [rows, columns]."""
    nbytes = rows * columns * dtype.itemsize
    buffer = (ctypes.c_uint8 * nbytes).from_address(address)
    buffer._owner = owner  # type: ignore[attr-defined]  # the memory lives as long as a view of it
    return torch.frombuffer(buffer, dtype=dtype).view(rows, columns)
