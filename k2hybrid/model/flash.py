"""Expanded attention on a device, by `kernels.flash`, which stores no score (arXiv 2307.08691).

Keys and values of a block of context are one product of torch, which the kernel takes as it lies; it keeps
its scores in registers, and carries its sums from block to block by itself. See `attention.expanded` for the
same by plain operations, and `fused` for the CPU's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from k2hybrid.kernels.flash import Carried, flash_attend
from k2hybrid.model.attention import AttentionSizes, Context, block_rows, tile_rows
from k2hybrid.model.layers import Linear, unquantized

PLAYED_ROWS = 128  # queries of a tile, where torch plays the kernel


def expanded(
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
