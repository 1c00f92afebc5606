"""Softmax attention of a span's queries over its paged context, in blocks merged by log-sum-exp in fp32.

Two forms of the same function (DeepSeek-V2, arXiv 2405.04434, §2.1). *Absorbed*: kv_b is folded into query
and output, every head attends over the shared latent rows; cheap for few queries. *Expanded*: a block of
latent rows is multiplied with kv_b into every head's keys and values; cheap for many queries, who share them.

Memory: whatever the context, a block is chosen so that all temporaries of a block together stay within a
number of bytes, and queries are taken in tiles so that what lives across blocks does so too (`Cut`). Block
borders depend on a span's own sizes alone, never on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from k2hybrid.model.layers import LinearKernels, WithRows
from k2hybrid.model.scratch import Cut, absorbed_below
from k2hybrid.types import LatentWeights

if TYPE_CHECKING:
    from k2hybrid.cache.pages import LatentPages
    from k2hybrid.model.batch import Span
    from k2hybrid.model.layers import Linear

BLOCK_ALIGNMENT = 64  # whole pages, so that a block's gather is a view whenever its pages adjoin


@dataclass(frozen=True, slots=True)
class AttentionSizes:
    """The sizes of one attention layer."""

    heads: int
    nope: int
    rope: int
    value: int
    latent: int
    scale: float  # of the scores
    fused: bool = False  # the expanded form is that of `model.fused`

    @property
    def absorbed_below(self) -> float:
        """See `scratch.absorbed_below`."""
        return absorbed_below(self.latent, self.nope, self.rope, self.value, fused=self.fused)


@runtime_checkable
class SpanAttention(Protocol):
    """Kernels that attend to whole contexts, absorbed, for several spans in one call (`native.machine`)."""

    def attend(
        self,
        q: torch.Tensor,
        rows: torch.Tensor,
        spans: Sequence[tuple[torch.Tensor, int, int]],
        *,
        latent: int,
        row_format: str,
        scale: float,
    ) -> torch.Tensor:
        """q bf16 [T, heads, latent + rope], spans (table, start, count) -> fp32 [T, heads, latent]."""


class LatentStep(Protocol):
    """One layer's attention for few rows, in one call: same products, order and bits as in `mla`."""

    def __call__(
        self,
        x: torch.Tensor,
        rows: torch.Tensor,
        slots: torch.Tensor,
        spans: Sequence[tuple[torch.Tensor, int, int]],
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        """x bf16 [T, hidden] -> fp32 [T, hidden]; stores the rows' latents at `slots` int64 [T] of `rows`."""


@runtime_checkable
class LatentSteps(Protocol):
    """Kernels that have such steps (`native.machine`), for latents stored in bf16."""

    def latent_step(self, weights: LatentWeights, *, rope: int, eps: float, scale: float) -> LatentStep: ...


class ContextKernels(LinearKernels, SpanAttention, WithRows, Protocol):
    """All that a network asks of a CPU's kernels."""


@dataclass(frozen=True, slots=True)
class Context:
    """One span's rows of one layer, read from the pages block by block."""

    pages: LatentPages
    layer: int
    span: Span
    cut: Cut
    table: torch.Tensor | None = None  # the span's page table beside the pages, if those lie on a device

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Latent rows [stop - start, latent + rope] in the type they are stored in."""
        return self.pages.gather(self.layer, self.span.page_table, start, stop, self.table)


def block_rows(cut: Cut, bytes_per_row: int) -> int:
    """Context rows of a block, whole pages, given what one of them costs in temporaries."""
    return max(cut.block_bytes // bytes_per_row // BLOCK_ALIGNMENT, 1) * BLOCK_ALIGNMENT


def tile_rows(cut: Cut, bytes_per_row: int) -> int:
    """Queries of a tile, given what one of them costs for as long as the tile lives."""
    return max(cut.tile_bytes // bytes_per_row, 1)


class _RunningSoftmax:
    """Σ softmax(scores) · values over blocks: the maximum, the sum and the weighted sum so far, all fp32.

    Shapes: scores fp32 [B, rows, n], values [B, n, width]; out [B, rows, width].

    Args:
        kernels: multiply weights and values rounded to the values' type; None: in fp32.
    """

    def __init__(self, kernels: LinearKernels | None) -> None:
        self._kernels = kernels
        self._peak: torch.Tensor | None = None
        self._total = self._out = torch.empty(0)

    def add(self, scores: torch.Tensor, values: torch.Tensor) -> None:
        """Take in one block; overwrites `scores`. In the first block every row must see something."""
        peak = scores.amax(-1, keepdim=True)
        if self._peak is None:
            weights = scores.sub_(peak).exp_()
            self._total = weights.sum(-1, keepdim=True)
            self._out = self._product(weights, values)
        else:
            peak = torch.maximum(self._peak, peak)
            weights = scores.sub_(peak).exp_()
            fade = self._peak.sub_(peak).exp_()
            self._total.mul_(fade).add_(weights.sum(-1, keepdim=True))
            self._out.mul_(fade)
            if self._kernels is None:
                self._out.baddbmm_(weights, values)
            else:
                self._out.add_(self._product(weights, values))
        self._peak = peak

    def _product(self, weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        if self._kernels is None:
            return weights @ values
        rounded = weights.to(values.dtype).transpose(0, 1)
        return self._kernels.head_linear_t(rounded, values).transpose(0, 1)

    def result(self) -> torch.Tensor:
        """The weighted mean of all values so far."""
        return self._out.div_(self._total)


def _hide_later(scores: torch.Tensor, first_query: int, block_start: int) -> None:
    """Set scores [..., queries, n] of context rows behind each query to −inf, in place."""
    queries, n = scores.shape[-2:]
    if block_start + n <= first_query + 1:
        return
    device = scores.device
    query = torch.arange(first_query, first_query + queries, device=device)[:, None]
    row = torch.arange(block_start, block_start + n, device=device)
    scores.masked_fill_(row > query, -torch.inf)


def absorbed(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    context: Context,
    sizes: AttentionSizes,
    kernels: LinearKernels,
) -> torch.Tensor:
    """q_latent [n, heads, latent], q_rope [n, heads, rope], both bf16 or fp32 -> fp32 [n, heads, latent]."""
    span, cut = context.span, context.cut
    heads, width, dtype = sizes.heads, sizes.latent + sizes.rope, q_latent.dtype
    # A query lives as itself, as its fp32 output, and as what one block adds to that.
    tile = tile_rows(cut, heads * (width * dtype.itemsize + cut.results * sizes.latent * 4))
    outs = []
    for first in range(0, span.count, tile):
        last = min(first + tile, span.count)
        queries, end = last - first, span.start + last
        q = torch.cat((q_latent[first:last], q_rope[first:last]), dim=-1).view(-1, width)
        # Per context row: gathered, counted as fp32 (FP8 rows take less, stored and decoded together), its
        # latent in fp32, a score a query and head, a mask byte a query.
        step = block_rows(cut, (width + sizes.latent) * 4 + queries * (heads * cut.score_bytes + 1))
        softmax = _RunningSoftmax(kernels if cut.rounded else None)
        for start in range(0, end, step):
            rows = context.rows(start, min(start + step, end)).to(dtype)
            scores = kernels.linear(q, rows).mul_(sizes.scale)
            _hide_later(scores.view(queries, heads, -1).transpose(0, 1), span.start + first, start)
            values = rows[None, :, : sizes.latent]
            softmax.add(scores[None], values if cut.rounded else values.float())
            del rows, values, scores  # or they would live beside the next block's
        outs.append(softmax.result().view(queries, heads, sizes.latent))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def expanded(
    q: torch.Tensor, context: Context, sizes: AttentionSizes, kernels: LinearKernels, kv_b: Linear
) -> torch.Tensor:
    """q [n, heads, nope + rope] in the model's dtype -> fp32 [n, heads, value], in RAM.

    Keys and values are rounded to that dtype, like every other activation that enters a product.
    """
    span, cut, heads, nope, dtype = context.span, context.cut, sizes.heads, sizes.nope, q.dtype
    key, pair = nope + sizes.rope, nope + sizes.value
    tile = tile_rows(cut, heads * 2 * sizes.value * 4)
    outs = []
    for first in range(0, span.count, tile):
        last = min(first + tile, span.count)
        queries, end = last - first, span.start + last
        # Per context row: gathered, as above; for every head kv_b's fp32 output and its rounding, a key, an
        # fp32 value and a score a query; a mask byte a query.
        per_head = pair * (4 + dtype.itemsize) + key * dtype.itemsize + sizes.value * 4 + queries * 4
        step = block_rows(cut, (sizes.latent + sizes.rope) * 4 + heads * per_head + queries)
        softmax = _RunningSoftmax(None)
        for start in range(0, end, step):
            rows = context.rows(start, min(start + step, end)).to(dtype)
            both = kv_b(rows[:, : sizes.latent]).to(dtype).view(-1, heads, pair).transpose(0, 1)
            # By head, each in one piece: a stride of all heads between two keys would miss every cache.
            keys = torch.cat((both[..., :nope], rows[:, sizes.latent :].expand(heads, -1, -1)), dim=-1)
            values = both[..., nope:].to(torch.float32, memory_format=torch.contiguous_format)
            del both
            scores = kernels.head_linear(q[first:last], keys).mul_(sizes.scale).transpose(0, 1)
            del keys
            _hide_later(scores, span.start + first, start)
            softmax.add(scores, values)
            del rows, values, scores
        outs.append(softmax.result().transpose(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)
