"""Which experts should lie on the card: running counts, with hysteresis. Pure.

A use counts what it saves, and loses half its weight in `half_life` steps. While there is room the most used
come; then one comes for the weakest that is there, if it beats it by a margin, so that experts of about equal
use do not take turns. All layers share one capacity: a layer with few favourites gets more of it than one
that uses all its experts alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from k2hybrid.errors import ConfigError

Key = tuple[int, int]  # (layer, expert)
Counts = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class HotRules:
    """How fast the set follows its uses; docs/experts.md says what the defaults rest on.

    Attributes:
        half_life: of a use, in steps.
        margin: by how much of its score the weakest must be beaten.
        interval: steps between two decisions.
        moves: experts that may come at one decision.
    """

    half_life: float = 128.0
    margin: float = 0.5
    interval: int = 8
    moves: int = 16

    def __post_init__(self) -> None:
        if not (0 < self.half_life < math.inf and 0 <= self.margin < math.inf):
            raise ConfigError(f"hot experts need a half life above 0 and a margin from 0 on: {self}")
        if min(self.interval, self.moves) < 1:
            raise ConfigError(f"hot experts need an interval and a number of moves from 1 on: {self}")


@dataclass(frozen=True, slots=True)
class Move:
    """`comes` is to lie on the card, in the place of `leaves`; None: there is room."""

    comes: Key
    leaves: Key | None = None


class HotPolicy:
    """The set of experts that should be on the card.

    Args:
        capacity: experts that fit, over all layers.
    """

    def __init__(self, layers: int, experts: int, capacity: int, rules: HotRules | None = None) -> None:
        if capacity < 0 or min(layers, experts) < 1:
            raise ConfigError(f"there is no set of {capacity} of {layers} × {experts} experts")
        self.rules = rules or HotRules()
        self.capacity = min(capacity, layers * experts)
        self._experts = experts
        self._score = np.zeros(layers * experts)
        self._chosen = np.zeros(layers * experts, np.bool_)

    @property
    def chosen(self) -> set[Key]:
        """Those that are there, or on their way."""
        return {self._key(code) for code in np.nonzero(self._chosen)[0].tolist()}

    @property
    def scores(self) -> Counts:
        """[layers, experts], a copy."""
        return self._score.reshape(-1, self._experts).copy()

    def observe(self, uses: npt.ArrayLike, steps: float) -> None:
        """Uses [layers, experts] of the last `steps` steps, each counted as much as it saves on the card.

        Raises:
            ConfigError: another shape, or a use that is no number from 0 on.
        """
        counts = np.asarray(uses, np.float64).reshape(-1)
        if counts.shape != self._score.shape or not (np.isfinite(counts).all() and (counts >= 0).all()):
            raise ConfigError(f"uses must be {self._score.size} numbers from 0 on")
        self._score *= 0.5 ** (steps / self.rules.half_life)
        self._score += counts

    def decide(self) -> list[Move]:
        """What moves now, the greatest gain first; equal scores go to the lower layer and expert."""
        # Stable: by score, then by code.
        order = np.argsort(-self._score, kind="stable")
        chosen = self._chosen[order]
        coming = order[~chosen][: self.rules.moves].tolist()
        leaving = order[chosen][::-1][: self.rules.moves].tolist()
        room = self.capacity - int(self._chosen.sum())
        moves: list[Move] = []
        for code in coming:
            score = self._score[code]
            if score <= 0:
                break
            if room > 0:
                room -= 1
                moves.append(Move(self._key(code)))
            else:
                if not leaving or score <= self._score[leaving[0]] * (1.0 + self.rules.margin):
                    break
                leaver = leaving.pop(0)
                self._chosen[leaver] = False
                moves.append(Move(self._key(code), self._key(leaver)))
            self._chosen[code] = True
        return moves

    def lost(self, key: Key) -> None:
        """Its bytes could not be read: it is not there, and has to earn its place anew."""
        code = key[0] * self._experts + key[1]
        self._chosen[code] = False
        self._score[code] = 0.0

    def _key(self, code: int) -> Key:
        layer, expert = divmod(code, self._experts)
        return layer, expert
