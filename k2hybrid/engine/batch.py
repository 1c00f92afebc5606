"""Shares of sequences → the model's Batch. Layer 4."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
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
        return Batch(_tensor(ids), _tensor(positions), tuple(spans), _tensor(logit_rows))

    def forget(self, sequence: Sequence) -> None:
        """`sequence` runs no more."""
        self._tables.pop(sequence.number, None)

    def _table(self, sequence: Sequence) -> torch.Tensor:
        kept = self._tables.get(sequence.number)
        if kept is not None and kept[0] == sequence.pages_version:
            return kept[1]
        table = _tensor(sequence.pages)
        self._tables[sequence.number] = (sequence.pages_version, table)
        return table


def _tensor(values: list[int]) -> torch.Tensor:
    """int64; by way of numpy, which reads a list in a third of the time."""
    return torch.from_numpy(np.array(values, np.int64))
