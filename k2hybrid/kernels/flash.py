"""Attention of many queries over expanded keys and values, a block of context at a time: no score is stored.

FlashAttention-2 (arXiv 2307.08691): a program has a tile of one head's queries and goes through the rows that
they see, in tiles; maximum, sum of weights and weighted sum of values are kept in fp32 and corrected when a
greater score comes. What a tile must know of earlier blocks lies in `Carried`, which the kernel reads and
writes by itself; where a tile's last query is in a block, its result is written and it is done.

Keys are in two parts, as MLA has them (DeepSeek-V2, arXiv 2405.04434, §2.1): each head's own, which lies with
its value as kv_b's product left it, and the rotary part, one for all heads. Neither is copied together: a
score is the sum of two products, of 128 and 64 columns at Kimi-K2's sizes, and nothing is padded to 256.

Work at those sizes: 2 · (192 + 128) operations for each head, query and row it sees, and a row's 512 bytes
for a tile of 128 queries: 160 operations a byte, out of the L2 cache, since the tiles of a head run together.
A block of threads keeps 128 · 128 fp32 sums in registers, 64 of each of 256 threads. Shared memory then holds
the queries, 48 KiB, and tiles of context on their way: two of 32 rows, 40 KiB, in the 99 KiB of compute
capability 8.6, 8.9 and 12.0; two or three of 64 rows elsewhere (`tests/kernels_device/test_compiled.py` has
the compiler's counts).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from k2hybrid.errors import KernelError
from k2hybrid.kernels.card import Card, card_of, expect, power_of_two

HEAD_MAX = 256  # columns of each part of a key, and of a value


@dataclass(frozen=True, slots=True)
class Tile:
    """How the kernel is compiled: queries of a program, context rows of a step, warps, pipeline stages."""

    queries: int
    rows: int
    warps: int
    stages: int


def choose_tile(card: Card, nope: int, rope: int, value: int) -> Tile:
    """The largest tile that the card's shared memory holds, with its sums in registers."""
    key, value = tile_columns(nope) + tile_columns(rope), tile_columns(value)
    # Cards whose tensor cores read shared memory themselves keep one tile more there.
    tiles = 3 if card.major in (9, 10) else 2
    queries, rows = 128, 64 if card.shared_bytes >= 160_000 else 32
    while queries > 16 and queries * value > 128 * 128:
        queries //= 2
    while 2 * (queries * key + tiles * rows * (key + value)) > card.shared_bytes and rows > 16:
        queries, rows = max(queries // 2, 16), rows if queries > 32 else rows // 2
    return Tile(queries, rows, 8 if queries * value >= 64 * 256 else 4, 3)


def tile_columns(columns: int) -> int:
    """Of a tile that holds them: what is behind is masked."""
    return max(power_of_two(columns), 16)


@dataclass(frozen=True, slots=True)
class Carried:
    """What a span's queries take from one block of context to the next; its contents are the kernel's.

    Attributes:
        mixed: fp32 [n, heads, value], values times weights so far.
        sums: fp32 [2, heads, n], the greatest score, base 2, and the sum of weights.
    """

    mixed: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def empty(cls, queries: int, heads: int, value: int, device: torch.device) -> Carried:
        """For so many queries; nothing need be written into it before the first block."""
        return cls(
            torch.empty((queries, heads, value), dtype=torch.float32, device=device),
            torch.empty((2, heads, queries), dtype=torch.float32, device=device),
        )


def flash_attend(
    q: torch.Tensor,
    both: torch.Tensor,
    rope: torch.Tensor,
    out: torch.Tensor,
    carried: Carried,
    *,
    start: int,
    position: int,
    scale: float,
    tile: Tile | None = None,
) -> None:
    """Take in a block of context: softmax(scale · q · key) · value over all that came so far.

    Blocks come in order, the first with `start` 0, each where the one before it ended. Query i stands at
    `position` + i of the context and sees the rows up to its own; it has its result after the block with
    that row, and later blocks leave it alone.

    Args:
        q: bf16 [n, heads, nope + rope], rotated; row stride free.
        both: bf16 [rows, heads, nope + value], the rows' own keys and values.
        rope: bf16 [rows, rope], the rotary part of their keys; row stride free.
        out: bf16 [n, heads, value], written; row stride free.
        carried: the same for all blocks.
        start: the block's first row in the context.
        position: the first query's.
        scale: of the scores, positive.
        tile: in place of `choose_tile`'s, for measurements.

    No sum is split or added in a changing order: a query's bits are the same each time.

    Raises:
        KernelError: a tensor of another type or shape, or no Triton.
    """
    n, heads, key = q.shape
    rows, width = rope.shape
    nope, value = key - width, out.shape[-1]
    if not all(0 < columns <= HEAD_MAX for columns in (nope, width, value)):
        raise KernelError(
            f"attention takes parts of keys, and values, of 1 to {HEAD_MAX}; not {nope}, {width}, {value}"
        )
    if start < 0 or position < 0 or scale <= 0:
        raise KernelError(f"no context has start {start}, position {position} and scale {scale}")
    _adjoin(q, "q", (n, heads, key))
    _adjoin(out, "out", (n, heads, value))
    _adjoin(rope, "rope", (rows, width))
    expect(both, "both", torch.bfloat16, (rows, heads, nope + value))
    expect(carried.mixed, "mixed", torch.float32, (n, heads, value))
    expect(carried.sums, "sums", torch.float32, (2, heads, n))
    card = card_of(q, both, rope, out, carried.mixed, carried.sums)
    if not n or not rows or not heads:
        return
    from k2hybrid.kernels.jit import flash as jit

    tile = tile or choose_tile(card, nope, width, value)
    jit.attend[-(-n // tile.queries), heads](
        q,
        both,
        rope,
        out,
        carried.mixed,
        carried.sums,
        scale * math.log2(math.e),
        n,
        heads,
        rows,
        start,
        position,
        q.stride(0),
        rope.stride(0),
        out.stride(0),
        NOPE=nope,
        ROPE=width,
        VALUE=value,
        NOPE_TILE=tile_columns(nope),
        ROPE_TILE=tile_columns(width),
        VALUE_TILE=tile_columns(value),
        QUERIES=tile.queries,
        ROWS=tile.rows,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _adjoin(tensor: torch.Tensor, name: str, shape: tuple[int, ...]) -> None:
    """Raise KernelError unless it is bf16 of this shape, and each row is contiguous."""
    inner = shape[1:]
    wanted = tuple(math.prod(inner[i + 1 :]) for i in range(len(inner)))
    fits = tensor.shape == shape and (tensor.stride()[1:] == wanted or not tensor.numel())
    if tensor.dtype != torch.bfloat16 or not fits:
        raise KernelError(
            f"{name} must be bf16 {list(shape)} with contiguous rows; "
            f"it is {tensor.dtype} {list(tensor.shape)}, strides {tensor.stride()}"
        )
