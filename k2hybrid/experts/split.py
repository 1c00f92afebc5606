"""How work is split between card and CPU so that both finish together. Pure: bytes, rows and rates.

An expert costs whoever computes it the longer of reading its bytes once and of the arithmetic of its rows. In
a decode step the card takes so many of the distinct experts that it holds that it is done when the CPU is.
For a large chunk, experts that the CPU would take too long for go over the bus; those with the fewest rows
stay with the CPU, since the bus asks the same for any number of rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from k2hybrid.errors import ConfigError

BUFFERS = 12  # experts that fit into the page-locked buffers of a streamed prefill
# Assumed where there is no card to ask: at its start one times the first two (`runtime.device_rates`).
HANDOFF_S = 20e-6
LAUNCH_S = 60e-6
PLAN_S = 1e-3


@dataclass(frozen=True, slots=True)
class SplitRates:
    """The machine and the model; bytes, seconds, and bytes per second.

    Attributes:
        expert_bytes: of one expert.
        card, ram: rates at which the card's kernel, and the CPU's, read experts.
        bus: of copies from page-locked memory to the card.
        card_row_s, cpu_row_s: arithmetic of one row of one expert.
        card_busy_s: what the card does anyway while the CPU computes: the shared expert.
        card_launch_s: of the card's kernels, whatever they compute.
        handoff_s: from ring to reply, beside the CPU's work.
        handoff_row_s: a row's input and sum between card and CPU, while neither computes.
        bus_traffic: how often streamed bytes pass the RAM: read, written to a buffer, read by the card. Those
            that need no buffer are read once.
        plan_s: of a streamed layer, until the host knows the routing and has made its plan.
    """

    expert_bytes: float
    card: float
    ram: float
    bus: float
    card_row_s: float = 0.0
    cpu_row_s: float = 0.0
    card_busy_s: float = 0.0
    card_launch_s: float = 0.0
    handoff_s: float = 0.0
    handoff_row_s: float = 0.0
    bus_traffic: float = 3.0
    plan_s: float = 0.0

    def __post_init__(self) -> None:
        times = (self.card_row_s, self.cpu_row_s, self.card_busy_s, self.card_launch_s)
        rest = (self.handoff_s, self.handoff_row_s, self.bus_traffic, self.plan_s)
        if min(self.expert_bytes, self.card, self.ram, self.bus) <= 0 or min(*times, *rest) < 0:
            raise ConfigError(f"rates and sizes must be above 0, and times not below: {self}")

    def card_s(self, rows: float) -> float:
        """Of one expert with `rows` rows, on the card."""
        return max(self.expert_bytes / self.card, rows * self.card_row_s)

    def cpu_s(self, rows: float) -> float:
        """Of one expert with `rows` rows, on the CPU."""
        return max(self.expert_bytes / self.ram, rows * self.cpu_row_s)

    def with_direct(self, share: float) -> SplitRates:
        """These, where such a share of streamed experts needs no buffer."""
        saved = max(0.0, self.bus_traffic - 1.0) * share
        return replace(self, bus_traffic=self.bus_traffic - saved)

    @property
    def bus_s(self) -> float:
        """Of one expert, over the bus."""
        return self.expert_bytes / self.bus

    @property
    def streamed_weight(self) -> float:
        """What the use of a hot expert saves where it would be streamed, in units of a decode step's use."""
        return self.bus_s / max(self.cpu_s(1) - self.card_s(1), 1e-3 * self.cpu_s(1))


def card_experts(rates: SplitRates, distinct: int, rows_each: float) -> int:
    """The most experts of a step's `distinct` that the card should take: those that it holds, up to so many.

    Both sides' times are lines in that number, so the best is where they cross, and with fewer at hand all of
    them. Of equal times the one with more on the card, since the CPU has other work.
    """

    def seconds(taken: int) -> float:
        card = rates.card_busy_s + (rates.card_launch_s + taken * rates.card_s(rows_each) if taken else 0.0)
        return max(card, rates.handoff_s + (distinct - taken) * rates.cpu_s(rows_each))

    return min(range(distinct + 1), key=lambda taken: (seconds(taken), -taken))


