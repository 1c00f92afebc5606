"""Latent attention of a decode step: softmax over paged latent rows, split over the context.

The absorbed form of DeepSeek-V2 (arXiv 2405.04434, §2.1): all heads attend over the same rows, whose latent
part is key and value at once. Parts of a context are computed apart and merged by log-sum-exp.

Work at Kimi-K2's sizes (64 heads, latent 512, rope 64): 2 · 64 · (512 + 64 + 512) = 139,264 operations a
context token, for 1,152 bytes in bf16 and 656 in fp8. A card does about 120 bf16 operations in the time of a
byte, so neither may be wasted: a head tile re-reads the rows (from the L2 cache), and a tile must keep its
output, heads × 512 in fp32, in registers. 32 heads in 8 warps are 64 of a thread's 255 registers. Shared
memory then holds queries, 32 · 576 · 2 = 36 KiB, and a block of 32 rows, 36 KiB; in fp8 the block as it came,
20.5 KiB, beside its 32 KiB in bf16. Both fit the 99 KiB of compute capability 8.6, 8.9 and 12.0
(`tests/kernels_device/test_compiled.py` has the compiler's count for every tile of the table).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from k2hybrid.errors import KernelError
from k2hybrid.kernels.card import Card, card_of, expect, power_of_two

PAGE_TOKENS = 64
GROUP = 128  # latent values under one scale of an fp8 row; and the columns of one product
MIN_PART = 128  # tokens: shorter parts would cost more in merging than they save
LATENT_MAX = 512
MERGE_COLUMNS = 128
MERGE_PARTS = 16


@dataclass(frozen=True, slots=True)
class Tile:
    """How the attention kernel is compiled: heads and context tokens of a block, warps, pipeline stages."""

    heads: int
    tokens: int
    warps: int
    stages: int


def choose_tile(card: Card, row_format: str, heads: int) -> Tile:
    """The largest tile that the card's shared memory and registers hold; `tokens` divides a page."""
    if card.major == 9 and heads >= 64:
        # Its tensor cores take 64 rows at once; queries lie in shared memory.
        return Tile(64, 64, 8, 2) if row_format == "bf16" else Tile(64, 32, 8, 3)
    tokens = 64 if card.shared_bytes >= 160_000 else 32
    return Tile(min(max(power_of_two(heads), 16), 32), tokens, 8, 2)


@dataclass(frozen=True, slots=True)
class Split:
    """How contexts are dealt: a part has at least `MIN_PART` tokens and total / `spread`; at most `parts`."""

    spread: int
    parts: int


