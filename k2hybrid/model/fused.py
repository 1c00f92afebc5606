"""Expanded attention by torch's fused kernel, for CPUs that multiply tiles (AMX); see `attention.expanded`.

Keys and values of a block of context are made by one product of torch, and scores, softmax and weighted sum
by one call (flash attention, arXiv 2205.14135), which keeps its scores in the caches. Blocks are merged by
log-sum-exp in fp32. A query sees all of what came before its tile, and of the tile itself what is not later.

A query's bits depend on its own span and on the number of torch's threads, by which it may split the sums of
that product. A group of heads has the bits that it has among all.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F

from k2hybrid.model.attention import AttentionSizes, Context, block_rows, tile_rows
from k2hybrid.model.layers import Linear, LinearKernels, unquantized

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@runtime_checkable
class WithTiles(Protocol):
    """Kernels that know their CPU."""

    @property
    def tiles(self) -> bool:
        """Whether it multiplies tiles of bf16."""


def serves(kernels: LinearKernels, dtype: torch.dtype) -> bool:
    """Whether a network with these `kernels`, in RAM, is better served by this form than by `attention`'s."""
    return isinstance(kernels, WithTiles) and kernels.tiles and dtype == torch.bfloat16


class _Merged:
    """Σ softmax · values over blocks: greatest log-sum-exp, sum of all, and weighted sum so far."""

    def __init__(self) -> None:
        self._peak = self._total = self._out = torch.empty(0)

    def add(self, out: torch.Tensor, logsum: torch.Tensor) -> None:
        """Take in a block's mean values [heads, n, width] and the log of its sum of weights [heads, n]."""
        logsum = logsum.unsqueeze(-1)
        if not len(self._out):
            self._peak, self._total, self._out = logsum, torch.ones_like(logsum), out.float()
            return
        peak = torch.maximum(self._peak, logsum)
        fade, weight = (self._peak - peak).exp_(), (logsum - peak).exp_()
        self._total.mul_(fade).add_(weight)
        self._out.mul_(fade).addcmul_(out, weight)
        self._peak = peak

    def result(self) -> torch.Tensor:
        """fp32 [heads, n, width]."""
        return self._out.div_(self._total)


def expanded(
    q: torch.Tensor, context: Context, sizes: AttentionSizes, kernels: LinearKernels, kv_b: Linear
) -> torch.Tensor:
    """q bf16 [n, heads, nope + rope] -> fp32 [n, heads, value]; `kernels` are not asked."""
    span, cut, heads, key = context.span, context.cut, sizes.heads, sizes.nope + sizes.rope
    # The kernel wants keys and values of one width: zeros behind the narrower ones add nothing.
    width, pair = max(key, sizes.value), sizes.nope + sizes.value
    # A row of context: as gathered, counted as fp32, what kv_b makes of it, and key and value twice, as the
    # kernel packs them. A query: itself, what the kernel gives, and the merged sum.
    step = block_rows(cut, (sizes.latent + sizes.rope) * 4 + heads * (pair * 2 + 8 * width))
    tile = min(step, tile_rows(cut, heads * (4 * width + 12 * sizes.value)))
    weight = unquantized(kv_b.weight)
    queries = F.pad(q, (0, width - key)).transpose(0, 1).unsqueeze(0)

    def block(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = context.rows(start, stop).to(q.dtype)
        both = F.linear(rows[:, : sizes.latent], weight).view(-1, heads, pair).transpose(0, 1)
        keys, values = (both.new_zeros(1, heads, stop - start, width) for _ in range(2))
        keys[0, ..., : sizes.nope] = both[..., : sizes.nope]
        keys[0, ..., sizes.nope : key] = rows[:, sizes.latent :]
        values[0, ..., : sizes.value] = both[..., sizes.nope :]
        return keys, values

    outs = []
    for first in range(0, span.count, tile):
        last = min(first + tile, span.count)
        merged = _Merged()
        begin, end = span.start + first, span.start + last
        for start in [*range(0, begin, step), begin]:
            own = start == begin
            keys, values = block(start, end if own else min(start + step, begin))
            out, logsum = _attend(queries[:, :, first:last], keys, values, 0.0, own, scale=sizes.scale)
            merged.add(out[0, ..., : sizes.value], logsum[0])
            del keys, values, out  # or they would live beside the next block's
        outs.append(merged.result().transpose(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)
