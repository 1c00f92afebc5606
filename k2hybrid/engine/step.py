"""Runs planned rows through the model: at once, or some parts of layers at a time. Layer 4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from k2hybrid.engine.batch import BatchBuilder
from k2hybrid.engine.cost import LARGE_ROWS, Rows
from k2hybrid.engine.scheduler import Share
from k2hybrid.engine.sequence import Sequence
from k2hybrid.model.batch import Batch
from k2hybrid.model.sampler import Extremes, Row, extremes


class StepModel(Protocol):
    """What the engine needs of a model, e.g. `Kimi`. The state is the model's own but for `failed_rows`."""

    def begin(self, batch: Batch, /) -> Any:
        """State before the first layer."""

    def forward(self, state: Any, until: int, /) -> Any:
        """Run parts up to, without, `until`; `state.failed_rows` holds rows not to be used any more.

        Each layer has the same number of parts. Other states may run between two calls.
        """

    def logits(self, state: Any, /) -> torch.Tensor:
        """fp32 [R, vocab] for the batch's `logit_rows`, after the last part."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a pass gave, by sequence number."""

    logits: Mapping[int, Row]  # fp32 [vocab], for shares marked `last`
    extremes: Mapping[int, Extremes]  # of these
    failed: frozenset[int]  # sequences with a lost row


@dataclass(slots=True)
class Pass:
    """Rows on their way through the layers; `part` runs next. Those that are done took `took_us`."""

    shares: tuple[Share, ...]
    rows: tuple[Rows, ...]
    tokens: int
    batch: Batch
    state: Any
    part: int = 0
    took_us: float = 0.0


class StepRunner:
    """Puts rows through `model`. Raises whatever the model raises.

    Args:
        parts: of all layers of the model together.
        torch_threads: threads of torch's own operations in large passes; small ones, as in decoding, use one:
            waking a second costs more than it does, milliseconds where another process keeps its core busy.
    """

    def __init__(self, model: StepModel, parts: int, torch_threads: int = 1) -> None:
        self.parts = parts
        self._model = model
        self._torch_threads = torch_threads
        self._builder = BatchBuilder()

    def begin(self, shares: tuple[Share, ...], sequences: Mapping[int, Sequence]) -> Pass:
        """A pass before its first part; the sequences' pages must cover it."""
        batch = self._builder.build(shares, sequences)
        rows = tuple([Rows(s.tokens, sequences[s.number].computed + s.tokens) for s in shares])
        return Pass(shares, rows, sum([r.count for r in rows]), batch, self._model.begin(batch))

    def advance(self, run: Pass, parts: int) -> bool:
        """Run so many parts more, as far as there are; whether it was the last."""
        torch.set_num_threads(self._torch_threads if run.tokens >= LARGE_ROWS else 1)
        until = min(self.parts, run.part + parts)
        run.state = self._model.forward(run.state, until)
        run.part = until
        return until == self.parts

    def finish(self, run: Pass) -> StepResult:
        """Logits and losses, after the last part."""
        lost = run.state.failed_rows
        failed = frozenset(
            share.number
            for share, rows in zip(run.shares, run.batch.row_slices(), strict=True)
            if lost and any(rows.start <= row < rows.stop for row in lost)
        )
        wanted = [share.number for share in run.shares if share.last]
        if not wanted:
            return StepResult({}, {}, failed)
        rows: Row = self._model.logits(run.state).numpy()
        return StepResult(
            dict(zip(wanted, rows, strict=True)), dict(zip(wanted, extremes(rows), strict=True)), failed
        )

    def forget(self, sequence: Sequence) -> None:
        """`sequence` runs no more."""
        self._builder.forget(sequence)
