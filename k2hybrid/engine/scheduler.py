"""What the next step runs: a pure function over integers. Layer 4.

Decoding sequences come first, one token each, so that a long prefill never stops them; what is left of the
step's token budget goes to prefills, oldest first, so that each step brings the request that waited longest
nearer to its first token. Where more sequences decode than a step may hold, they take turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """A running sequence as the scheduler sees it."""

    number: int  # order of arrival
    pending: int  # tokens to run, at least 1
    decoding: bool  # has its first token: pending is 1


@dataclass(frozen=True, slots=True)
class Share:
    """So many tokens of one sequence in this step. With `last`, its logits are wanted."""

    number: int
    tokens: int
    last: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: decode shares first, then prefill shares."""

    shares: tuple[Share, ...]

    @property
    def tokens(self) -> int:
        return sum(share.tokens for share in self.shares)


class Scheduler:
    """Deals a step's token budget. Remembers only whose turn it is.

    Args:
        max_step_tokens: rows of one step at most.
    """

    def __init__(self, max_step_tokens: int) -> None:
        self._max_step_tokens = max_step_tokens
        self._last_decoded = -1  # the number after which the next round of decoding begins

    def plan(self, running: Sequence[Candidate]) -> StepPlan:
        """The next step for `running`; empty if nothing runs.

        While prefills wait, decoding leaves them at least an eighth of the step (one token at the least).
        """
        budget = self._max_step_tokens
        prefills = sorted((c for c in running if not c.decoding), key=lambda c: c.number)
        decodes = sorted((c for c in running if c.decoding), key=lambda c: c.number)
        kept_free = max(1, budget // 8) if prefills and budget > 1 else 0
        shares = []
        for candidate in self._turns(decodes, budget - kept_free):
            shares.append(Share(candidate.number, 1, True))
            budget -= 1
        for candidate in prefills:
            tokens = min(candidate.pending, budget)
            if tokens == 0:
                break
            shares.append(Share(candidate.number, tokens, tokens == candidate.pending))
            budget -= tokens
        return StepPlan(tuple(shares))

    def _turns(self, decodes: list[Candidate], room: int) -> list[Candidate]:
        if len(decodes) <= room:
            return decodes
        later = [c for c in decodes if c.number > self._last_decoded]
        chosen = (later + [c for c in decodes if c.number <= self._last_decoded])[:room]
        self._last_decoded = chosen[-1].number
        return sorted(chosen, key=lambda c: c.number)


def pages_for(tokens: int, page_tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // page_tokens)
