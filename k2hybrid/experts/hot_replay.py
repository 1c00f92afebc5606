"""Replays a routing trace against the hot set: which share of the uses the card would have served. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from k2hybrid.experts.hot import Counts, HotPolicy, HotRules
from k2hybrid.experts.traces import Trace


@dataclass(frozen=True, slots=True)
class HotReplay:
    """Over the passes after the warm-up.

    Attributes:
        share: of the uses, those whose expert was on the card.
        best: the same for the set that is best for just these passes and never changes: the oracle.
        moves: experts that came, per pass.
    """

    share: float
    best: float
    moves: float


def replay_hot(trace: Trace, capacity: int, rules: HotRules | None = None, warm_up: int = 0) -> HotReplay:
    """Passes of `trace`, each one step; a use is an expert that a hand-off asks for, however many rows do.

    What is decided after a step is there one interval later: bytes have to travel. What leaves is gone at
    once.
    """
    used = uses_by_pass(trace)
    passes, layers, experts = used.shape
    policy = HotPolicy(layers, experts, capacity, rules)
    interval = policy.rules.interval
    here = np.zeros((layers, experts), np.bool_)
    coming: list[tuple[int, int]] = []
    served = asked = moved = 0
    for start in range(0, passes, interval):
        block = used[start : start + interval]
        late = block[max(warm_up - start, 0) :]
        served += int(late[:, here].sum())
        asked += int(late.sum())
        for key in coming:
            here[key] = True
        policy.observe(block.sum(0), len(block))
        moves = policy.decide()
        for move in moves:
            if move.leaves is not None:
                here[move.leaves] = False
        coming = [move.comes for move in moves]
        moved += len(moves) if start >= warm_up else 0
    best = np.sort(used[warm_up:].sum(0), axis=None)[::-1][: policy.capacity].sum()
    left = max(passes - warm_up, 1)
    return HotReplay(served / max(asked, 1), float(best) / max(asked, 1), moved / left)


def uses_by_pass(trace: Trace) -> Counts:
    """[passes, layers that occur, experts], 1 where a pass used the expert."""
    layers = trace.moe_layers
    place = np.searchsorted(layers, trace.layer)
    at = np.cumsum(trace.layer == layers[0]) - 1 if layers else np.zeros(0, np.int64)
    passes = int(at[-1]) + 1 if len(at) else 0
    used = np.zeros((passes, len(layers), trace.header.experts))
    count = np.diff(trace.starts)
    real = trace.ids >= 0
    used[np.repeat(at, count)[real], np.repeat(place, count)[real], trace.ids[real]] = 1.0
    return used
