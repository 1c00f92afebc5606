"""`mask_logits` against torch, for every length of a last byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from k2hybrid.errors import NativeError
from k2hybrid.native.logits import mask_logits

SPECIALS = 7


def random_row(rng: np.random.Generator, count: int) -> torch.Tensor:
    logits = torch.from_numpy(rng.standard_normal(count).astype(np.float32))
    if count > 3:
        logits[1], logits[2], logits[3] = float("nan"), float("inf"), -0.0
    return logits


@pytest.mark.parametrize("plain", [0, 1, 7, 8, 9, 31, 64, 163_840 - 256])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_forbidden_entries_become_minus_infinity(plain: int, share: float) -> None:
    rng = np.random.default_rng(plain)
    allowed = rng.random(plain + SPECIALS) < share
    bits = np.packbits(allowed[:plain], bitorder="little").tobytes()
    logits = random_row(rng, plain + SPECIALS)
    expected = logits.clone().masked_fill_(torch.from_numpy(~allowed), -torch.inf)
    specials = [int(token) for token in np.flatnonzero(allowed) if token >= plain]
    # More bits than needed are not looked at.
    mask_logits(logits, plain, bits + b"\x00", text=False, specials=specials)
    assert torch.equal(logits.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("text", [True, False])
def test_all_plain_entries_or_none(text: bool) -> None:
    logits = random_row(np.random.default_rng(1), 100 + SPECIALS)
    expected = logits.clone()
    expected[100:] = -torch.inf
    expected[103] = logits[103]
    if not text:
        expected[:100] = -torch.inf
    mask_logits(logits, 100, None, text=text, specials=(103,))
    assert torch.equal(logits.view(torch.int32), expected.view(torch.int32))


def test_what_does_not_fit_is_refused() -> None:
    def mask(logits: torch.Tensor, plain: int = 9, specials: tuple[int, ...] = ()) -> None:
        mask_logits(logits, plain, b"\xff", text=False, specials=specials)

    with pytest.raises(NativeError, match="fewer bits"):
        mask(torch.zeros(9))
    with pytest.raises(NativeError, match="more plain tokens"):
        mask(torch.zeros(7), plain=8)
    for token in (-1, 7, 9):
        with pytest.raises(NativeError, match="no special"):
            mask(torch.zeros(9), plain=8, specials=(token,))
    with pytest.raises(NativeError, match="float32"):
        mask(torch.zeros(8, dtype=torch.float64))
    with pytest.raises(NativeError, match="contiguous"):
        mask(torch.zeros(16)[::2])
