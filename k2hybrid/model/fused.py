"""Expanded attention by kernels that store no score (flash attention, arXiv 2205.14135 and 2307.08691).

Keys and values of a block of context are made by one product of torch, and scores, softmax and weighted sum
by one call; see `attention.expanded` for the same by plain operations.

`expanded` is torch's kernel, for CPUs that multiply tiles (AMX), which keeps its scores in the caches. Blocks
are merged by log-sum-exp in fp32. A query sees all of what came before its tile, and of the tile itself what
is not later. A query's bits depend on its own span and on the number of torch's threads, by which it may
split the sums of that product. A group of heads has the bits that it has among all.

`on_device` is that of a device, `kernels.flash`, which takes what the product gives as it lies, keeps its
scores in registers, and carries its sums from block to block by itself.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F

from k2hybrid.kernels.flash import Carried, flash_attend
from k2hybrid.model.attention import AttentionSizes, Context, block_rows, tile_rows
from k2hybrid.model.layers import Linear, LinearKernels, unquantized

PLAYED_ROWS = 128  # queries of a tile, where torch plays a device's kernel

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


def on_device(
    q: torch.Tensor, context: Context, sizes: AttentionSizes, kv_b: Linear, out: torch.Tensor
) -> None:
    """q [n, heads, nope + rope] in the model's dtype -> out [n, heads, value], in that as well."""
    span, cut, heads = context.span, context.cut, sizes.heads
    pair = sizes.nope + sizes.value
    # A row of context: as gathered, counted as fp32, and what kv_b makes of it. A query: what is carried.
    step = block_rows(cut, (sizes.latent + sizes.rope) * 4 + heads * pair * q.dtype.itemsize)
    tile = _even(span.count, tile_rows(cut, heads * (sizes.value + 2) * 4))
    weight = unquantized(kv_b.weight).to(q.dtype)  # as it is, but in tests
    for first in range(0, span.count, tile):
        last = min(first + tile, span.count)
        carried = Carried.empty(last - first, heads, sizes.value, q.device)
        end = span.start + last
        for start in range(0, end, step):
            rows = context.rows(start, min(start + step, end)).to(q.dtype)
            both = F.linear(rows[:, : sizes.latent], weight).view(-1, heads, pair)
            attend_block(
                q[first:last],
                both,
                rows[:, sizes.latent :],
                out[first:last],
                carried,
                start=start,
                position=span.start + first,
                scale=sizes.scale,
            )
            del rows, both
        del carried


def _even(count: int, most: int) -> int:
    """Rows of tiles of `most` at most, all about as large: each of them makes the keys anew."""
    return -(-count // -(-count // most))


def attend_block(
    q: torch.Tensor,
    both: torch.Tensor,
    rope: torch.Tensor,
    out: torch.Tensor,
    carried: Carried,
    *,
    start: int,
    position: int,
    scale: float,
) -> None:
    """`flash_attend` on a card; where there is none, torch plays it."""
    if q.is_cuda:
        flash_attend(q, both, rope, out, carried, start=start, position=position, scale=scale)
        return
    nope = q.shape[-1] - rope.shape[-1]
    keys, rotary, values = both[..., :nope].float(), rope.float(), both[..., nope:].float()
    row = torch.arange(start, start + len(both), device=q.device)
    for first in range(0, len(q), PLAYED_ROWS):
        some = slice(first, min(first + PLAYED_ROWS, len(q)))
        own = torch.arange(position + first, position + some.stop, device=q.device)[:, None]
        if position + some.stop <= start:
            continue  # an earlier block had their own rows
        queries = q[some].float()
        scores = torch.einsum("nhk,thk->hnt", queries[..., :nope], keys)
        scores += torch.einsum("nhk,tk->hnt", queries[..., nope:], rotary)
        scores.mul_(scale).masked_fill_(row > own, -torch.inf)
        peak = scores.amax(-1)
        if start:
            peak = torch.maximum(peak, carried.sums[0, :, some])
        weights = scores.sub_(peak[..., None]).exp_()
        total, mixed = weights.sum(-1), torch.einsum("hnt,thv->nhv", weights.to(both.dtype).float(), values)
        if start:
            fade = (carried.sums[0, :, some] - peak).exp_()
            total.add_(fade * carried.sums[1, :, some])
            mixed.addcmul_(carried.mixed[some], fade.T[..., None])
        if position + some.stop <= start + len(both):
            out[some] = mixed.div_(total.T[..., None])
        else:
            carried.mixed[some], carried.sums[0, :, some], carried.sums[1, :, some] = mixed, peak, total
