"""What the slots of streamed experts do, ticket by ticket: the rules of `csrc/experts`, compiled by numba.

A ticket is one hand-off: the distinct experts of all its rows, ascending. The clock ticks once a ticket and
shows 1 at the first. What is there is found and pinned; then each missing expert, ascending, takes the lowest
free slot, else the slot that is not pinned and has the lowest score, the lower slot of two equal. Each expert
of the ticket is used once, a missing one by being loaded.

The heap holds the slots that are filled and not pinned.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt

from k2hybrid.errors import ConfigError

try:
    numba: Any = importlib.import_module("numba")
except ImportError as error:
    raise ConfigError(
        f"simulations need numba, which cannot be imported ({error}); pip install numba"
    ) from None

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Compiled = TypeVar("Compiled", bound=Callable[..., Any])

NEVER = -np.inf
RECENCY, FORESIGHT = 0, 1  # what a score says: how lately and often used, or how soon needed

_FILLED, _HEAPED = 0, 1


def compiled(function: Compiled) -> Compiled:
    """`function`, compiled at its first call; it lets other threads run."""
    return cast(Compiled, numba.njit(nogil=True, error_model="numpy")(function))


class Slots(NamedTuple):
    """State of a cache. Experts go by code: layer · experts + expert.

    score: [codes], float64; slot_of: [codes], −1: absent; held: [slots], the code; heap, place: [slots], the
    heap and each slot's position in it, −1: not in it; counts: slots filled, slots in the heap.
    """

    score: Floats
    slot_of: Ints
    held: Ints
    heap: Ints
    place: Ints
    counts: Longs


class Policy(NamedTuple):
    """How scores change.

    rate: of decay, 1 / half life in ticks; 0: the last use alone counts (LRU).
    remembers: whether an evicted expert's score still counts when it comes back.
    """

    kind: int
    rate: float
    remembers: bool


def new_slots(codes: int, slots: int) -> Slots:
    """An empty cache."""
    heap, place, held = (np.full(slots, -1, np.int32) for _ in range(3))
    return Slots(
        np.full(codes, NEVER), np.full(codes, -1, np.int32), held, heap, place, np.zeros(2, np.int64)
    )


@compiled
def _before(s: Slots, a: int, b: int) -> bool:
    x, y = s.score[s.held[a]], s.score[s.held[b]]
    return bool(x < y or (x == y and a < b))


@compiled
def _settle(s: Slots, slot: int, at: int) -> None:
    """Put `slot` where it belongs, from position `at` on, upwards or downwards."""
    while at > 0:
        parent = s.heap[(at - 1) // 2]
        if not _before(s, slot, parent):
            break
        s.heap[at] = parent
        s.place[parent] = at
        at = (at - 1) // 2
    size = s.counts[_HEAPED]
    while 2 * at + 1 < size:
        below = 2 * at + 1
        if below + 1 < size and _before(s, s.heap[below + 1], s.heap[below]):
            below += 1
        child = s.heap[below]
        if not _before(s, child, slot):
            break
        s.heap[at] = child
        s.place[child] = at
        at = below
    s.heap[at] = slot
    s.place[slot] = at


@compiled
def pin(s: Slots, slot: int) -> None:
    """Out of the heap; nothing happens if it is not in there."""
    at = s.place[slot]
    if at < 0:
        return
    s.place[slot] = -1
    s.counts[_HEAPED] -= 1
    last = s.heap[s.counts[_HEAPED]]
    if last != slot:
        _settle(s, last, at)


@compiled
def unpin(s: Slots, slot: int) -> None:
    """Into the heap; nothing happens if it is there."""
    if s.place[slot] >= 0:
        return
    s.counts[_HEAPED] += 1
    _settle(s, slot, s.counts[_HEAPED] - 1)


@compiled
def use(s: Slots, policy: Policy, code: int, now: float, needed: float) -> None:
    """Set the score of an expert that is used, or loaded, now. Its slot must be pinned.

    needed: when it is needed next, for FORESIGHT.
    """
    if policy.kind == FORESIGHT:
        s.score[code] = -needed
    elif policy.rate == 0.0:
        s.score[code] = now
    else:
        # As csrc/experts/recency.h, operation by operation: log2(value) + rate · time of the last use.
        s.score[code] = now * policy.rate + np.log2(1.0 + np.exp2(s.score[code] - now * policy.rate))


@compiled
def load(s: Slots, policy: Policy, code: int) -> int:
    """A pinned slot for an absent expert; −1 if all are pinned."""
    if s.counts[_FILLED] < len(s.held):
        slot = int(s.counts[_FILLED])  # slots never become free again
        s.counts[_FILLED] += 1
    elif s.counts[_HEAPED] > 0:
        slot = int(s.heap[0])
        pin(s, slot)
        evicted = s.held[slot]
        s.slot_of[evicted] = -1
        if not policy.remembers:
            s.score[evicted] = NEVER
    else:
        return -1
    s.held[slot] = code
    s.slot_of[code] = slot
    return slot


@compiled
def serve(s: Slots, policy: Policy, codes: Ints, now: float, needed: Floats, hit: Flags, slot: Ints) -> None:
    """One ticket. All of its experts stay pinned. There must be slots for all of them.

    Args:
        codes: [n], ascending and distinct.
        needed: [n], as in `use`.
        hit, slot: [n], set to whether each was there, and where it is.
    """
    for i in range(len(codes)):
        slot[i] = s.slot_of[codes[i]]
        hit[i] = slot[i] >= 0
        if hit[i]:
            pin(s, slot[i])
            use(s, policy, codes[i], now, needed[i])
    for i in range(len(codes)):
        if not hit[i]:
            slot[i] = load(s, policy, codes[i])
            use(s, policy, codes[i], now, needed[i])


@compiled
def replay_tickets(
    s: Slots, policy: Policy, starts: Longs, codes: Ints, needed: Floats, hit: Flags, slot: Ints
) -> None:
    """All tickets, the next when the last is done. Shapes as in `serve`, tickets one behind the other."""
    for ticket in range(len(starts) - 1):
        a, b = starts[ticket], starts[ticket + 1]
        serve(s, policy, codes[a:b], float(ticket + 1), needed[a:b], hit[a:b], slot[a:b])
        for i in range(a, b):
            unpin(s, slot[i])


@compiled
def needed_next(starts: Longs, codes: Ints, all_codes: int) -> Floats:
    """[codes]: the ticket, from 1 on, that asks for the same expert next; none: one past the last."""
    tickets = len(starts) - 1
    following = np.full(all_codes, tickets + 1.0)
    needed = np.empty(len(codes))
    for ticket in range(tickets - 1, -1, -1):
        for i in range(starts[ticket], starts[ticket + 1]):
            needed[i] = following[codes[i]]
            following[codes[i]] = ticket + 1.0
    return needed
