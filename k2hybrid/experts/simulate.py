"""Replays routing traces: how many experts are found in a bounded number of slots, under which policy.

A pass is one ticket of every MoE layer. Policies:

    lru          evicts what was used least recently
    lrfu         each use counts 1 and halves its weight every `half_life` passes (D. Lee et al., 2001); the
                 lowest sum goes first, and what is evicted is forgotten
    lrfu-ghost   the same, and what is evicted is remembered
    min          knows the future and evicts what is needed latest: the bound (L. Belady, 1966)

`slot_kernels` has the rules. Importing this needs numba.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np

from k2hybrid.errors import ConfigError
from k2hybrid.experts import slot_kernels
from k2hybrid.experts.slot_kernels import FORESIGHT, RECENCY, Flags, Floats, Ints, Longs, Policy
from k2hybrid.experts.traces import Trace, offsets

PolicyName = Literal["lru", "lrfu", "lrfu-ghost", "min"]
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)


@dataclass(frozen=True)
class Tickets:
    """The distinct experts of each hand-off, by code: layer · experts + expert.

    Attributes:
        layers, experts: sizes of the model, as a trace's header has them.
        moe_layers: tickets of a pass.
        layer: [tickets].
        starts: [tickets + 1]; ticket t has codes[starts[t] : starts[t + 1]], ascending.
    """

    layers: int
    experts: int
    moe_layers: int
    layer: Ints
    starts: Longs
    codes: Ints

    @classmethod
    def of(cls, trace: Trace) -> Tickets:
        """Those of a trace; padding is left out."""
        count = np.diff(trace.starts)
        return cls._distinct(
            trace.header.layers, trace.header.experts, len(trace.moe_layers), trace.layer, count, trace.ids
        )

    @classmethod
    def from_ids(
        cls,
        layer_of: Sequence[int],
        ids: Sequence[Sequence[int]],
        *,
        experts: int,
        moe_layers: int | None = None,
    ) -> Tickets:
        """Those of hand-offs given as plain numbers: the layer of each, and its ids in any order.

        moe_layers: of the model; None: so many as occur.

        Raises:
            ConfigError: the two do not belong together, or an id is out of range.
        """
        if len(layer_of) != len(ids) or min(layer_of, default=0) < 0:
            raise ConfigError(f"{len(ids)} tickets need a layer each, from 0 on; {len(layer_of)} are given")
        flat = np.array([expert for ticket in ids for expert in ticket], np.int32)
        if len(flat) and not -1 <= flat.min() <= flat.max() < experts:
            raise ConfigError(f"ids are −1…{experts - 1}")
        layer = np.array(layer_of, np.int32)
        count = np.array([len(ticket) for ticket in ids], np.int64)
        passes_of = len(set(layer_of)) if moe_layers is None else moe_layers
        return cls._distinct(max(layer_of, default=0) + 1, experts, passes_of, layer, count, flat)

    @classmethod
    def _distinct(
        cls, layers: int, experts: int, moe_layers: int, layer: Ints, count: Longs, ids: Ints
    ) -> Tickets:
        codes = layers * experts
        ticket = np.repeat(np.arange(len(layer)), count)
        real = ids >= 0
        key = np.unique((ticket * codes + np.repeat(layer, count) * experts + ids)[real])
        starts = offsets(np.bincount(key // codes, minlength=len(layer)))
        return cls(layers, experts, moe_layers, layer, starts, (key % codes).astype(np.int32))

    @property
    def largest(self) -> int:
        """The most experts of one ticket: fewer slots cannot serve it."""
        return int(np.diff(self.starts).max(initial=0))

    @property
    def used(self) -> int:
        """Experts that occur: more slots find no more."""
        return len(np.unique(self.codes))

    @cached_property
    def needed_next(self) -> Floats:
        """[codes]: the ticket, from 1 on, that asks for the same expert next; none: one past the last."""
        return slot_kernels.needed_next(self.starts, self.codes, self.layers * self.experts)


@dataclass(frozen=True)
class Replay:
    """What a replay found.

    Attributes:
        hit: [codes of the tickets], whether each was in a slot when its ticket came.
        slot: [codes of the tickets], the slot in which each was used.
    """

    tickets: Tickets
    policy: PolicyName
    half_life: float | None
    slots: int
    hit: Flags
    slot: Ints

    @property
    def hits(self) -> int:
        """Experts found, over all tickets."""
        return int(self.hit.sum())

    @property
    def misses(self) -> int:
        """Experts read."""
        return len(self.hit) - self.hits

    @property
    def hit_rate(self) -> float:
        """Of all that was asked for; 1 where nothing was."""
        return self.hits / len(self.hit) if len(self.hit) else 1.0

    def hit_rate_after(self, tickets: int) -> float:
        """Of what is asked for when the first `tickets` have filled the slots."""
        later = self.hit[self.tickets.starts[tickets] :]
        return float(later.mean()) if len(later) else 1.0

    def by_layer(self) -> dict[int, tuple[int, int]]:
        """Hits and misses of each layer that occurs."""
        layer = self.tickets.codes // self.tickets.experts
        hits = np.bincount(layer[self.hit], minlength=self.tickets.layers)
        asked = np.bincount(layer, minlength=self.tickets.layers)
        return {
            at: (int(hits[at]), int(asked[at] - hits[at])) for at in np.unique(self.tickets.layer).tolist()
        }

    def missed_by_ticket(self) -> Longs:
        """[tickets]: experts that each had to read."""
        before = offsets((~self.hit).astype(np.int64))
        missed: Longs = np.diff(before[self.tickets.starts])
        return missed


def policy_of(name: PolicyName, half_life: float | None, moe_layers: int) -> Policy:
    """The rule behind a name; `half_life` in passes of `moe_layers` tickets, for lrfu and lrfu-ghost alone.

    Raises:
        ConfigError: no such policy, or a half life is missing, not positive, or given where there is none.
    """
    if name not in POLICIES:
        raise ConfigError(f"there is no policy {name!r}; known: {', '.join(POLICIES)}")
    if name in ("lru", "min"):
        if half_life is not None:
            raise ConfigError(f"the policy {name} has no half life")
        return Policy(RECENCY if name == "lru" else FORESIGHT, 0.0, False)
    if half_life is None or not (half_life > 0 and math.isfinite(half_life)):
        raise ConfigError(f"the policy {name} needs a half life in passes, above 0; given: {half_life}")
    return Policy(RECENCY, 1.0 / (half_life * max(moe_layers, 1)), name == "lrfu-ghost")


def replay(
    trace: Trace | Tickets, slots: int, policy: PolicyName = "lru", half_life: float | None = None
) -> Replay:
    """What `slots` slots, empty at first, find of a trace.

    Raises:
        ConfigError: a ticket asks for more experts than there are slots; or as `policy_of`.
    """
    tickets = trace if isinstance(trace, Tickets) else Tickets.of(trace)
    if slots < max(tickets.largest, 1):
        raise ConfigError(f"{slots} slots are too few: one hand-off asks for {tickets.largest} experts")
    rule = policy_of(policy, half_life, tickets.moe_layers)
    codes = tickets.layers * tickets.experts
    hit, slot = np.empty(len(tickets.codes), np.bool_), np.empty(len(tickets.codes), np.int32)
    needed = tickets.needed_next if rule.kind == FORESIGHT else np.zeros(len(tickets.codes))
    state = slot_kernels.new_slots(codes, min(slots, codes))
    slot_kernels.replay_tickets(state, rule, tickets.starts, tickets.codes, needed, hit, slot)
    return Replay(tickets, policy, half_life, slots, hit, slot)


def replay_ids(
    layer_of: Sequence[int],
    ids: Sequence[Sequence[int]],
    *,
    experts: int,
    slots: int,
    policy: PolicyName = "lru",
    half_life: float | None = None,
    moe_layers: int | None = None,
) -> Replay:
    """As `replay`, of hand-offs given as plain numbers (`Tickets.from_ids`)."""
    tickets = Tickets.from_ids(layer_of, ids, experts=experts, moe_layers=moe_layers)
    return replay(tickets, slots, policy, half_life)


def sweep(
    trace: Trace | Tickets,
    sizes: Iterable[int],
    policies: Sequence[PolicyName] = POLICIES,
    half_life: float | None = None,
) -> list[Replay]:
    """All sizes with all policies; those without a half life leave it out.

    Raises:
        ConfigError: as `replay`.
    """
    tickets = trace if isinstance(trace, Tickets) else Tickets.of(trace)
    return [
        replay(tickets, slots, policy, half_life if policy.startswith("lrfu") else None)
        for policy in policies
        for slots in sizes
    ]
