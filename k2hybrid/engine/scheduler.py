"""What the next tick runs: a pure function over integers. Layer 4.

A tick is at most two things. First a *pass* over all layers: every decoding sequence's next token, and
prefills that are small enough to ride along. Then a *slice* of the *chunk*: a larger piece of prefill that
advances by some parts of layers per tick (groups of heads in attention, and feed-forward), so that decoding
goes on between them. What a tick may cost is predicted time, not tokens: at true size a chunk of 512 tokens
reads all experts, as many bytes as 48 decode steps.

* A prefill rides along if the pass then takes at most half as long again.
* Otherwise the chunk is owed nearly as much time as the passes take, and gets it in whole parts: running
  decodes keep half of their speed, and no gap between two of their tokens exceeds two decode steps, or one
  layer of the chunk if that is longer. Time that was predicted decides how far the chunk advances now, time
  that was measured what it is owed next: an error of the prediction cannot add up.
* With nothing to decode the chunk advances for a moment, so that newcomers are seen soon.
* A prompt is cut into the same pieces whatever runs beside it: as many rows as a chunk may have, and a rest.
  Sums over a context are cut where its pieces are, so others would give other last bits, and a sampled answer
  that depends on its company. A chunk is one piece of a long prompt, or whole prompts and rests as they came,
  as many as it has room for. The two take turns, and so do the long prompts: a short one is answered after a
  chunk or two, however long the prompts beside it are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from k2hybrid.engine.cost import Rows

# Longest slice with nothing to decode, in microseconds: what a newcomer waits for at most, or one part.
ALONE_US = 50_000
# What a chunk took too much or too little is made good within so many of its longest slices; not more,
# since a stalled disk would otherwise stop it, or the decodes, for minutes.
MOST_DEBT, MOST_CREDIT = 4, 1
# Of a pass's time, what a chunk beside it is owed. Decodes then keep 11 of 21 parts of their speed and the
# chunk 10: a little room is left on both sides of a half for what neither accounts for.
SHARE_NUMERATOR, SHARE_DENOMINATOR = 10, 11
# A slice is at most so much of a step: more than its share, since whole parts leave rests to make up for.
SLICE_PERCENT = 98


class Costs(Protocol):
    """Predictions in microseconds, as of `CostModel`."""

    def layer_us(self, rows: list[Rows], /) -> int:
        """The longest layer of a pass over rows."""

    def pass_us(self, rows: list[Rows], /) -> int:
        """A whole pass over rows."""

    def parts_us(self, rows: list[Rows], /) -> list[int]:
        """Each part of it, at least 1 each."""


class Candidate(NamedTuple):  # quickly made: every token takes one
    """A running sequence as the scheduler sees it."""

    number: int  # order of arrival
    pending: int  # tokens to run, at least 1
    decoding: bool  # has its first token: pending is 1
    computed: int = 0  # tokens whose latents are there

    def rows(self, tokens: int) -> Rows:
        """The next `tokens` tokens as rows of a pass."""
        return Rows(tokens, self.computed + tokens)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prefill under way: its rows, and the part that runs next."""

    rows: tuple[Rows, ...]
    part: int
    numbers: frozenset[int]


class Share(NamedTuple):  # quickly made: every token takes one
    """So many tokens of one sequence. With `last`, its logits are wanted."""

    number: int
    tokens: int
    last: bool


@dataclass(frozen=True, slots=True)
class TickPlan:
    """A pass (no shares: none), a chunk to begin (no shares: none), and parts that the chunk advances by."""

    shares: tuple[Share, ...] = ()
    begin: tuple[Share, ...] = ()
    advance: int = 0

    def __bool__(self) -> bool:
        return bool(self.shares or self.begin or self.advance)


