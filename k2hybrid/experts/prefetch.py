"""Would reading the next layer's experts ahead, by a look-ahead of its router, make steps shorter? By replay.

A step alternates: experts of a layer, then the dense weights up to the next layer's hand-off. At a hand-off
what is missing is read, one after the other, while present experts compute; so it takes the longer of

    present experts · bytes / RAM rate
    missing experts · bytes / disk rate, after what the disk had begun before

With prefetch the hand-off also says which experts the next layer will probably ask for. From the moment the
disk has nothing left to do for this hand-off until the next one comes, those that are absent are read,
likeliest first. A read that has begun is not broken off, so it may delay what is really missing; or only
such reads begin as will end before the next hand-off. Reading ahead
pushes out neither experts in use nor those foreseen, and is no use: what is then not asked for leaves first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from k2hybrid.errors import ConfigError
from k2hybrid.experts import slot_kernels
from k2hybrid.experts.simulate import PolicyName, Tickets, policy_of
from k2hybrid.experts.slot_kernels import RECENCY, Floats, Ints, Longs
from k2hybrid.experts.traces import Trace


@dataclass(frozen=True, slots=True)
class Rates:
    """The machine and the model, in bytes and bytes per second.

    dense_bytes: read from RAM (or by a GPU, at that rate) between two hand-offs.
    """

    expert_bytes: float
    dense_bytes: float
    ram: float
    disk: float
    dense: float | None = None  # rate of the dense weights, if not RAM's

    def __post_init__(self) -> None:
        least = (self.expert_bytes, self.ram, self.disk, self.dense or self.ram)
        if not (min(least) > 0 <= self.dense_bytes and all(map(math.isfinite, (*least, self.dense_bytes)))):
            raise ConfigError(f"rates and sizes must be positive numbers: {self}")


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of a whole trace, and what was read.

    Attributes:
        missed: experts that a hand-off had to read itself.
        read_ahead: experts read before they were asked for.
        used: of them, those that the next hand-off of their layer asked for while they were there.
    """

    seconds: float
    passes: float
    missed: int
    read_ahead: int
    used: int

    @property
    def step_ms(self) -> float:
        """Of one pass."""
        return 1e3 * self.seconds / self.passes if self.passes else 0.0


@dataclass(frozen=True, slots=True)
class PrefetchGain:
    """The same trace without and with prefetch."""

    without: StepTimes
    ahead: StepTimes

    @property
    def gain(self) -> float:
        """By how much tokens/s rise; negative: a loss."""
        return self.without.seconds / self.ahead.seconds - 1 if self.ahead.seconds else 0.0


def prefetch_gain(
    trace: Trace,
    slots: int,
    rates: Rates,
    *,
    width: int,
    policy: PolicyName = "lru",
    half_life: float | None = None,
    in_time: bool = False,
) -> PrefetchGain:
    """Replay a trace that has predictions, without and with reading ahead.

    Args:
        width: of each row's predicted ids the first `width` are used: top_k, or some more.
        in_time: only reads begin that end before the next hand-off, so that none delays what is missing.

    Raises:
        ConfigError: the trace has fewer predicted ids, `slots` are too few, or the policy knows the future.
    """
    if not 1 <= width <= trace.header.ahead:
        raise ConfigError(f"the trace has {trace.header.ahead} predicted ids a row, not {width}")
    without = step_times(trace, slots, rates, width=0, policy=policy, half_life=half_life)
    return PrefetchGain(
        without,
        step_times(trace, slots, rates, width=width, policy=policy, half_life=half_life, in_time=in_time),
    )


def step_times(
    trace: Trace,
    slots: int,
    rates: Rates,
    *,
    width: int = 0,
    policy: PolicyName = "lru",
    half_life: float | None = None,
    in_time: bool = False,
    warm_up: int = 0,
) -> StepTimes:
    """One replay; `width` 0: nothing is read ahead. Arguments and errors as in `prefetch_gain`.

    warm_up: tickets at the beginning that only fill the slots: their time is not counted.
    """
    tickets = Tickets.of(trace)
    if slots < max(tickets.largest, 1):
        raise ConfigError(f"{slots} slots are too few: one hand-off asks for {tickets.largest} experts")
    rule = policy_of(policy, half_life, tickets.moe_layers)
    if rule.kind != RECENCY:
        raise ConfigError(f"prefetch is replayed with lru, lrfu or lrfu-ghost, not {policy}")
    starts, ahead = _candidates(trace, width)
    state = slot_kernels.new_slots(
        tickets.layers * tickets.experts, min(slots, tickets.layers * tickets.experts)
    )
    times = np.array([
        rates.expert_bytes / rates.ram,
        rates.expert_bytes / rates.disk,
        rates.dense_bytes / (rates.dense or rates.ram),
    ])  # fmt: skip
    counts = np.zeros(3, np.int64)
    seconds = _run(state, rule, tickets.starts, tickets.codes, starts, ahead, times, counts, in_time, warm_up)
    passes = max(len(trace) - warm_up, 0) / max(tickets.moe_layers, 1)
    return StepTimes(float(seconds), passes, *counts.tolist())


