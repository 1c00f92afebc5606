"""Keeps the card's experts up to date between steps: counts go to the policy, its moves to the slots."""

from __future__ import annotations

from k2hybrid.experts.copies import Arrival
from k2hybrid.experts.device_slots import DeviceSlots
from k2hybrid.experts.hot import HotPolicy, HotRules


class HotKeeper:
    """One for a model; the thread that runs steps calls it. Nothing waits for the device or for a disk."""

    def __init__(self, slots: DeviceSlots, rules: HotRules | None = None) -> None:
        self.slots = slots
        self.policy = HotPolicy(slots.layers, slots.experts, slots.count, rules)
        self._steps = 0
        self._fetched: Arrival | None = None
        self._counted = 0  # steps behind what is being fetched
        self._uses = self._found = 0.0

    @property
    def found_share(self) -> float | None:
        """Of all uses of experts so far, those that found theirs on the card; None: there were none.

        A use counts what it saves. The set is that of a few steps later, when uses are looked at.
        """
        return self._found / self._uses if self._uses else None

    def between_steps(self) -> None:
        """Call it between two steps, when the first is over."""
        for key in self.slots.settle():
            self.policy.lost(key)
        self._steps += 1
        if self._fetched is None and self._steps >= self.policy.rules.interval and not self.slots.coming:
            self._counted, self._steps = self._steps, 0
            self._fetched = self.slots.fetch_counts()
        if self._fetched is not None and self._fetched.done():
            self._fetched = None
            uses = self.slots.fetched
            self._uses += float(uses.sum())
            self._found += float(sum(uses[key] for key in self.slots.there))
            self.policy.observe(uses, self._counted)
            self.slots.bring(self.policy.decide())