class Scheduler:
    """Deals time to decodes and prefills. Remembers whose turn it is, and what the chunk is owed.

    Args:
        max_rows: rows of one pass, and of one chunk, at most.
        costs: what passes and their parts take.
    """

    def __init__(self, max_rows: int, costs: Costs) -> None:
        self._max_rows = max_rows
        self._costs = costs
        self._last_decoded = -1  # the number after which the next round of decoding begins
        self._last_long = -1  # the same of prompts longer than a chunk
        self._long_turn = False  # the next chunk is one of theirs, if both wait
        self._slice_us = 0  # what the last slice of a chunk was to take
        self._owed_us = 0  # the chunk's share of what passes took, less what it took; negative: it took more
        self._creditors: frozenset[int] = frozenset()  # whose chunk is, or was, owed that

    def plan(self, running: Sequence[Candidate], chunk: Chunk | None = None) -> TickPlan:
        """The next tick for `running`, of whom those in `chunk` wait for it; empty if nothing runs."""
        decodes = sorted((c for c in running if c.decoding), key=lambda c: c.number)
        taken = chunk.numbers if chunk else frozenset()
        prefills = sorted(
            (c for c in running if not c.decoding and c.number not in taken), key=lambda c: c.number
        )
        turns = self._turns(decodes)
        rows = [c.rows(1) for c in turns]
        decode_us = self._costs.pass_us(rows)
        shares = [Share(c.number, 1, True) for c in turns]
        begin: tuple[Share, ...] = ()
        waits = False  # prefills ride with the next pass, behind which there is no slice then
        if turns:
            riding, pass_us = self._riding(prefills, rows, decode_us)
            # Behind the last slice of a chunk that is over as well.
            if self._slice_us and riding and self._slice_us + pass_us > self._longest_gap(chunk, decode_us):
                riding, waits = [], True
            shares += riding
            gone = {share.number for share in riding}
            prefills = [c for c in prefills if c.number not in gone]
        if chunk is None and prefills and not waits:
            begin = self._chunk(prefills)
            known = {c.number: c for c in prefills}
            chunk_rows = tuple(known[share.number].rows(share.tokens) for share in begin)
            chunk = Chunk(chunk_rows, 0, frozenset(share.number for share in begin))
        if chunk is None or not chunk.numbers & self._creditors:
            self._owed_us = 0
        self._creditors = chunk.numbers if chunk else frozenset()
        advance, self._slice_us = (0, 0) if chunk is None or waits else self._slice(chunk, decode_us)
        return TickPlan(tuple(shares), begin, advance)

    def ran(self, pass_us: int, chunk_us: int) -> None:
        """What the planned pass and the chunk's parts took, in microseconds; 0 for what was not planned.

        Args:
            pass_us: with all that whoever decodes waits for besides, but the chunk.
        """
        if pass_us:
            self._owed_us += _share(pass_us) - chunk_us

    def _riding(self, prefills: list[Candidate], rows: list[Rows], decode_us: int) -> tuple[list[Share], int]:
        """Prefills that the pass over `rows` takes along whole, shortest first; what it takes then."""
        room = self._max_rows - sum(r.count for r in rows)
        pass_us = decode_us
        taken: list[Rows] = []
        shares = []
        for candidate in sorted(prefills, key=_shortest):
            if candidate.pending > room:
                break
            with_it = [*rows, *taken, candidate.rows(candidate.pending)]
            with_us = self._costs.pass_us(with_it)
            if 2 * with_us > 3 * decode_us:
                break
            pass_us = with_us
            taken.append(with_it[-1])
            room -= candidate.pending
            shares.append(Share(candidate.number, candidate.pending, True))
        return shares, pass_us

    def _chunk(self, prefills: list[Candidate]) -> tuple[Share, ...]:
        """Shares of a new chunk."""
        long = [c for c in prefills if c.pending > self._max_rows]
        if long and (self._long_turn or len(long) == len(prefills)):
            chosen = _after(long, self._last_long)[0]
            self._last_long, self._long_turn = chosen.number, False
            return (Share(chosen.number, self._max_rows, False),)
        self._long_turn = True
        room, shares = self._max_rows, []
        for candidate in prefills:
            if candidate.pending <= room:
                room -= candidate.pending
                shares.append(Share(candidate.number, candidate.pending, True))
        return tuple(shares)

    def _longest_gap(self, chunk: Chunk | None, decode_us: int) -> int:
        """Microseconds: two decode steps, or a layer of the chunk, if there is one."""
        return max(2 * decode_us, self._costs.layer_us(list(chunk.rows)) if chunk else 0)

    def _longest_slice(self, rows: Sequence[Rows], decode_us: int) -> int:
        """Microseconds of a chunk between two steps so that no gap is longer than two of them, or a layer."""
        return max(decode_us * SLICE_PERCENT // 100, self._costs.layer_us(list(rows)) - decode_us)

    def _slice(self, chunk: Chunk, decode_us: int) -> tuple[int, int]:
        """Parts that `chunk` advances by beside a pass over the decodes, and the microseconds they take."""
        parts = self._costs.parts_us(list(chunk.rows))
        if not decode_us:
            advance = max(1, _whole(parts, chunk.part, ALONE_US))
            return advance, sum(parts[chunk.part : chunk.part + advance])
        most = self._longest_slice(chunk.rows, decode_us)
        longest = max(most, *parts)
        self._owed_us = min(max(self._owed_us, -MOST_DEBT * longest), MOST_CREDIT * longest)
        owed = self._owed_us + _share(decode_us)
        # What does not fit at all goes alone.
        advance = _whole(parts, chunk.part, min(owed, max(most, parts[chunk.part])))
        return advance, sum(parts[chunk.part : chunk.part + advance])

    def _turns(self, decodes: list[Candidate]) -> list[Candidate]:
        room = self._max_rows
        if len(decodes) <= room:
            return decodes
        chosen = _after(decodes, self._last_decoded)[:room]
        self._last_decoded = chosen[-1].number
        return sorted(chosen, key=lambda c: c.number)


def _share(pass_us: int) -> int:
    return pass_us * SHARE_NUMERATOR // SHARE_DENOMINATOR


def _whole(parts: Sequence[int], first: int, most_us: int) -> int:
    """How many parts from `first` on take `most_us` together at most."""
    taken = 0
    for part_us in parts[first:]:
        most_us -= part_us
        if most_us < 0:
            break
        taken += 1
    return taken


def _shortest(candidate: Candidate) -> tuple[int, int]:
    return candidate.pending, candidate.number


def _after(candidates: list[Candidate], number: int) -> list[Candidate]:
    """In order of arrival, beginning behind `number`: whose turn it is."""
    return sorted(candidates, key=lambda c: (c.number <= number, c.number))


def pages_for(tokens: int, page_tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // page_tokens)
