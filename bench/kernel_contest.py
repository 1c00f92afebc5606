"""Runs the cases of `bench/kernel.py`, each run between two probes of the same memory and threads."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from bench.expert_memory import ExpertMemory
from bench.kernel_cases import (
    HIDDEN,
    TOP_K,
    Case,
    Lap,
    Probe,
    Round,
    ceilings,
    dense_operations,
    expert_operations,
)
from k2hybrid.config import DenseWeights
from k2hybrid.errors import NativeError
from k2hybrid.hardware.bandwidth import ReadVariant
from k2hybrid.native.handoff import NativeDispatcher
from k2hybrid.native.machine import Machine
from k2hybrid.types import LinearWeight, Weight8

PROBES = (
    *(ReadVariant(streams) for streams in (1, 2, 4)),
    ReadVariant(1, 4096),
    *(ReadVariant(streams, 0, None) for streams in (1, 2, 4)),
)


# Of a round, for cases that are over sooner: a single run would begin with sleeping threads.
_ROUND_SECONDS = 0.06
_MOST_LAPS = 16


class Team:
    """A machine of some threads, and a hand-off that holds random activations."""

    def __init__(self, memory: ExpertMemory, cases: Sequence[Case], threads: int | None) -> None:
        self.machine = Machine(threads)
        self.machine.pin_caller()
        self.peak_kind = "fp32" if self.machine.peak("bf16") is None else "bf16"
        self._memory = memory
        self._matrices = _matrices(memory.dense)
        random = torch.Generator().manual_seed(2)
        rows = max(case.tokens for case in cases)
        self._x = torch.randn(rows, HIDDEN, generator=random).bfloat16()
        if any(case.experts for case in cases):
            self._native = NativeDispatcher(
                memory.store.native, self.machine, hidden=HIDDEN, max_rows=rows, top_k=TOP_K, slots=1
            )
            self._slot = self._native.slots[0]
            self._slot.x.copy_(self._x)
            self._slot.weights.copy_(torch.rand(rows, TOP_K, generator=random))

    def run(self, case: Case, routings: Sequence[torch.Tensor]) -> Lap:
        """The case, once for each routing and without a pause between: as layers follow each other.

        Args:
            routings: int32 [tokens or more, TOP_K] each, of which the first rows count.

        Returns:
            Means over the routings.

        Raises:
            NativeError: an expert could not be read.
        """
        lap = self._layer if case.experts else self._dense
        laps = [lap(case, routing) for routing in routings]
        seconds, nbytes = (sum(part) / len(laps) for part in zip(*laps, strict=True))
        dense = dense_operations(case.tokens, case.dense)
        operations = expert_operations(case.tokens) if case.experts else dense
        return Lap(seconds, nbytes, operations)

    def _layer(self, case: Case, routing: torch.Tensor) -> tuple[float, int]:
        """Seconds from submit to collect, and the bytes of the experts read."""
        ids = routing[: case.tokens]
        slot = self._native.acquire()
        self._slot.ids[: case.tokens].copy_(ids)
        start = time.perf_counter()
        report = self._native.collect(slot, self._native.submit(slot, 0, case.tokens), case.tokens)
        seconds = time.perf_counter() - start
        if any(report.status):
            raise NativeError(f"{case.name}: an expert could not be read")
        return seconds, report.bytes_read

    def _dense(self, case: Case, _: torch.Tensor) -> tuple[float, int]:
        weight = self._matrices[case.dense]
        start = time.perf_counter()
        self.machine.linear(self._x[: case.tokens], weight)
        return time.perf_counter() - start, weight.nbytes

    def probe(self) -> Probe:
        """What the machine can do now, on the same memory."""
        peak = self.machine.peak(self.peak_kind)
        assert peak is not None
        data = self._memory.window()
        return Probe(tuple(data.nbytes / variant.seconds(self.machine, data) for variant in PROBES), peak)


def _matrices(dense: torch.Tensor) -> dict[DenseWeights, LinearWeight]:
    """The dense matrix, and its bytes taken as 8-bit values; what would be NaN takes no longer."""
    values = dense.view(torch.uint8).view(-1, dense.shape[1])
    scale = torch.ones(len(values))
    return {
        "bf16": dense,
        "int8": Weight8(values.view(torch.int8), scale, "int8"),
        "fp8": Weight8(values, scale, "fp8"),
    }


class Router:
    """Fresh random routing for every run: each token picks `TOP_K` of the experts, all equally likely."""

    def __init__(self, seed: int = 0) -> None:
        self._random = torch.Generator().manual_seed(seed)

    def draw(self, tokens: int, experts: int, laps: int) -> list[torch.Tensor]:
        """int32 [tokens, TOP_K] for each lap; without experts they say nothing."""
        chosen = torch.rand(laps, tokens, max(experts, TOP_K), generator=self._random)
        return list(chosen.topk(TOP_K).indices.int())


def contest(team: Team, case: Case, router: Router, rounds: int, most_seconds: float) -> list[Round]:
    """Rounds of one case after one to warm up; at least three, however long they take."""
    warm = team.run(case, router.draw(case.tokens, case.experts, 1))
    count = _laps(warm.seconds)
    probes, laps = [team.probe()], list[Lap]()
    end = time.perf_counter() + most_seconds
    while len(laps) < rounds and (len(laps) < 3 or time.perf_counter() < end):
        laps.append(team.run(case, router.draw(case.tokens, case.experts, count)))
        probes.append(team.probe())
    return _rounds(laps, probes)


def _rounds(laps: Sequence[Lap], probes: Sequence[Probe]) -> list[Round]:
    """Each lap with the ceiling between the probes around it."""
    return [
        Round(lap.seconds, lap.nbytes, lap.operations, ceiling)
        for lap, ceiling in zip(laps, ceilings(probes), strict=True)
    ]


def _laps(seconds: float) -> int:
    """How often a case of so many seconds runs in a round."""
    return max(1, min(_MOST_LAPS, round(_ROUND_SECONDS / seconds)))


def contest_in_turn(team: Team, cases: Sequence[Case], router: Router, rounds: int) -> list[list[Round]]:
    """Rounds of every case, the cases taking turns within each; the first is to warm up.

    Within a round each case gets the first rows of one routing, so that more tokens never read less.
    """
    found: list[list[Lap]] = [[] for _ in cases]
    most = max(case.tokens for case in cases)
    routings = router.draw(most, cases[0].experts, 1)
    counts = [_laps(team.run(case, routings).seconds) for case in cases]
    probes = [team.probe()]
    for _ in range(rounds):
        routings = router.draw(most, cases[0].experts, max(counts))
        for case, done, count in zip(cases, found, counts, strict=True):
            done.append(team.run(case, routings[:count]))
        probes.append(team.probe())
    return [_rounds(laps, probes) for laps in found]
