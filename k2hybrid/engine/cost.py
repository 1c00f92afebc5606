"""What a pass over the network takes, predicted in microseconds from bytes and operations. Layer 4; pure.

A pass over few rows is bound by what it reads: all dense weights once, and of the routed experts those that
any row chose. Of E experts, n rows that choose k each read about E·(1 − (1 − k/E)ⁿ): at true size 48 rows
read two thirds of them and 512 rows all, the bytes of 48 decode steps of one row. Large passes are bound by
operations. Which machine this is is learnt from the passes that were run: a factor each for small and large
passes follows the ratio of what they took to what was predicted.
"""

from __future__ import annotations

from dataclasses import dataclass

# From so many rows on a pass counts as a large one: torch shares its rows among threads.
LARGE_ROWS = 64
_NEW = 0.1  # weight of the newest pass in a factor
_LOWEST, _HIGHEST = 1e-3, 1e3


@dataclass(frozen=True, slots=True)
class NetworkSizes:
    """Bytes and operations of a network, as its builder counts them."""

    layers: int
    moe_layers: int
    dense_bytes: int  # read by every pass: all that is no routed expert
    expert_bytes: int  # of one expert
    experts: int  # in a layer
    top_k: int
    row_ops: int  # multiply-adds of one row through all layers, without attention over its context
    context_ops: int  # multiply-adds of one row for each token of its context, all layers
    latent_bytes: int  # of one token in the cache, all layers


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one sequence in a pass, and the tokens that its last row looks back on."""

    count: int
    context: int


class CostModel:
    """Predicts passes, and learns from those that were run.

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
        self._factors = [1.0, 1.0]  # small, large

    def experts_read(self, rows: int) -> float:
        """Expected distinct experts that `rows` rows read in one layer, routing taken as even."""
        sizes = self.sizes
        if not sizes.experts:
            return 0.0
        return sizes.experts * (1.0 - (1.0 - sizes.top_k / sizes.experts) ** rows)

    def pass_us(self, rows: list[Rows]) -> int:
        """Microseconds of a whole pass over `rows`, at least 1; 0 for none."""
        count = sum(r.count for r in rows)
        if not count:
            return 0
        return max(1, round(self._raw_us(rows, count) * self._factors[count >= LARGE_ROWS]))

    def layer_us(self, rows: list[Rows]) -> int:
        """Microseconds of one layer of a pass over `rows`, on average; at least 1."""
        return max(1, self.pass_us(rows) // max(1, self.sizes.layers))

    def observe(self, rows: list[Rows], layers: int, us: float) -> None:
        """`layers` layers of a pass over `rows` took `us` microseconds."""
        count = sum(r.count for r in rows)
        expected = self._raw_us(rows, count) * layers / max(1, self.sizes.layers) if count else 0.0
        if expected <= 0 or us <= 0:
            return
        large = count >= LARGE_ROWS
        followed = self._factors[large] ** (1 - _NEW) * (us / expected) ** _NEW
        self._factors[large] = min(_HIGHEST, max(_LOWEST, followed))

    def _raw_us(self, rows: list[Rows], count: int) -> float:
        sizes = self.sizes
        read = sizes.dense_bytes + sizes.moe_layers * self.experts_read(count) * sizes.expert_bytes
        read += sum(sizes.latent_bytes * r.context for r in rows)
        # Row i of n looks back on context − n + 1 + i tokens.
        looked_back = sum(r.count * r.context - r.count * (r.count - 1) // 2 for r in rows)
        ops = count * sizes.row_ops + looked_back * sizes.context_ops
        return max(read / self._bytes_per_us, ops / self._ops_per_us)
