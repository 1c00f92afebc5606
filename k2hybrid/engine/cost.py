"""What a pass over the network takes, predicted in microseconds from bytes and operations. Layer 4; pure.

A layer has two parts, attention and feed-forward, between which a pass may stop. A part over few rows is
bound by what it reads: its dense weights once, and of the routed experts those that any row chose. Of E
experts, n rows that choose k each read about E·(1 − (1 − k/E)ⁿ): at true size 48 rows read two thirds of them
and 512 rows all, the bytes of 48 decode steps. Parts over many rows are bound by operations. Which machine
this is is learnt from what was run: a factor for small passes, and for large ones a factor for each kind of
part, follows the ratio of what they took to what was predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

# From so many rows on a pass counts as a large one: torch shares its rows among threads.
LARGE_ROWS = 64
_NEW = 0.1  # weight of the newest pass in a factor
_LOWEST, _HIGHEST = 1e-3, 1e3


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """Weights that every row meets."""

    bytes: int  # as they are read
    row_ops: int  # multiply-adds of one row


NO_WEIGHTS = DenseWeights(0, 0)


@dataclass(frozen=True, slots=True)
class NetworkSizes:
    """Bytes and operations of a network, as its builder counts them; of one layer, where not said otherwise.

    The first layers have an MLP, the last `moe_layers` a shared expert, a router and routed experts.
    """

    layers: int
    moe_layers: int = 0
    attention: DenseWeights = NO_WEIGHTS
    mlp: DenseWeights = NO_WEIGHTS
    shared: DenseWeights = NO_WEIGHTS  # with the router
    head: DenseWeights = NO_WEIGHTS  # behind all layers
    expert: DenseWeights = NO_WEIGHTS  # one
    experts: int = 0
    top_k: int = 0
    context_ops: int = 0  # multiply-adds of one row for each token of its context
    latent_bytes: int = 0  # of one token in the cache

    @property
    def parts(self) -> int:
        """Of all layers: attention and feed-forward of the first, then of the second, and so on."""
        return 2 * self.layers


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one sequence in a pass, and the tokens that its last row looks back on."""

    count: int
    context: int


class Kind(Enum):
    """What is learnt apart."""

    SMALL = auto()  # any part of a pass over few rows
    ATTENTION = auto()
    MLP = auto()
    EXPERTS = auto()
    HEAD = auto()


class CostModel:
    """Predicts passes and their parts, and learns from those that were run.

    Args:
        bytes_per_us: read bandwidth to start from; 10,000 is 10 GB/s.
        ops_per_us: multiply-adds a microsecond to start from.
    """

    def __init__(
        self, sizes: NetworkSizes, *, bytes_per_us: float = 10_000.0, ops_per_us: float = 30_000.0
    ) -> None:
        self.sizes = sizes
        self._bytes_per_us = bytes_per_us
        self._ops_per_us = ops_per_us
        self._factors = dict.fromkeys(Kind, 1.0)

    def experts_read(self, rows: int) -> float:
        """Expected distinct experts that `rows` rows read in one layer, routing taken as even."""
        sizes = self.sizes
        if not sizes.experts:
            return 0.0
        return sizes.experts * (1.0 - (1.0 - sizes.top_k / sizes.experts) ** rows)

    def pass_us(self, rows: list[Rows]) -> int:
        """Microseconds of a whole pass over `rows`, at least 1; 0 for none."""
        if not any(r.count for r in rows):
            return 0
        return max(1, round(sum(self._us(kind, rows, n) for kind, n in self._kinds(0, self.sizes.parts))))

    def parts_us(self, rows: list[Rows]) -> list[int]:
        """Microseconds of each part of a pass over `rows`, at least 1 each."""
        sizes = self.sizes
        attention, mlp, experts = (
            max(1, round(self._us(kind, rows, 1))) for kind in (Kind.ATTENTION, Kind.MLP, Kind.EXPERTS)
        )
        dense = sizes.layers - sizes.moe_layers
        return [*(attention, mlp) * dense, *(attention, experts) * sizes.moe_layers]

    def layer_us(self, rows: list[Rows]) -> int:
        """Microseconds of the longest layer of a pass over `rows`; at least 1."""
        return longest_layer_us(self.parts_us(rows))

    def observe(self, rows: list[Rows], first: int, end: int, us: float) -> None:
        """Parts `first` … `end` − 1 of a pass over `rows` took `us`, and the head if they are the last."""
        kinds = self._kinds(first, end)
        expected = sum(self._us(kind, rows, n) for kind, n in kinds)
        if expected <= 0 or us <= 0:
            return
        large = sum(r.count for r in rows) >= LARGE_ROWS
        for kind in [kind for kind, _ in kinds] if large else [Kind.SMALL]:
            followed = self._factors[kind] * (us / expected) ** _NEW
            self._factors[kind] = min(_HIGHEST, max(_LOWEST, followed))

    def _kinds(self, first: int, end: int) -> list[tuple[Kind, int]]:
        """How many of each kind are among parts `first` … `end` − 1; the head is behind the last."""
        dense = 2 * (self.sizes.layers - self.sizes.moe_layers)
        mlps = min(end, dense) // 2 - min(first, dense) // 2
        counts = (
            (Kind.ATTENTION, (end + 1) // 2 - (first + 1) // 2),
            (Kind.MLP, mlps),
            (Kind.EXPERTS, end // 2 - first // 2 - mlps),
            (Kind.HEAD, int(end == self.sizes.parts)),
        )
        return [(kind, n) for kind, n in counts if n]

    def _us(self, kind: Kind, rows: list[Rows], times: int) -> float:
        """Microseconds of `times` parts of a kind."""
        sizes = self.sizes
        count = sum(r.count for r in rows)
        read: float
        if kind is Kind.ATTENTION:
            # Row i of n looks back on context − n + 1 + i tokens.
            looked_back = sum(r.count * r.context - r.count * (r.count - 1) // 2 for r in rows)
            read = sizes.attention.bytes + sizes.latent_bytes * sum(r.context for r in rows)
            ops = count * sizes.attention.row_ops + looked_back * sizes.context_ops
        elif kind is Kind.MLP:
            read, ops = sizes.mlp.bytes, count * sizes.mlp.row_ops
        elif kind is Kind.EXPERTS:
            read = sizes.shared.bytes + self.experts_read(count) * sizes.expert.bytes
            ops = count * (sizes.shared.row_ops + sizes.top_k * sizes.expert.row_ops)
        else:
            read, ops = sizes.head.bytes, len(rows) * sizes.head.row_ops
        factor = self._factors[kind if count >= LARGE_ROWS else Kind.SMALL]
        return times * factor * max(read / self._bytes_per_us, ops / self._ops_per_us)


def longest_layer_us(parts_us: Sequence[int]) -> int:
    """Of all layers' parts."""
    return max(map(sum, zip(parts_us[::2], parts_us[1::2], strict=True)), default=1)
