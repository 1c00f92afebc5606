"""What `bench/kernel.py` measures, and the arithmetic of its limits. Pure: nothing here runs a kernel."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import pairwise

from k2hybrid.config import DenseWeights

HIDDEN = 7168
INTER = 2048
TOP_K = 8
DENSE_ROWS, DENSE_COLUMNS = 18432, 7168  # the gate of the dense layer, the largest bf16 matrix but the head

EIGHT_BITS: tuple[DenseWeights, ...] = ("int8", "fp8")
TOKENS = (1, 2, 4, 8, 16, 32, 128, 512, 2048)
SWEEP_EXPERTS = 48
SWEEP_TOKENS = (*range(1, 65), 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)
FULL_EXPERT_TOKENS = 64  # from here on an expert's arithmetic is the limit on any machine
MOST_DROP = 0.05  # of tokens/s from one number of tokens to the next
_BARS = {  # (experts, tokens); 0 experts: the dense matrix
    (48, 1): 0.93, (384, 8): 0.85, (384, 32): 0.85, (384, 128): 0.70, (384, 512): 0.60,
    (0, 1): 0.90, (0, 512): 0.60,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """One row: `tokens` through `experts` routed experts, or through the dense matrix (`experts` 0)."""

    name: str
    tokens: int
    experts: int
    threads: int | None = None  # None: all
    judged: bool = True  # has a bar, if there is one for its kind
    dense: DenseWeights = "bf16"  # the matrix; in 8 bits it has twice the rows, in the same bytes

    @property
    def tokens_an_expert(self) -> float:
        """Mean over the experts; 0 for the dense matrix."""
        return self.tokens * TOP_K / self.experts if self.experts else 0.0


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What the machine could do in one round: bytes per second and operations per second."""

    bytes_s: float
    operations_s: float

    def seconds(self, nbytes: float, operations: float) -> float:
        """The least time for that many bytes and operations, if both overlap perfectly."""
        return max(nbytes / self.bytes_s, operations / self.operations_s)

    def binds(self, nbytes: float, operations: float) -> str:
        """Which of the two takes longer."""
        return "memory" if nbytes / self.bytes_s >= operations / self.operations_s else "compute"


@dataclass(frozen=True, slots=True)
class Probe:
    """What the machine could do at one moment: bytes/s of every read variant, operations/s."""

    bytes_s: tuple[float, ...]
    operations_s: float


def ceilings(probes: Sequence[Probe]) -> list[Ceiling]:
    """One between each two neighbours of `probes`, their mean.

    The variant whose median is best counts in all of them: the best of each moment would be the luckiest.
    """
    best = max(
        range(len(probes[0].bytes_s)), key=lambda i: statistics.median(probe.bytes_s[i] for probe in probes)
    )
    return [
        Ceiling(
            (before.bytes_s[best] + after.bytes_s[best]) / 2, (before.operations_s + after.operations_s) / 2
        )
        for before, after in pairwise(probes)
    ]


@dataclass(frozen=True, slots=True)
class Lap:
    """One measured run."""

    seconds: float
    nbytes: float
    operations: float


@dataclass(frozen=True, slots=True)
class Round:
    """One measured run beside the ceiling of its round."""

    seconds: float
    nbytes: float
    operations: float
    ceiling: Ceiling

    @property
    def share(self) -> float:
        """Of the limit; above 1 only if the probe was poor."""
        return self.ceiling.seconds(self.nbytes, self.operations) / self.seconds


def expert_operations(tokens: int) -> int:
    """Of `tokens` tokens in `TOP_K` experts each: three matrices, a multiply and an add a weight."""
    return 2 * 3 * HIDDEN * INTER * tokens * TOP_K


def dense_operations(tokens: int, dense: DenseWeights = "bf16") -> int:
    """Of `tokens` rows through the dense matrix."""
    rows = DENSE_ROWS if dense == "bf16" else 2 * DENSE_ROWS
    return 2 * rows * DENSE_COLUMNS * tokens


def cases() -> list[Case]:
    """All rows, in the order of the report."""
    return [
        *(Case(f"{experts}x{tokens}", tokens, experts) for experts in (48, 384) for tokens in TOKENS),
        Case("48x1-one-thread", 1, 48, threads=1),
        *(Case(f"{tokens}-an-expert", tokens * 48 // TOP_K, 48) for tokens in (64, 128)),
        Case("dense-1", 1, 0),
        Case("dense-512", 512, 0),
        *(
            Case(f"{kind}-{tokens}", tokens, 0, judged=False, dense=kind)
            for kind in EIGHT_BITS
            for tokens in (1, 512)
        ),
    ]


def sweep() -> list[Case]:
    """Every number of tokens at few experts, to find cliffs; without bars of their own."""
    return [Case(f"sweep-{tokens}", tokens, SWEEP_EXPERTS, judged=False) for tokens in SWEEP_TOKENS]


def bar(case: Case, threads: int) -> float | None:
    """The least share of the limit that `case` must reach, if any."""
    if not case.judged:
        return None
    if (case.experts, case.tokens) == (48, 1) and threads == 1:
        return 0.82
    if case.experts and case.tokens_an_expert >= FULL_EXPERT_TOKENS:
        return 0.65
    return _BARS.get((case.experts, case.tokens))


def chosen(among: Sequence[Case], patterns: Sequence[str]) -> list[Case]:
    """The cases whose name fits one of `patterns` (shell wildcards); all if there is none.

    Raises:
        ValueError: a pattern fits no case.
    """
    for pattern in patterns:
        if not any(fnmatch(case.name, pattern) for case in among):
            raise ValueError(f"no case is named {pattern!r}; there are {', '.join(c.name for c in among)}")
    return [case for case in among if not patterns or any(fnmatch(case.name, p) for p in patterns)]


def median_share(rounds: Sequence[Round]) -> float:
    """The figure that a bar is held against."""
    return statistics.median(one.share for one in rounds)


def neighbour_drops(
    tokens: Sequence[int], seconds: Sequence[Sequence[float]]
) -> list[tuple[int, int, float]]:
    """Where more tokens are slower: (tokens, next, relative drop of tokens/s) above `MOST_DROP`.

    Args:
        tokens: ascending numbers of tokens.
        seconds: of each number of tokens, by round. Ratios are taken within a round, and their median
            counts, so that a drift of the machine between rounds is no drop.
    """
    found = []
    for i in range(len(tokens) - 1):
        gain = statistics.median(
            tokens[i + 1] / after / (tokens[i] / before)
            for before, after in zip(seconds[i], seconds[i + 1], strict=True)
        )
        if 1 - gain > MOST_DROP:
            found.append((tokens[i], tokens[i + 1], 1 - gain))
    return found