def recall(trace: Trace, width: int) -> float:
    """The share of a ticket's distinct experts that the `width` first ids a row foresaw, where any were.

    Only predictions that the very next ticket answers count.
    """
    tickets = Tickets.of(trace)
    starts, ahead = _candidates(trace, width)
    found = asked = 0
    for ticket in np.nonzero(trace.ahead_layer[:-1] == trace.layer[1:])[0]:
        true = tickets.codes[tickets.starts[ticket + 1] : tickets.starts[ticket + 2]]
        found += len(np.intersect1d(true, ahead[starts[ticket] : starts[ticket + 1]]))
        asked += len(true)
    return found / asked if asked else 0.0


def _candidates(trace: Trace, width: int) -> tuple[Longs, Ints]:
    """Codes foreseen at each ticket, distinct, likeliest first: all rows' first ids, then their second, ….

    Returns:
        starts [tickets + 1], codes.
    """
    header = trace.header
    ahead = trace.ahead_layer, trace.ahead_starts, trace.ahead_ids
    return _ranked(*ahead, header.layers, header.experts, header.ahead, width)


@slot_kernels.compiled
def _ranked(
    layer: Ints, starts: Longs, ids: Ints, layers: int, experts: int, ahead: int, width: int
) -> tuple[Longs, Ints]:
    seen = np.full(layers * experts, -1)  # the last ticket at which it was foreseen
    begins = np.zeros(len(layer) + 1, np.int64)
    codes = np.empty(len(ids), np.int32)
    count = 0
    for ticket in range(len(layer)):
        first = starts[ticket]
        rows = (starts[ticket + 1] - first) // max(ahead, 1)
        for rank in range(width):
            for row in range(rows):
                expert = ids[first + row * ahead + rank]
                code = layer[ticket] * experts + expert
                if expert >= 0 and seen[code] != ticket:
                    seen[code] = ticket
                    codes[count] = code
                    count += 1
        begins[ticket + 1] = count
    return begins, codes[:count]


@slot_kernels.compiled
def _run(
    s: slot_kernels.Slots,
    policy: slot_kernels.Policy,
    starts: Longs,
    codes: Ints,
    ahead_starts: Longs,
    ahead: Ints,
    times: Floats,
    counts: Longs,
    in_time: bool,
    warm_up: int,
) -> float:
    """Seconds of the tickets after `warm_up`.

    times: to compute an expert, to read one, a layer's dense weights.
    counts: missed, read ahead, and used of those.
    """
    compute, read, dense = times[0], times[1], times[2]
    ready = np.zeros(len(s.score))  # when an expert's bytes are there
    fresh = np.zeros(len(s.score), np.bool_)  # read ahead, not yet asked for
    hit = np.empty(len(s.held), np.bool_)
    slot = np.empty(len(s.held), np.int32)
    needed = np.zeros(len(s.held))
    clock = 0.0
    disk = 0.0  # from then on it has nothing to do
    began = 0.0
    for ticket in range(len(starts) - 1):
        if ticket == warm_up:
            began = clock
            counts[:] = 0
        asked = codes[starts[ticket] : starts[ticket + 1]]
        n = len(asked)
        slot_kernels.serve(s, policy, asked, float(ticket + 1), needed[:n], hit[:n], slot[:n])
        present = 0
        submitted = clock
        arrived = clock
        for i in range(n):
            if hit[i]:
                present += 1
                arrived = max(arrived, ready[asked[i]])
                counts[2] += fresh[asked[i]]
            fresh[asked[i]] = False
        missed = n - present
        counts[0] += missed
        disk = max(disk, submitted) + missed * read
        if missed > 0:
            arrived = max(arrived, disk)
        clock = max(submitted + present * compute, arrived) + dense  # the next hand-off

        foreseen = ahead[ahead_starts[ticket] : ahead_starts[ticket + 1]]
        for code in foreseen:
            if s.slot_of[code] >= 0:
                slot_kernels.pin(s, s.slot_of[code])
        for code in foreseen:
            if disk >= clock or (in_time and disk + read > clock):
                break
            if s.slot_of[code] >= 0:
                continue
            if slot_kernels.load(s, policy, code) < 0:
                break
            disk += read
            ready[code] = disk
            fresh[code] = True
            counts[1] += 1
        for code in foreseen:
            if s.slot_of[code] >= 0:
                slot_kernels.unpin(s, s.slot_of[code])
        for i in range(n):
            slot_kernels.unpin(s, slot[i])
    return clock - began
