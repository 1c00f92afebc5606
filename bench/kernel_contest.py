"""Runs the cases of `bench/kernel.py`, each run right after a probe of the same memory and threads."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from bench.expert_memory import ExpertMemory
from bench.kernel_cases import (
    HIDDEN,
    TOP_K,
    Case,
    Ceiling,
    Round,
    dense_operations,
    expert_operations,
)
from k2hybrid.errors import NativeError
from k2hybrid.hardware.bandwidth import ReadVariant, quick_gb_s
from k2hybrid.native import Machine, NativeDispatcher

PROBES = (
    *(ReadVariant(streams) for streams in (1, 2, 4)),
    ReadVariant(1, 4096),
    *(ReadVariant(streams, 0, None) for streams in (1, 2, 4)),
)


class Team:
    """A machine of some threads, and a hand-off that holds random activations."""

    def __init__(self, memory: ExpertMemory, cases: Sequence[Case], threads: int | None) -> None:
        self.machine = Machine(threads)
        self.machine.pin_caller()
        self.peak_kind = "fp32" if self.machine.peak("bf16") is None else "bf16"
        self._memory = memory
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

    def run(self, case: Case, routing: torch.Tensor | None) -> Round:
        """Probe, then the case.

        Args:
            routing: int32 [tokens or more, TOP_K], of which the first rows count; None for the dense matrix.

        Raises:
            NativeError: an expert could not be read.
        """
        ceiling = self._ceiling()
        if routing is None:
            return self._dense(case.tokens, ceiling)
        ids = routing[: case.tokens]
        nbytes = int(torch.unique(ids).numel()) * self._memory.store.expert_bytes
        slot = self._native.acquire()
        self._slot.ids[: case.tokens].copy_(ids)
        start = time.perf_counter()
        report = self._native.collect(slot, self._native.submit(slot, 0, case.tokens), case.tokens)
        seconds = time.perf_counter() - start
        if any(report.status):
            raise NativeError(f"{case.name}: an expert could not be read")
        return Round(seconds, nbytes, expert_operations(case.tokens), ceiling)

    def _dense(self, tokens: int, ceiling: Ceiling) -> Round:
        x = self._x[:tokens]
        start = time.perf_counter()
        self.machine.linear(x, self._memory.dense)
        seconds = time.perf_counter() - start
        return Round(seconds, self._memory.dense.nbytes, dense_operations(tokens), ceiling)

    def _ceiling(self) -> Ceiling:
        peak = self.machine.peak(self.peak_kind)
        assert peak is not None
        return Ceiling(quick_gb_s(self.machine, self._memory.window(), PROBES) * 1e9, peak)


class Router:
    """Fresh random routing for every run: each token picks `TOP_K` of the experts, all equally likely."""

    def __init__(self, seed: int = 0) -> None:
        self._random = torch.Generator().manual_seed(seed)

    def draw(self, tokens: int, experts: int) -> torch.Tensor | None:
        """int32 [tokens, TOP_K]; None where there are no experts."""
        if experts == 0:
            return None
        return torch.rand(tokens, experts, generator=self._random).topk(TOP_K).indices.int()


def contest(team: Team, case: Case, router: Router, rounds: int, most_seconds: float) -> list[Round]:
    """Rounds of one case after one to warm up; at least three, however long they take."""
    found: list[Round] = []
    team.run(case, router.draw(case.tokens, case.experts))
    end = time.perf_counter() + most_seconds
    while len(found) < rounds and (len(found) < 3 or time.perf_counter() < end):
        found.append(team.run(case, router.draw(case.tokens, case.experts)))
    return found


def contest_in_turn(team: Team, cases: Sequence[Case], router: Router, rounds: int) -> list[list[Round]]:
    """Rounds of every case, the cases taking turns within each; the first is to warm up.

    Within a round each case gets the first rows of one routing, so that more tokens never read less.
    """
    found: list[list[Round]] = [[] for _ in cases]
    most = max(case.tokens for case in cases)
    for warm in range(rounds + 1):
        routing = router.draw(most, cases[0].experts)
        for case, done in zip(cases, found, strict=True):
            one = team.run(case, routing)
            if warm:
                done.append(one)
    return found
