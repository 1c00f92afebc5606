"""Runs one planned step through the model. Layer 4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from k2hybrid.engine.batch import BatchBuilder
from k2hybrid.engine.scheduler import StepPlan
from k2hybrid.engine.sequence import Sequence
from k2hybrid.model.batch import Batch


class StepModel(Protocol):
    """What the engine needs of a model, e.g. `Kimi`. The state is the model's own but for `failed_rows`."""

    def begin(self, batch: Batch, /) -> Any:
        """State before the first layer."""

    def forward(self, state: Any, /) -> Any:
        """Run the layers; afterwards `state.failed_rows` holds rows whose results are not to be used."""

    def logits(self, state: Any, /) -> torch.Tensor:
        """fp32 [R, vocab] for the batch's `logit_rows`."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave, by sequence number."""

    logits: Mapping[int, torch.Tensor]  # fp32 [vocab], for shares marked `last`
    failed: frozenset[int]  # sequences with a lost row


# From here on torch's own operations (attention, norms) gain by sharing a step's rows among threads. Below,
# waking a second thread costs more than it does: milliseconds where another process keeps its core busy.
PARALLEL_TOKENS = 64


class StepRunner:
    """Puts plans through `model`. Raises whatever the model raises.

    Args:
        torch_threads: threads of torch's own operations in large steps; small ones, as in decoding, use one.
    """

    def __init__(self, model: StepModel, torch_threads: int = 1) -> None:
        self._model = model
        self._torch_threads = torch_threads
        self._builder = BatchBuilder()

    def run(self, plan: StepPlan, sequences: Mapping[int, Sequence]) -> StepResult:
        """One whole pass over the rows of `plan`."""
        torch.set_num_threads(self._torch_threads if plan.tokens >= PARALLEL_TOKENS else 1)
        batch = self._builder.build(plan, sequences)
        state = self._model.forward(self._model.begin(batch))
        failed = frozenset(
            share.number
            for share, rows in zip(plan.shares, batch.row_slices(), strict=True)
            if any(rows.start <= row < rows.stop for row in state.failed_rows)
        )
        wanted = [share.number for share in plan.shares if share.last]
        rows = self._model.logits(state) if wanted else ()
        return StepResult(dict(zip(wanted, rows, strict=True)), failed)

    def forget(self, sequence: Sequence) -> None:
        """`sequence` runs no more."""
        self._builder.forget(sequence)
