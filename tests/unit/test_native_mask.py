"""`mask_logits` against torch, for every length of a last byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from k2hybrid.errors import NativeError
from k2hybrid.native import mask_logits


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 31, 64, 163_840 - 256])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_forbidden_entries_become_minus_infinity(count: int, share: float) -> None:
    rng = np.random.default_rng(count)
    allowed = rng.random(count) < share
    bits = np.packbits(allowed, bitorder="little").tobytes()
    logits = torch.from_numpy(rng.standard_normal(count).astype(np.float32))
    if count > 3:
        logits[1], logits[2], logits[3] = float("nan"), float("inf"), -0.0
    expected = logits.clone().masked_fill_(torch.from_numpy(~allowed), -torch.inf)
    mask_logits(logits, bits + b"\x00")  # more bits than needed are not looked at
    assert torch.equal(logits.view(torch.int32), expected.view(torch.int32))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(NativeError, match="fewer bits"):
        mask_logits(torch.zeros(9), b"\xff")
    with pytest.raises(NativeError, match="float32"):
        mask_logits(torch.zeros(8, dtype=torch.float64), b"\xff")
    with pytest.raises(NativeError, match="contiguous"):
        mask_logits(torch.zeros(16)[::2], b"\xff")
