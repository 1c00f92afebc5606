"""What attention and MLPs may take for the moment, and what decides it; apart from their code, so that a plan
needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

# Of the fused kernel: how many times as many multiplications a second it makes as the absorbed one, and from
# how many queries on it is asked: where torch begins to use all threads.
FUSED_RATE = 4.0
FUSED_ROWS = 64


def absorbed_below(latent: int, nope: int, rope: int, value: int, *, fused: bool = False) -> float:
    """Spans with fewer new tokens than this are cheaper absorbed; 170.7 at Kimi-K2's sizes, 64 if `fused`.

    Multiplications per head and context row, for n queries: absorbed n · (2·latent + rope), scores over
    latent + rope values and a sum over latent; expanded n · (nope + rope + value), plus latent · (nope +
    value) once, to make that row's key and value. They are equal at
    n = latent · (nope + value) / ((2·latent + rope) − (nope + rope + value)).

    Args:
        fused: the expanded form is that of `model.fused`, whose multiplications take less.
    """
    rate = FUSED_RATE if fused else 1.0
    saved = (2 * latent + rope) - (nope + rope + value) / rate
    below = latent * (nope + value) / rate / saved if saved > 0 else float("inf")
    return max(below, FUSED_ROWS) if fused else below


@dataclass(frozen=True, slots=True)
class Cut:
    """How attention is cut into blocks of context and tiles of queries.

    Attributes:
        block_bytes: all temporaries of one block of context together.
        tile_bytes: what a tile of queries keeps across blocks.
        rounded: in the absorbed form a block's softmax weights meet its values in the model's dtype, as
            matrix units take them; the sums are fp32 all the same. A device's products by head are copied,
            to put rows first.
    """

    block_bytes: int
    tile_bytes: int
    rounded: bool

    @property
    def score_bytes(self) -> int:
        """Of a score: in fp32, and copied."""
        return 8 if self.rounded else 4

    @property
    def results(self) -> int:
        """Of a query in fp32: its result, and what a block adds to it, which is copied."""
        return 3 if self.rounded else 2


# Rows that an MLP works on at once: its inner activations are its own, and a chunk on a card has many rows.
MLP_ROWS = 2048

# Rows of a pass whose attention, or MLP, is one call a layer where kernels have one: of more the products
# take longer than the calls, and what lies between them would be large.
STEP_ROWS = 64

# Rows whose queries are in latent space at once, which is several times wider than a head.
ABSORBED_ROWS = 512

# Both, with a pass's own activations (about 100 MB at 512 rows of Kimi-K2) and what malloc keeps, stay well
# below 512 MB.
IN_RAM = Cut(block_bytes=128 << 20, tile_bytes=64 << 20, rounded=False)
# Of Kimi-K2 in the expanded form, 5,696 rows of context and 8,300 queries. A block costs reading and writing
# what queries carry, about the time of 270 of its rows, where 165 operations take the time of a byte. A tile
# makes all keys and values anew: 5 % of the time of 8,192 queries.
ON_DEVICE = Cut(block_bytes=192 << 20, tile_bytes=264 << 20, rounded=True)
