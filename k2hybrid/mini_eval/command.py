"""`k2hybrid mini-eval`: how well the built-in model calls tools, asked through the server's HTTP API.

Every prompt is made at run time from words and frames that training never saw. A case counts as right when
the number of calls, their names, and their arguments as JSON values are all equal to the expected ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from k2hybrid.config import MINI_MODEL
from k2hybrid.mini_eval.cases import author_of
from k2hybrid.mini_eval.child import served
from k2hybrid.mini_eval.client import Client
from k2hybrid.mini_eval.parts import PARTS, Evaluation, Options, Result
from k2hybrid.mini_eval.report import conditions, passed, print_report, write_json


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(prog="k2hybrid mini-eval", description=__doc__, allow_abbrev=False)
    made.add_argument(
        "--model", type=Path, metavar="DIR", help="checkpoint to serve (default: the built-in model)"
    )
    made.add_argument("--url", help="ask a server that runs already, e.g. http://127.0.0.1:8000")
    made.add_argument("--seed", type=int, default=0, help="of the prompts and draws (default: 0)")
    made.add_argument("--n", type=_count, default=500, help="cases at temperature 0 (default: 500)")
    made.add_argument(
        "--sampled-n", type=_count, metavar="N", help="cases at temperature 1.0 (default: as --n)"
    )
    made.add_argument(
        "--card-seeds",
        type=_count,
        default=100,
        metavar="N",
        help="seeds of each card example (default: 100)",
    )
    made.add_argument("--words", type=Path, metavar="FILE", help="other test words, parted by white space")
    made.add_argument(
        "--concurrency", type=_count, default=8, metavar="N", help="requests at once (default: 8)"
    )
    made.add_argument(
        "--threads", type=_count, metavar="N", help="of the server started here (default: all cores)"
    )
    made.add_argument(
        "--max-tokens", type=_count, default=400, metavar="N", help="longest reply (default: 400)"
    )
    made.add_argument("--only", type=_parts, metavar="PART[,PART]", help=f"of {', '.join(PARTS)}")
    made.add_argument("--show", type=int, default=0, metavar="K", help="print K misses of each cell")
    made.add_argument("--json", type=Path, metavar="FILE", help='write {"conditions": …, "rows": […]}')
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the evaluation; 0 if every bar with enough cases is met, 1 if not. Raises EvaluationError."""
    given = parser().parse_args(argv)
    folder = given.model or (None if given.url else MINI_MODEL)
    options = Options(
        folder=folder,
        seed=given.seed,
        n=given.n,
        sampled_n=given.n if given.sampled_n is None else given.sampled_n,
        card_seeds=given.card_seeds,
        concurrency=given.concurrency,
        max_tokens=given.max_tokens,
        threads=given.threads,
    )
    author = author_of(given.words)
    results: dict[str, Result] = {}
    with ExitStack() as stack:
        url = given.url or stack.enter_context(served(folder or MINI_MODEL, given.threads))
        evaluation = Evaluation(Client(url), author, options)
        for name in given.only or PARTS:
            print(f"{name} …", file=sys.stderr, flush=True)
            results[name] = PARTS[name](evaluation)
    rows = [row for result in results.values() for row in result.rows]
    notes = [note for result in results.values() for note in result.notes]
    found = conditions(
        model=folder.resolve().name if folder else given.url,
        seed=options.seed,
        n=options.n,
        words=str(given.words or "as shipped"),
        grammar="off",
    )
    for name, result in results.items():
        _show_misses(name, result, given.show)
    print_report(found, rows, notes)
    if given.json:
        write_json(given.json, found, rows, notes)
    return 0 if passed(rows) else 1


def _show_misses(part: str, result: Result, most: int) -> None:
    for cell, misses in result.misses.items():
        for miss in misses[:most]:
            print(f"{part}, {cell}:\n{miss}\n")


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def _parts(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if part not in PARTS:
            raise argparse.ArgumentTypeError(f"{part!r} is no part; there are {', '.join(PARTS)}")
    return list(dict.fromkeys(parts))