def card_limits(rates: SplitRates, rows: int, top_k: int, experts: int) -> list[int]:
    """`card_experts` of a step of `rows` rows, by its distinct experts: 0 … min(experts, rows · top_k)."""
    pairs = rows * top_k
    return [card_experts(rates, d, pairs / max(d, 1)) for d in range(min(experts, pairs) + 1)]


_LIMITS = ("CPU", "card", "bus", "RAM")


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """Who computes a chunk's experts of one layer; each tuple ascending.

    Attributes:
        hot: on the card already.
        streamed: sent over the bus.
        cold: the CPU's.
        seconds, bus_bytes: predicted.
        limit: what takes so long: "CPU", "card", "bus" or "RAM".
    """

    hot: tuple[int, ...]
    streamed: tuple[int, ...]
    cold: tuple[int, ...]
    seconds: float
    bus_bytes: float
    limit: str


def plan_stream(
    rates: SplitRates, rows: int, rows_of: Mapping[int, float], hot: Collection[int]
) -> StreamPlan:
    """The split with the least predicted time of a chunk's experts, each with `rows_of` of its `rows`.

    Bus, card, CPU and RAM work at once, and the slowest decides; rows that the CPU has a part of travel
    before and after. Of equal times the one with fewer bytes on the bus.
    """
    here = sorted(set(hot) & set(rows_of))
    rest = sorted(set(rows_of) - set(here), key=lambda expert: (rows_of[expert], expert))
    card = sum(rates.card_s(rows_of[expert]) for expert in rows_of)
    cpu = cold_rows = 0.0
    best: tuple[float, int, tuple[float, ...]] | None = None
    for cold in range(len(rest) + 1):  # those with the fewest rows
        if cold:
            each = rows_of[rest[cold - 1]]
            cpu += rates.cpu_s(each)
            card -= rates.card_s(each)
            cold_rows = min(cold_rows + each, rows)
        streamed = len(rest) - cold
        each_s = (
            cpu + rates.handoff_s if cold else 0.0,
            rates.card_busy_s + (rates.card_launch_s + card if cold < len(rows_of) else 0.0),
            streamed * rates.bus_s,
            (cold + rates.bus_traffic * streamed) * rates.expert_bytes / rates.ram,
        )
        seconds = max(each_s) + cold_rows * rates.handoff_row_s
        if best is None or seconds <= best[0]:
            best = seconds, cold, each_s
    assert best is not None
    cold_count = best[1]
    return StreamPlan(
        tuple(here),
        tuple(sorted(rest[cold_count:])),
        tuple(sorted(rest[:cold_count])),
        best[0],
        (len(rest) - cold_count) * rates.expert_bytes,
        _LIMITS[best[2].index(max(best[2]))],
    )


def streams(rates: SplitRates, rows: int, top_k: int, experts: int, hot: float = 0.0) -> bool:
    """Whether a chunk of `rows` rows should be streamed: whether that is predicted to take less time.

    Routing is taken as even, since it is not known yet: so many distinct experts as even draws have, each
    with its share of the rows. `hot`: experts of a layer that are on the card, on average.
    """
    if rows < 1:
        return False
    distinct = max(1, round(experts * (1.0 - (1.0 - top_k / experts) ** rows)))
    here = round(distinct * min(hot / experts, 1.0))
    each = rows * top_k / distinct
    taken = min(here, card_experts(rates, distinct, each))
    without = max(
        rates.card_busy_s + (rates.card_launch_s + taken * rates.card_s(each) if taken else 0.0),
        rates.handoff_s + (distinct - taken) * rates.cpu_s(each),
    )
    without += rows * rates.handoff_row_s
    plan = plan_stream(rates, rows, dict.fromkeys(range(distinct), each), range(here))
    return bool(plan.streamed) and plan.seconds + rates.plan_s < without
