"""What kernels must know of the card they run on, and whether they can run at all."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

from k2hybrid.errors import KernelError


@dataclass(frozen=True, slots=True)
class Card:
    """What tiles and grids are chosen by."""

    multiprocessors: int
    major: int  # of the compute capability
    shared_bytes: int  # that one block may have


SMALLEST_SHARED = 101_376  # of compute capability 8.6, 8.9 and 12.0; 8.0 has 166,912, 9.0 and 10.0 232,448
# What Triton's interpreter is told to play: so many multiprocessors that every grid has several blocks.
EMULATED = Card(multiprocessors=12, major=8, shared_bytes=SMALLEST_SHARED)


def card_of(*tensors: torch.Tensor) -> Card:
    """The card on which all tensors lie, or `EMULATED` for tensors of the CPU.

    Raises:
        KernelError: Triton is not installed; tensors lie apart; or they lie on the CPU and Triton compiles.
    """
    device = tensors[0].device
    if any(tensor.device != device for tensor in tensors):
        places = ", ".join(sorted({str(tensor.device) for tensor in tensors}))
        raise KernelError(f"a kernel's tensors must lie on one device; these lie on {places}")
    _require_triton(device.type)
    return EMULATED if device.type == "cpu" else _card(device.index or 0)


@functools.cache
def _card(index: int) -> Card:
    found: Any = torch.cuda.get_device_properties(index)
    return Card(found.multi_processor_count, found.major, found.shared_memory_per_block_optin)


@functools.cache
def _require_triton(device_type: str) -> None:
    if importlib.util.find_spec("triton") is None:
        raise KernelError(
            "device kernels need Triton, which is not installed: it comes with a CUDA build of torch "
            "(pip install torch), or run: pip install triton"
        )
    if device_type == "cpu":
        triton: Any = importlib.import_module("triton")
        if not triton.knobs.runtime.interpret:
            raise KernelError(
                "a kernel was given tensors of the CPU: Triton runs those in its interpreter alone, "
                "with TRITON_INTERPRET=1 in the environment before it is first imported"
            )


def expect(tensor: torch.Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise KernelError unless `tensor` is contiguous and has this type and shape."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        raise KernelError(
            f"{name} must be contiguous {dtype} {list(shape)}; it is "
            f"{'' if tensor.is_contiguous() else 'strided '}{tensor.dtype} {list(tensor.shape)}"
        )


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