def choose_split(batch: int, pages: int, head_tiles: int, multiprocessors: int) -> Split:
    """One block a multiprocessor, whatever the lengths are; they are data and decide on the device.

    With parts of total / spread tokens a batch has at most spread + batch of them: as many as there are
    multiprocessors for a head tile. Tables of few pages bound them too.
    """
    spread = max(multiprocessors // head_tiles - batch, batch)
    longest = pages * PAGE_TOKENS
    return Split(spread, min(spread + batch, batch * -(-longest // MIN_PART)))


def row_bytes(row_format: str, latent: int, rope: int) -> int:
    """Bytes of a row: bf16 values; or e4m3 latent, an fp32 scale a group of 128, and a bf16 rotary part."""
    if row_format == "bf16":
        return 2 * (latent + rope)
    return latent + 4 * -(-latent // GROUP) + 2 * rope


def scratch_bytes(card: Card, row_format: str, batch: int, pages: int, heads: int, latent: int) -> int:
    """What one call takes for the parts of all contexts, beside its output."""
    tiles = -(-heads // choose_tile(card, row_format, heads).heads)
    return choose_split(batch, pages, tiles, card.multiprocessors).parts * heads * (latent + 1) * 4


def mla_decode(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    rows: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    row_format: str,
    tile: Tile | None = None,
) -> torch.Tensor:
    """softmax(scale · (q_latent · latent + q_rope · k_rope)) · latent for one new token a sequence.

    Args:
        q_latent: bf16 [B, H, L], L a multiple of 4, at most 512.
        q_rope: bf16 [B, H, R], R even; of both, the heads of a sequence adjoin.
        rows: uint8 [pages · 64, row_bytes], one layer's rows as stored, 16-byte aligned.
        tables: int32 [B, P], page numbers; token t of sequence b lies in page tables[b, t // 64] at t % 64.
        lengths: int32 [B], rows that count, at most 64 · P each; 0 gives zeros. What lies behind is not read.
        scale: of the scores.
        tile: in place of `choose_tile`'s, for measurements.

    Returns:
        fp32 [B, H, L].

    The grid depends on B, H, P and the card, so a captured graph may be replayed with other tables and
    lengths. Parts lie in memory of torch's allocator, under capture of the graph's own pool, and are given
    back before the return: the layers of a graph use the same bytes (`scratch_bytes`).

    Raises:
        KernelError: a tensor of another type or shape, or no Triton.
    """
    batch, heads, latent = q_latent.shape
    rope, pages = q_rope.shape[-1], tables.shape[-1]
    width = row_bytes(row_format, latent, rope)
    if latent % 4 or rope % 2 or not 0 < latent <= LATENT_MAX:
        raise KernelError(
            f"latent attention takes a latent of 4, 8, … {LATENT_MAX}, rope even; not {latent}, {rope}"
        )
    for name, q, size in (("q_latent", q_latent, latent), ("q_rope", q_rope, rope)):
        adjoin = q.shape == (batch, heads, size) and q.stride()[1:] == (size, 1)
        if q.dtype != torch.bfloat16 or not (adjoin or batch == 0):
            raise KernelError(
                f"{name} must be bf16 [{batch}, {heads}, {size}] with adjoining heads; "
                f"it is {q.dtype} {list(q.shape)}, strides {q.stride()}"
            )
    if row_format not in ("bf16", "fp8"):
        raise KernelError(f"latent attention reads rows in bf16 or fp8, not {row_format!r}")
    expect(rows, "rows", torch.uint8, (rows.shape[0], width))
    expect(tables, "tables", torch.int32, (batch, pages))
    expect(lengths, "lengths", torch.int32, (batch,))
    card = card_of(q_latent, q_rope, rows, tables, lengths)
    from k2hybrid.kernels.jit import mla as jit

    tile = tile or choose_tile(card, row_format, heads)
    tiles = -(-heads // tile.heads)
    split = choose_split(batch, pages, tiles, card.multiprocessors)
    partial = torch.empty((split.parts, heads, latent), dtype=torch.float32, device=q_latent.device)
    lse = torch.empty((split.parts, heads), dtype=torch.float32, device=q_latent.device)
    out = torch.empty((batch, heads, latent), dtype=torch.float32, device=q_latent.device)
    fp8 = row_format == "fp8"
    group = min(max(power_of_two(latent), 16), GROUP)
    halves = rows.view(torch.bfloat16)
    jit.attend[tiles, split.parts](
        q_latent,
        q_rope,
        rows.view(torch.int32) if fp8 else halves,
        halves,
        rows.view(torch.float32) if fp8 else halves,
        tables,
        lengths,
        partial,
        lse,
        scale * math.log2(math.e),
        batch,
        heads,
        pages,
        split.spread,
        q_latent.stride(0),
        q_rope.stride(0),
        LATENT=latent,
        ROPE=rope,
        ROW_BYTES=width,
        FP8=fp8,
        GROUP=group,
        GROUPS=-(-latent // group),
        ROPE_TILE=max(power_of_two(rope), 16),
        HEADS=tile.heads,
        TOKENS=tile.tokens,
        PAGE=PAGE_TOKENS,
        BATCH=power_of_two(batch),
        MIN_PART=MIN_PART,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    jit.merge[-(-latent // MERGE_COLUMNS), heads, batch](
        partial,
        lse,
        lengths,
        out,
        batch,
        heads,
        split.spread,
        LATENT=latent,
        COLUMNS=MERGE_COLUMNS,
        PARTS=MERGE_PARTS,
        BATCH=power_of_two(batch),
        MIN_PART=MIN_PART,
        num_warps=4,
        num_stages=2,
    )
    return out
