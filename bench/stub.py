"""Models that say what they are told, with or without computing: for benches of all that is not the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from k2hybrid.engine.step import StepModel
from k2hybrid.model.batch import Batch


@dataclass(slots=True)
class _State:
    batch: Batch
    inner: Any = None
    failed_rows: set[int] = field(default_factory=set)


class Scripted:
    """Says a script from the next prompt's end on; with `inner`, computes as well.

    One sequence at a time, or several with prompts of one length that are to say the same. Beyond the script
    it says token 0. While `computes` is false nothing is computed.
    """

    def __init__(self, vocab_size: int, inner: StepModel | None = None) -> None:
        self._inner = inner
        self.computes = inner is not None
        self._said = torch.zeros(vocab_size)
        self._position: int | None = None
        self._script: list[int] = []
        self.tokens_run = 0

    def play(self, script: Sequence[int]) -> None:
        """What to say after the prompt whose logits are asked for next."""
        self._position, self._script = None, list(script)

    def begin(self, batch: Batch) -> _State:
        self.tokens_run += len(batch.ids)
        return _State(batch, self._inner.begin(batch) if self._inner and self.computes else None)

    def forward(self, state: _State, until: int) -> _State:
        if self._inner and state.inner:
            state.inner = self._inner.forward(state.inner, until)
        return state

    def logits(self, state: _State) -> torch.Tensor:
        if self._inner and state.inner:
            self._inner.logits(state.inner)
        rows = state.batch.logit_rows
        out = torch.zeros(len(rows), len(self._said))
        for row, position in enumerate(state.batch.positions[rows].tolist()):
            if self._position is None:
                self._position = position
            at = position - self._position
            out[row, self._script[at] if 0 <= at < len(self._script) else 0] = 60.0
        return out


class Silent:
    """A model that costs nothing: the same logits for every row."""

    def __init__(self, vocab_size: int, rows: int) -> None:
        self._logits = torch.zeros(rows, vocab_size)
        self._logits[:, 5] = 9.0

    def begin(self, batch: Batch) -> _State:
        return _State(batch)

    def forward(self, state: _State, until: int) -> _State:
        return state

    def logits(self, state: _State) -> torch.Tensor:
        return self._logits[: state.batch.logit_rows.numel()]
