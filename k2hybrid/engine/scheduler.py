"""What the next tick runs: a pure function over integers. Layer 4.

A tick is at most two things. First a *pass* over all layers: every decoding sequence's next token, and
prefills that are small enough to ride along. Then a *slice* of the *chunk*: a larger piece of prefill that
advances by some parts of layers per tick (groups of heads in attention, and feed-forward), so that decoding
goes on between them. What a tick may cost is predicted time, not tokens: at true size a chunk of 512 tokens
reads all experts, as many bytes as 48 decode steps.

* A prefill rides along if the pass then takes at most half as long again.
* Otherwise the chunk is owed nearly as much time as the passes take, and gets it in whole parts: running
  decodes keep half of their speed, and no gap between two of their tokens exceeds two decode steps, or one
  layer of the chunk if that is longer. Among the numbers of rows with which that holds, and with which a part
  takes no longer than a decode step or a fifth of a second, the chunk has the one that gets the prompt done
  soonest: few rows read the same experts again and again, and parts that fill half of what the chunk is owed
  leave the other half. Time that was predicted decides how far the chunk advances now, time that was measured
  what it is owed next: an error of the prediction cannot add up.
* With nothing to decode the chunk advances for a moment, so that newcomers are seen soon.
* Prefills share a chunk evenly; what the short ones leave goes to the others. So a short prompt is answered
  after one chunk, however long the prompts beside it are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from k2hybrid.engine.cost import LARGE_ROWS, Rows

# Longest slice with nothing to decode, in microseconds: what a newcomer waits for at most, or one part.
ALONE_US = 50_000
# A part of a chunk beside decodes takes so long at most, or as long as a decode step, if few rows can.
GAP_US = 200_000
# What a chunk took too much or too little is made good within so many of its longest slices; not more,
# since a stalled disk would otherwise stop it, or the decodes, for minutes.
MOST_DEBT, MOST_CREDIT = 4, 1
# Numbers of rows that a chunk may have are so far apart: each is that much of the one before.
FEWER_PERCENT = 94
# The largest that is nearly as fast as the fastest: what a pass costs beside its bytes and operations is not
# predicted, and is paid for each chunk.
NEARLY_PERCENT = 95
# Of a pass's time, what a chunk beside it is owed. Decodes then keep 11 of 21 parts of their speed and the
# chunk 10: a little room is left on both sides of a half for what neither accounts for.
SHARE_NUMERATOR, SHARE_DENOMINATOR = 10, 11
# A slice is at most so much of a step: more than its share, since whole parts leave rests to make up for.
SLICE_PERCENT = 98
# Rows: smaller chunks are not worth the reading of weights, and their parts are not predicted apart.
LEAST_CHUNK = LARGE_ROWS


class Costs(Protocol):
    """Predictions in microseconds, as of `CostModel`."""

    def layer_us(self, rows: list[Rows], /) -> int:
        """The longest layer of a pass over rows."""

    def pass_us(self, rows: list[Rows], /) -> int:
        """A whole pass over rows."""

    def parts_us(self, rows: list[Rows], /) -> list[int]:
        """Each part of it, at least 1 each."""


@dataclass(frozen=True, slots=True)
class Candidate:
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


@dataclass(frozen=True, slots=True)
class Share:
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
            begin, chunk_rows = self._chunk(prefills, decode_us)
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
        for candidate in sorted(prefills, key=lambda c: (c.pending, c.number)):
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

    def _chunk(self, prefills: list[Candidate], decode_us: int) -> tuple[tuple[Share, ...], tuple[Rows, ...]]:
        """Shares of a new chunk and their rows, beside decode steps of `decode_us` (0: none)."""
        known = {c.number: c for c in prefills}

        def dealt(room: int) -> tuple[tuple[Share, ...], tuple[Rows, ...]]:
            shares = tuple(_deal(prefills, room))
            return shares, tuple(known[share.number].rows(share.tokens) for share in shares)

        most = min(self._max_rows, sum(c.pending for c in prefills))
        if not decode_us:
            return dealt(most)
        counts = [most]
        while (fewer := counts[-1] * FEWER_PERCENT // 100) >= LEAST_CHUNK:
            counts.append(fewer)
        chunks = list(map(dealt, counts))
        # All as if behind the same tokens: what few rows do not look back on yet others will.
        behind = {s.number: r.context for s, r in zip(*chunks[0], strict=True)}
        worth = [
            self._worth([Rows(s.tokens, behind[s.number]) for s in shares], decode_us) for shares, _ in chunks
        ]
        *least, rate = max(worth)
        return next(
            chunk
            for chunk, (*gaps, its_rate) in zip(chunks, worth, strict=True)
            if gaps == least and its_rate * 100 >= rate * NEARLY_PERCENT
        )

    def _worth(self, rows: Sequence[Rows], decode_us: int) -> tuple[int, bool, float]:
        """Of a chunk of `rows`: how little it stalls decodes, then how many rows a microsecond it runs."""
        parts = self._costs.parts_us(list(rows))
        whole_us = sum(parts)
        longest, most = max(parts), self._longest_slice(rows, decode_us)
        slices, at = 0, 0
        while at < len(parts):
            at += _whole(parts, at, max(most, parts[at]))
            slices += 1
        decoding_us = max(slices * decode_us, whole_us * SHARE_DENOMINATOR // SHARE_NUMERATOR)
        stall_us = max(0, longest - max(decode_us, GAP_US))
        return -stall_us, longest <= most, sum(r.count for r in rows) / (whole_us + decoding_us)

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
        later = [c for c in decodes if c.number > self._last_decoded]
        chosen = (later + [c for c in decodes if c.number <= self._last_decoded])[:room]
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


def _deal(prefills: list[Candidate], room: int) -> list[Share]:
    """Even shares of a chunk of `room` rows, in order of arrival; what short ones leave goes to the rest."""
    tokens = {}
    left = room
    for waiting, candidate in enumerate(sorted(prefills, key=lambda c: (c.pending, c.number))):
        # What cannot be dealt evenly goes to those who come first, one row each.
        fair = -(-left // (len(prefills) - waiting))
        tokens[candidate.number] = min(candidate.pending, fair)
        left -= tokens[candidate.number]
    return [
        Share(c.number, tokens[c.number], tokens[c.number] == c.pending)
        for c in prefills
        if tokens[c.number] > 0
    ]


def pages_for(tokens: int, page_tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // page_tokens)
