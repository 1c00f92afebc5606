"""Shares of sequences → the model's Batch. Layer 4."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from k2hybrid.engine.scheduler import Share
from k2hybrid.engine.sequence import Sequence
from k2hybrid.model.batch import Batch, Span


class BatchBuilder:
    """Builds batches; keeps each sequence's page table as a tensor until it changes."""

    def __init__(self) -> None:
        self._tables: dict[int, tuple[int, torch.Tensor]] = {}  # number → (pages_version, table)

    def build(self, shares: Iterable[Share], sequences: Mapping[int, Sequence]) -> Batch:
        """Rows of `shares` in their order; logits are asked for the last row of each share marked `last`."""
        ids: list[int] = []
        positions: list[int] = []
        spans = []
        logit_rows = []
        for share in shares:
            sequence = sequences[share.number]
            start, stop = sequence.computed, sequence.computed + share.tokens
            ids += sequence.ids[start:stop]
            positions += range(start, stop)
            spans.append(Span(start, share.tokens, self._table(sequence)))
            if share.last:
                logit_rows.append(len(ids) - 1)
        return Batch(
            torch.tensor(ids, dtype=torch.int64),
            torch.tensor(positions, dtype=torch.int64),
            tuple(spans),
            torch.tensor(logit_rows, dtype=torch.int64),
        )

    def forget(self, sequence: Sequence) -> None:
        """`sequence` runs no more."""
        self._tables.pop(sequence.number, None)

    def _table(self, sequence: Sequence) -> torch.Tensor:
        kept = self._tables.get(sequence.number)
        if kept is not None and kept[0] == sequence.pages_version:
            return kept[1]
        table = torch.tensor(sequence.pages, dtype=torch.int64)
        self._tables[sequence.number] = (sequence.pages_version, table)
        return table
