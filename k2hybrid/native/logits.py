"""What is done to logits in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from k2hybrid.errors import NativeError
from k2hybrid.native.extension import ERRORS, EXTENSION


def mask_logits(
    logits: torch.Tensor, plain: int, allowed: bytes | None, *, text: bool, specials: Sequence[int]
) -> None:
    """Set forbidden entries of `logits` (fp32 [count], on the CPU) to −inf, in place.

    Args:
        plain: ids below are plain tokens, the others specials.
        allowed: a bit per plain token, the lowest bit of a byte first; None: all of them or none, as `text`.
        specials: those that stay.

    Ten times as fast as torch's `masked_fill_` with as random a mask.
    """
    if logits.dtype != torch.float32 or logits.device.type != "cpu" or logits.dim() != 1:
        raise NativeError(f"logits must be one row of float32 on the CPU, not {logits.dtype}")
    if not logits.is_contiguous():
        raise NativeError("logits must be contiguous")
    with ERRORS:
        EXTENSION.mask_logits(logits.data_ptr(), logits.numel(), plain, allowed, text, specials)
