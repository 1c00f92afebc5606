"""A model over mapped shards that may shrink or fail: what was read of lost bytes reaches no answer. Layer 5.

Routed experts tell by themselves which rows they failed. Here is the rest: weights that every token needs,
the embedding, and what was read as zeros before anybody knew.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from k2hybrid.checkpoint.watch import FileWatch, Range, overlaps
from k2hybrid.engine.step import StepModel
from k2hybrid.errors import ShardIndexError, WeightReadError
from k2hybrid.model.batch import Batch
from k2hybrid.types import RoutedExperts, Ticket


class Handoffs:
    """Which rows of a pass went to which experts: ids int32 [rows, top_k] by layer."""

    def __init__(self) -> None:
        self._ids: list[tuple[int, torch.Tensor]] = []

    def add(self, layer: int, ids: torch.Tensor) -> None:
        """`ids` is kept, not copied."""
        self._ids.append((layer, ids))

    def clear(self) -> None:
        """What follows is another pass."""
        self._ids.clear()

    def rows_of(self, experts: Collection[tuple[int, int]]) -> set[int]:
        """Rows that went to one of these (layer, expert)."""
        rows: set[int] = set()
        for layer, ids in self._ids:
            wanted = torch.tensor([expert for at, expert in experts if at == layer], dtype=ids.dtype)
            rows.update(torch.isin(ids, wanted).any(1).nonzero().flatten().tolist())
        return rows


class NotedExperts:
    """`RoutedExperts` that adds what it is asked to `handoffs`."""

    def __init__(self, experts: RoutedExperts, handoffs: Handoffs) -> None:
        self._experts = experts
        self._handoffs = handoffs

    def submit(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Ticket:
        """See `RoutedExperts.submit`."""
        self._handoffs.add(layer, ids)
        return self._experts.submit(layer, x, ids, weights)


class WatchedModel:
    """A `StepModel` whose passes fail, or lose rows, where their weights were lost.

    Args:
        model: kept as `model`. Without `handoffs` its states must hold their batch.
        embedding: of `model`, [vocab, hidden], where it is read.
        handoffs: filled by the experts that `model` asks; None: they do not tell, so any row may be lost.

    Raises:
        ShardIndexError: bytes were lost or written already, while the model was built.
    """

    def __init__(
        self, model: StepModel, watch: FileWatch, embedding: torch.Tensor, handoffs: Handoffs | None
    ) -> None:
        self.model = model
        self._watch = watch
        self._embedding = embedding
        self._handoffs = handoffs
        if watch.look() or not watch.whole:
            raise ShardIndexError(f"a shard changed while it was opened: {watch.problem}, then try again")

    def begin(self, batch: Batch, /) -> Any:
        """See `StepModel.begin`; files that are whole again are mapped again before."""
        self._watch.restore()
        state = self.model.begin(batch)
        state.failed_rows.update(self._lost_tokens(batch.ids, self._watch.look()))
        return state

    def forward(self, state: Any, until: int, /) -> Any:
        """See `StepModel.forward`.

        Raises:
            WeightReadError: weights are lost that every token needs.
        """
        if self._handoffs is not None:
            self._handoffs.clear()
        try:
            state = self.model.forward(state, until)
        except Exception as problem:  # perhaps for this very reason
            self._require_dense(self._watch.look(), problem)
            raise
        silently = self._watch.look()
        self._require_dense(silently)
        if silently and (lost := self._watch.experts_at(silently)):
            everyone = range(len(state.batch.ids))
            state.failed_rows.update(everyone if self._handoffs is None else self._handoffs.rows_of(lost))
        return state

    def logits(self, state: Any, /) -> torch.Tensor:
        """See `StepModel.logits`.

        Raises:
            WeightReadError: as `forward`.
        """
        try:
            logits = self.model.logits(state)
        except Exception as problem:
            self._require_dense(self._watch.look(), problem)
            raise
        self._require_dense(self._watch.look())
        return logits

    def _require_dense(self, silently: Collection[Range], cause: Exception | None = None) -> None:
        if self._watch.dense_failed(silently):
            raise WeightReadError(
                f"weights that every request needs could not be read: {self._watch.problem}, and requests "
                "are served again"
            ) from cause

    def _lost_tokens(self, ids: torch.Tensor, silently: Collection[Range]) -> list[int]:
        if self._watch.whole and not silently:
            return []
        start, row_bytes = self._embedding.data_ptr(), self._embedding[0].nbytes
        return [
            row
            for row, token in enumerate(ids.tolist())
            if self._watch.failed(start + token * row_bytes, row_bytes)
            or overlaps(silently, start + token * row_bytes, row_bytes)
        ]
