"""A logits mask that forbids a fixed set of tokens. Layer 5."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class ForbidTokens:
    """A `types.LogitsMask`: the given tokens are never chosen."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self._tokens = sorted(set(tokens))

    def apply(self, logits: torch.Tensor) -> None:
        """Set the tokens' entries of `logits` [vocab] to −inf, in place."""
        logits[self._tokens] = float("-inf")

    def accept(self, token: int) -> None:
        """Nothing to remember: the set does not change."""
