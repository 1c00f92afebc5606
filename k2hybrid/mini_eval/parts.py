"""The parts of the evaluation: each asks the server and returns its rows and its misses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from k2hybrid.mini_eval import baseline, card, controls, handwritten
from k2hybrid.mini_eval.author import Author
from k2hybrid.mini_eval.cases import CELLS, cells_of, draw
from k2hybrid.mini_eval.client import Client, at_once
from k2hybrid.mini_eval.conversation import Conversation
from k2hybrid.mini_eval.marking import same_calls
from k2hybrid.mini_eval.play import Outcome, Player, show_call, wanted
from k2hybrid.mini_eval.report import Row

if TYPE_CHECKING:
    from k2hybrid.mini_eval.greedy import Comparison

_PROMPTS = 50  # through transformers
_FAR = 1_000_003  # from every seed that somebody would choose beside another
_TIE = 0.1  # in logits; rounding to bf16 moves them by less than that where the model is sure of itself
_MOST_CONTROLS = 120  # of each kind; at --n 500 and above
_CARD = {"9.11 or 9.9": card.decimals, "weather in Beijing": card.weather}


@dataclass(frozen=True)
class Options:
    """What the command line said."""

    folder: Path | None  # of the checkpoint; None: unknown, another server serves it
    seed: int
    n: int
    sampled_n: int
    card_seeds: int
    concurrency: int
    max_tokens: int
    threads: int | None


@dataclass
class Result:
    """What a part found."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    misses: dict[str, list[str]] = field(default_factory=dict)  # by cell

    def missed(self, cell: str, prompt: str, expected: str, got: str) -> None:
        """Remember a miss."""
        text = f"  prompt:   {prompt}\n  expected: {expected}\n  got:      {got}"
        self.misses.setdefault(cell, []).append(text)


