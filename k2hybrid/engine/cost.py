"""What a pass over the network takes, predicted in microseconds from bytes and operations. Layer 4; pure.

A layer has several parts, attention by groups of heads and feed-forward; a pass may stop between them. A part
over few rows is bound by what it reads: its dense weights once, and of the routed experts those that any row
chose. Of E experts, n rows that choose k each read about E·(1 − (1 − k/E)ⁿ): at true size 48 rows read two
thirds of them and 512 rows all, the bytes of 48 decode steps. Parts over many rows are bound by operations.
Which machine this is is learnt from what was run: a factor for small passes, and for large ones a factor for
each kind of part, follows the ratio of what they took to what was predicted. What comes with every pass and
is none of it (events, admission, planning) is learnt as a time of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, auto

# From so many rows on a pass counts as a large one: torch shares its rows among threads.
LARGE_ROWS = 64
_NEW = 0.1  # weight of the newest pass in a factor
_STALL = 10  # what is beside a pass counts as so many times its mean at most: rare stalls are not predicted
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
    context_ops: int = 0  # multiply-adds of one row for each token of its context, attending in latent space
    latent_bytes: int = 0  # of one token in the cache
    attention_parts: int = 1
    # Sequences of fewer rows attend in latent space, in the first of those parts. Others share the parts, and
    # make keys and values of their context first.
    whole_below: int = 0
    pair_ops: int = 0  # multiply-adds of one row for each token of its context, over keys and values
    key_ops: int = 0  # of making a token's keys and values

    @property
    def mlp_layers(self) -> int:
        """Those with an MLP."""
        return self.layers - self.moe_layers

    @property
    def layer_parts(self) -> int:
        """Those of attention, and feed-forward."""
        return self.attention_parts + 1

    @property
    def parts(self) -> int:
        """Of all layers, one layer after the other."""
        return self.layers * self.layer_parts


@dataclass(slots=True)  # not frozen, which would make it four times as slowly, for every token
class Rows:
    """Rows of one sequence in a pass, and the tokens that its last row looks back on."""

    count: int
    context: int

    @property
    def pairs(self) -> int:
        """Of a row and a token that it looks back on: row i of n on context − n + 1 + i."""
        return self.count * self.context - self.count * (self.count - 1) // 2


class Kind(IntEnum):  # of integers, whose hashes are quick
    """What is learnt apart."""

    SMALL = auto()  # a pass over few rows
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
        self._rest_us = 0.0  # of a pass, beside the model
        parts = (
            (sizes.layers, sizes.attention), (sizes.mlp_layers, sizes.mlp), (sizes.moe_layers, sizes.shared),
            (1, sizes.head),
        )  # fmt: skip
        self._dense_bytes = sum(times * dense.bytes for times, dense in parts)
        self._row_ops = sum(times * dense.row_ops for times, dense in parts)
        self._row_ops += sizes.moe_layers * sizes.top_k * sizes.expert.row_ops

    def experts_read(self, rows: int) -> float:
        """Expected distinct experts that `rows` rows read in one layer, routing taken as even."""
        sizes = self.sizes
        if not sizes.experts:
            return 0.0
        return sizes.experts * (1.0 - (1.0 - sizes.top_k / sizes.experts) ** rows)

    def pass_us(self, rows: list[Rows]) -> int:
        """Microseconds of a whole pass over `rows` and what comes with it, at least 1; 0 for none."""
        count = sum([r.count for r in rows])
        if not count:
            return 0
        if count < LARGE_ROWS:
            return max(1, round(self._rest_us + self._factors[Kind.SMALL] * self._small_us(rows, count)))
        return max(1, round(self._rest_us + sum(self._large_us(rows).values())))

    def parts_us(self, rows: list[Rows]) -> list[int]:
        """Microseconds of each part of a pass over `rows`, at least 1 each."""
        layer = self._layer(rows)
        attention = [max(1, round(us)) for us in layer.attention]
        mlp, experts = max(1, round(layer.mlp_us)), max(1, round(layer.experts_us))
        return [*(*attention, mlp) * self.sizes.mlp_layers, *(*attention, experts) * self.sizes.moe_layers]

    def layer_us(self, rows: list[Rows]) -> int:
        """Microseconds of the longest layer of a pass over `rows`; at least 1."""
        return longest_layer_us(self.parts_us(rows), self.sizes.layer_parts)

    def observe(self, rows: list[Rows], first: int, end: int, us: float, *, logits: bool = True) -> None:
        """Parts `first` … `end` − 1 of a pass over `rows` took `us`.

        Args:
            logits: with the head, if they are the last.
        """
        count, sizes = sum([r.count for r in rows]), self.sizes
        if count >= LARGE_ROWS:
            if end - first == sizes.parts:
                expected = self._large_us(rows)
            else:
                expected, layer = {}, self._layer(rows)
                for part in range(first, end):
                    kind, part_us = layer.part(part, sizes.mlp_layers)
                    expected[kind] = expected.get(kind, 0.0) + part_us
                if end == sizes.parts:
                    expected[Kind.HEAD] = self._head_us(rows)
            if not logits:
                expected[Kind.HEAD] = 0.0
        elif end - first == sizes.parts:
            expected = {Kind.SMALL: self._factors[Kind.SMALL] * self._small_us(rows, count)}
        else:
            return  # a part alone says little of decode steps, which have this factor, too
        predicted = sum(expected.values())
        if predicted <= 0 or us <= 0:
            return
        for kind, part_us in expected.items():
            if part_us:
                followed = self._factors[kind] * (us / predicted) ** _NEW
                self._factors[kind] = min(_HIGHEST, max(_LOWEST, followed))

    def observe_rest(self, us: float) -> None:
        """Beside its parts a whole pass took so much more."""
        if self._rest_us:
            us = min(us, _STALL * self._rest_us)
        self._rest_us += _NEW * (max(us, 0.0) - self._rest_us)

    def _small_us(self, rows: list[Rows], count: int) -> float:
        """Of a pass as a whole, without its factor: quickly, since every decode step asks."""
        sizes = self.sizes
        read = self._dense_bytes + sizes.moe_layers * self.experts_read(count) * sizes.expert.bytes
        context = sum([r.context for r in rows])
        read += sizes.layers * sizes.latent_bytes * context
        pairs = context if count == len(rows) else sum([r.pairs for r in rows])
        ops = count * self._row_ops + sizes.layers * sizes.context_ops * pairs
        return max(read / self._bytes_per_us, ops / self._ops_per_us)

    def _large_us(self, rows: list[Rows]) -> dict[Kind, float]:
        """Of a pass, by kind of part."""
        sizes, layer = self.sizes, self._layer(rows)
        return {
            Kind.ATTENTION: sizes.layers * sum(layer.attention),
            Kind.MLP: sizes.mlp_layers * layer.mlp_us,
            Kind.EXPERTS: sizes.moe_layers * layer.experts_us,
            Kind.HEAD: self._head_us(rows),
        }

    def _layer(self, rows: list[Rows]) -> _Layer:
        sizes = self.sizes
        count = sum(r.count for r in rows)
        experts = self._us(
            Kind.EXPERTS,
            count,
            sizes.shared.bytes + self.experts_read(count) * sizes.expert.bytes,
            count * (sizes.shared.row_ops + sizes.top_k * sizes.expert.row_ops),
        )
        mlp = self._us(Kind.MLP, count, sizes.mlp.bytes, count * sizes.mlp.row_ops)
        return _Layer(self._attention_us(rows, count), mlp, experts)

    def _attention_us(self, rows: list[Rows], count: int) -> list[float]:
        """Microseconds of each part: projections into it are in the first, out of it in the last."""
        sizes, parts = self.sizes, self.sizes.attention_parts
        dense = sizes.attention
        expanded = read = absorbed = read_whole = 0
        for r in rows:
            if r.count < sizes.whole_below:
                absorbed, read_whole = absorbed + r.pairs * sizes.context_ops, read_whole + r.context
            else:
                expanded += r.pairs * sizes.pair_ops + r.context * sizes.key_ops
                read += r.context
        us = []
        for part in range(parts):
            ends = (part == 0) + (part == parts - 1)
            whole = part == 0
            nbytes = dense.bytes * ends / 2 + sizes.latent_bytes * (read + whole * read_whole)
            ops = count * dense.row_ops * ends / 2 + expanded / parts + whole * absorbed
            us.append(self._us(Kind.ATTENTION, count, nbytes, ops))
        return us

    def _head_us(self, rows: list[Rows]) -> float:
        head = self.sizes.head
        return self._us(Kind.HEAD, sum(r.count for r in rows), head.bytes, len(rows) * head.row_ops)

    def _us(self, kind: Kind, count: int, nbytes: float, ops: float) -> float:
        """Microseconds of a part of a pass over `count` rows."""
        factor = self._factors[kind if count >= LARGE_ROWS else Kind.SMALL]
        return factor * max(nbytes / self._bytes_per_us, ops / self._ops_per_us)


@dataclass(frozen=True, slots=True)
class _Layer:
    """Microseconds of the parts of a layer: of attention, and of either kind of feed-forward."""

    attention: list[float]
    mlp_us: float
    experts_us: float

    def part(self, at: int, mlps: int) -> tuple[Kind, float]:
        """Part `at` of a pass whose first so many layers have an MLP."""
        layer, part = divmod(at, len(self.attention) + 1)
        if part < len(self.attention):
            return Kind.ATTENTION, self.attention[part]
        return (Kind.MLP, self.mlp_us) if layer < mlps else (Kind.EXPERTS, self.experts_us)


def longest_layer_us(parts_us: Sequence[int], layer_parts: int) -> int:
    """Of layers of so many parts each."""
    return max(sum(parts_us[at : at + layer_parts]) for at in range(0, len(parts_us), layer_parts))
