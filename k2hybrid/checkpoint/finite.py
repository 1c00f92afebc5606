"""Finds NaN and infinity among the floating-point tensors of a shard that streams by in chunks."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from k2hybrid.types import TensorRef

# Not finite: all bits of the exponent are set (IEEE 754; bf16 is the upper half of an fp32).
_EXPONENT: dict[str, tuple[np.dtype[np.unsignedinteger[Any]], int]] = {
    "BF16": (np.dtype(np.uint16), 0x7F80),
    "F32": (np.dtype(np.uint32), 0x7F800000),
}


class _Run(NamedTuple):
    """Tensors of one dtype that lie side by side: bytes [begin, end)."""

    begin: int
    end: int
    dtype: str


class FiniteScan:
    """Counts elements that are not finite, by tensor, in `counts`. For the chunks of one file, in any order.

    Chunks must begin at multiples of 4 bytes; elements then never lie in two of them, as headers that would
    misalign a tensor are refused.
    """

    def __init__(self, refs: Sequence[TensorRef], chunk_bytes: int) -> None:
        self.counts: Counter[str] = Counter()
        self._refs = sorted((ref for ref in refs if ref.dtype in _EXPONENT), key=lambda ref: ref.offset)
        self._starts = np.array([ref.offset for ref in self._refs], dtype=np.int64)
        self._runs: list[_Run] = []
        for ref in self._refs:
            end = ref.offset + ref.nbytes
            last = self._runs[-1] if self._runs else None
            if last is not None and (last.end, last.dtype) == (ref.offset, ref.dtype):
                self._runs[-1] = last._replace(end=end)
            else:
                self._runs.append(_Run(ref.offset, end, ref.dtype))
        self._ends = [run.end for run in self._runs]
        self._scratch = np.empty(chunk_bytes, np.uint8)

    def feed(self, offset: int, chunk: memoryview[int]) -> None:
        """The bytes of the file from `offset` on."""
        chunk_end = offset + len(chunk)
        for run in self._runs[bisect_right(self._ends, offset) :]:
            if run.begin >= chunk_end:
                break
            dtype, mask = _EXPONENT[run.dtype]
            begin, end = max(run.begin, offset), min(run.end, chunk_end)
            values = np.frombuffer(chunk, dtype, (end - begin) // dtype.itemsize, begin - offset)
            exponents = self._scratch[: end - begin].view(dtype)
            np.bitwise_and(values, dtype.type(mask), out=exponents)
            if exponents.size and exponents.max() == mask:
                self._count(begin + np.flatnonzero(exponents == mask) * dtype.itemsize)

    def _count(self, positions: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        owners, counts = np.unique(np.searchsorted(self._starts, positions, "right") - 1, return_counts=True)
        for owner, count in zip(owners.tolist(), counts.tolist(), strict=True):
            self.counts[self._refs[owner].name] += count