@dataclass(frozen=True)
class Evaluation:
    """A server to ask, an author of cases, and the options."""

    client: Client
    author: Author
    options: Options

    def cases(self) -> Result:
        """Greedy, with the baseline beside it."""
        name = "temperature 0"
        drawn = draw(self.author, self.options.seed, self.options.n)
        outcomes = self._play(drawn, 0.0, name)
        result = _by_cell(name, outcomes, overall=0.9, cell=0.8, used=0.9)
        guessed = sum(baseline.is_right(case) for case in drawn)
        result.rows.append(Row(name, "baseline: first tool, first literals", len(drawn), guessed))
        return result

    def sampled(self) -> Result:
        """The first cases again at temperature 1.0."""
        name = "temperature 1.0"
        drawn = draw(self.author, self.options.seed, self.options.sampled_n)
        return _by_cell(name, self._play(drawn, 1.0, name), overall=0.8, cell=None, used=None)

    def with_grammar(self) -> Result:
        """Both temperatures again as clients are served: a grammar holds the calls to their declarations."""
        constrained = replace(self, client=Client(self.client.url, constrained=True))
        result = Result()
        for temperature, count in ((0.0, self.options.n), (1.0, self.options.sampled_n)):
            name = f"with the grammar, {temperature:g}"
            drawn = draw(self.author, self.options.seed, count)
            of_cells = _by_cell(
                name, constrained._play(drawn, temperature, name), overall=None, cell=None, used=None
            )
            result.rows += [row for row in of_cells.rows if row.cell in ("all", "results used rightly")]
        outcomes = at_once(
            constrained._player(0.0).first_calls, handwritten.load(), self.options.concurrency, "hand-written"
        )
        result.rows.append(
            Row("with the grammar, 0", "hand-written", len(outcomes), sum(o.right for o in outcomes))
        )
        return result

    def handwritten(self) -> Result:
        """Other people's style: only the calls."""
        name = "hand-written"
        player = self._player(0.0)
        outcomes = at_once(player.first_calls, handwritten.load(), self.options.concurrency, name)
        result = Result([Row(name, "all", len(outcomes), sum(o.right for o in outcomes), 0.7)])
        for kind in ("none", "one", "parallel"):
            part = [o for o in outcomes if o.case.last.kind == kind]
            result.rows.append(Row(name, f"calls: {kind}", len(part), sum(o.right for o in part)))
        guessed = sum(baseline.is_right(o.case) for o in outcomes)
        result.rows.append(Row(name, "baseline: first tool, first literals", len(outcomes), guessed))
        _note_misses(result, "hand-written", outcomes)
        return result

    def controls(self) -> Result:
        """Order of tools shuffled; names and descriptions swapped."""
        name = "controls"
        # All of them in a full run; a quick look is to stay quick.
        count = max(1, min(_MOST_CONTROLS, self.options.n * _MOST_CONTROLS // 500))
        before, after = self._pairs(controls.shuffle_cases(self.author, self.options.seed, count), "shuffled")
        stayed = sum(same_calls(a.calls, b.calls) for a, b in zip(before, after, strict=True))
        result = Result([
            Row(name, "tools shuffled: the calls stay", count, stayed, 0.85),
            Row(name, "tools shuffled: right", count, sum(o.right for o in after)),
        ])  # fmt: skip
        _note_misses(result, "tools shuffled", after)
        before, after = self._pairs(controls.swap_cases(self.author, self.options.seed, count), "swapped")
        result.rows += [
            Row(name, "names swapped: the call moves", count, sum(o.right for o in after), 0.85),
            Row(name, "names swapped: right before", count, sum(o.right for o in before)),
        ]
        _note_misses(result, "names swapped", after)
        return result

    def transformers(self) -> Result:
        """The same ids as transformers' model."""
        name = "transformers"
        folder = self.options.folder
        if folder is None:
            unknown = "with --url the checkpoint is not known; give --model too"
            return Result(notes=[f"{name}: NOT CHECKED, {unknown}"])
        from k2hybrid.mini_eval import deepseek  # torch with it: only for those who ask

        if lacking := deepseek.missing():
            return Result(notes=[f"{name}: NOT CHECKED, {lacking} is not installed"])
        from k2hybrid.mini_eval.greedy import compare

        options = self.options
        # Prompts of their own: what the server has cached came in other chunks, which moves last bits.
        drawn = draw(self.author, options.seed + _FAR, min(_PROMPTS, options.n))
        found = compare(self.client, folder, drawn, options.max_tokens, options.threads)
        result = Result([
            Row(name, "greedy ids of the runtime", len(found), sum(c.same_ids for c in found), 1.0),
            Row(name, f"the same but for ties (lead < {_TIE})", len(found), sum(map(_same_or_tie, found))),
            Row(name, "greedy text of the server", len(found), sum(c.same_text for c in found), 1.0),
        ])  # fmt: skip
        for c in found:
            if not (c.same_ids and c.same_text):
                result.missed(name, c.case.last.user, "the same ids", c.difference)
        return result

    def card(self) -> Result:
        """The model card's examples."""
        result = Result()
        seeds = range(self.options.seed, self.options.seed + self.options.card_seeds)
        for cell, run in _CARD.items():
            said = at_once(partial(run, self.client), seeds, self.options.concurrency, cell)
            result.rows.append(Row("model card", cell, len(said), sum(right for right, _ in said), 0.95))
            for seed, (right, text) in zip(seeds, said, strict=True):
                if not right:
                    result.missed(cell, f"seed {seed}", "as on the card", text)
        return result

    def _player(self, temperature: float) -> Player:
        return Player(self.client, self.options.max_tokens, temperature)

    def _play(self, drawn: Sequence[Conversation], temperature: float, label: str) -> list[Outcome]:
        player = self._player(temperature)
        seeded = list(enumerate(drawn, self.options.seed))
        return at_once(lambda pair: player.play(pair[1], pair[0]), seeded, self.options.concurrency, label)

    def _pairs(
        self, pairs: Iterable[tuple[Conversation, Conversation]], label: str
    ) -> tuple[list[Outcome], list[Outcome]]:
        """The outcomes of both cases of each pair."""
        flat = [case for pair in pairs for case in pair]
        outcomes = at_once(self._player(0.0).first_calls, flat, self.options.concurrency, label)
        return outcomes[::2], outcomes[1::2]


PARTS: dict[str, Callable[[Evaluation], Result]] = {
    "cases": Evaluation.cases,
    "sampled": Evaluation.sampled,
    "handwritten": Evaluation.handwritten,
    "grammar": Evaluation.with_grammar,
    "controls": Evaluation.controls,
    "transformers": Evaluation.transformers,
    "card": Evaluation.card,
}


def _by_cell(
    part: str, outcomes: Sequence[Outcome], overall: float | None, cell: float | None, used: float | None
) -> Result:
    """Rows for all, for each cell, and for what the answers make of the results."""
    result = Result([Row(part, "all", len(outcomes), sum(o.right for o in outcomes), overall)])
    # On the test side every request is put in frames that training never saw, so this cell is the whole.
    result.rows.append(Row(part, "unseen frames", len(outcomes), sum(o.right for o in outcomes), cell))
    for name in CELLS:
        of_cell = [o for o in outcomes if name in cells_of(o.case)]
        result.rows.append(Row(part, name, len(of_cell), sum(o.right for o in of_cell), cell))
        _note_misses(result, name, of_cell)
    told = [o for o in outcomes if o.used is not None]
    result.rows.append(Row(part, "results used rightly", len(told), sum(bool(o.used) for o in told), used))
    for o in told:
        if not o.used:
            result.missed("results used rightly", o.case.last.user, ", ".join(o.case.last.told), o.got)
    talked = [o for o in outcomes if o.answered is not None]
    row = Row(part, "answers without calls as taught", len(talked), sum(bool(o.answered) for o in talked))
    result.rows.append(row)
    for o in talked:
        if not o.answered:
            result.missed("answers without calls as taught", o.case.last.user, o.case.last.answer, o.got)
    return result


def _same_or_tie(found: Comparison) -> bool:
    return found.same_ids or (found.lead is not None and found.lead < _TIE)


def _note_misses(result: Result, cell: str, outcomes: Iterable[Outcome]) -> None:
    for o in outcomes:
        if not o.right:
            first = " ".join(map(show_call, o.calls))
            got = o.got if first in o.got else f"{first}, at last {o.got}"
            result.missed(cell, o.case.last.user, wanted(o.case), got)
