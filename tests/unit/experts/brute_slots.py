"""The cache of streamed experts again, by plain search: what the compiled one is held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

Ticket = list[int]  # distinct codes, ascending
Score = Callable[["BruteSlots", int], float]


@dataclass
class BruteSlots:
    """Slots by index; None is free. `times` holds when each expert was used, oldest first."""

    score: Score
    remembers: bool
    held: list[int | None]
    now: int = 0
    tickets: Sequence[Ticket] = ()
    times: dict[int, list[int]] = field(default_factory=dict)
    pinned: set[int] = field(default_factory=set)

    def use(self, code: int) -> None:
        self.times.setdefault(code, []).append(self.now)

    def load(self, code: int) -> int | None:
        if None in self.held:
            slot = self.held.index(None)
        else:
            open_slots = [i for i, held in enumerate(self.held) if held not in self.pinned]
            if not open_slots:
                return None
            slot = min(open_slots, key=lambda i: (self.score(self, self.held[i] or 0), i))
            if not self.remembers:
                self.times.pop(self.held[slot] or 0, None)
        self.held[slot] = code
        self.pinned.add(code)
        return slot

    def serve(self, ticket: Ticket) -> list[tuple[bool, int]]:
        """Whether each was there, and its slot. All stay pinned."""
        self.now += 1
        found = [code in self.held for code in ticket]
        for code, hit in zip(ticket, found, strict=True):
            if hit:
                self.pinned.add(code)
                self.use(code)
        for code, hit in zip(ticket, found, strict=True):
            if not hit:
                assert self.load(code) is not None
                self.use(code)
        return [(hit, self.held.index(code)) for code, hit in zip(ticket, found, strict=True)]


def last_use(slots: BruteSlots, code: int) -> float:
    return slots.times[code][-1] if slots.times.get(code) else -1


def halved_each_tick(slots: BruteSlots, code: int) -> float:
    """Exact: the weights of uses a tick apart are powers of two."""
    return sum(1 << time for time in slots.times.get(code, ()))


def halved_every(ticks: float) -> Score:
    def score(slots: BruteSlots, code: int) -> float:
        return sum(2.0 ** ((time - slots.now) / ticks) for time in slots.times.get(code, ()))

    return score


def soonest_needed(slots: BruteSlots, code: int) -> float:
    later = slots.tickets[slots.now :]
    return -next((at for at, ticket in enumerate(later) if code in ticket), len(later))


def brute_replay(
    tickets: Sequence[Ticket], slots: int, score: Score, remembers: bool = False
) -> list[tuple[bool, int]]:
    state = BruteSlots(score, remembers, [None] * slots, tickets=tickets)
    found = []
    for ticket in tickets:
        found += state.serve(ticket)
        state.pinned.clear()
    return found


def fewest_misses(tickets: Sequence[Ticket], slots: int) -> int:
    """Over all that could be kept, after every ticket."""
    best = {frozenset[int](): 0}
    for ticket in tickets:
        after: dict[frozenset[int], int] = {}
        asked = frozenset(ticket)
        for content, misses in best.items():
            rest = content - asked
            for kept in combinations(sorted(rest), min(len(rest), slots - len(asked))):
                state = asked | set(kept)
                count = misses + len(asked - content)
                after[state] = min(count, after.get(state, count))
        best = after
    return min(best.values())
