"""Whether `k2hybrid plan` predicts what then is measured: decode and prefill of checkpoints, place by place.

    k2hybrid synth slice --like kimi-k2-thinking --layers 5 --experts 24 --vocab k2hybrid/mini/tiktoken.model
    python -m bench.plan slice:mapped slice:resident slice:streamed:2GiB [--json FILE]

A case is FOLDER:PLACE, and for streamed experts the RAM for their slots. Predictions, each from new probes of
the machine as the plan makes them, and measurements of the model through the engine take turns, a prediction
first and last; no figure goes from a measurement to a prediction. What is measured, a prefill and pieces of
decoding, is compared with the mean of the predictions before and after it: a shared machine's memory changes
its speed within minutes. The median of all these errors counts, and how many of them are within the bar is
printed. Bar: 15 % on either side.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import cast

import k2hybrid
from k2hybrid.bench.report import Row, conditions, print_report, write_json
from k2hybrid.checkpoint.spec import ModelSpec, read_spec
from k2hybrid.cli.machine import describe, with_disk
from k2hybrid.errors import ConfigError
from k2hybrid.experts.card_prediction import CardPredictor
from k2hybrid.experts.placement import Place
from k2hybrid.experts.plan import Wishes, make_plan
from k2hybrid.experts.prediction import ModelSizes, Predictor
from k2hybrid.native.machine import Machine
from k2hybrid.server.options import size
from k2hybrid.types import SamplingParams, TokenEvent

BAR = 0.15
PIECE = 9  # tokens that are decoded at a time: the first belongs to the prefill
PLACES = ("mapped", "resident", "streamed")


@dataclass(frozen=True, slots=True)
class Case:
    """A checkpoint, where its experts lie, and how many bytes of slots they have (None: all that is free)."""

    folder: Path
    place: Place
    expert_ram: int | None

    @classmethod
    def of(cls, text: str) -> Case:
        """From the command line."""
        folder, _, rest = text.partition(":")
        place, _, ram = rest.partition(":")
        if place not in PLACES or not (Path(folder) / "config.json").is_file():
            raise argparse.ArgumentTypeError(f"{text!r} is not FOLDER:{'|'.join(PLACES)}[:RAM]")
        return cls(Path(folder), cast(Place, place), size(ram) if ram else None)

    @property
    def name(self) -> str:
        ram = f" in {self.expert_ram / (1 << 30):.2f} GiB" if self.expert_ram else ""
        return f"{self.folder.name}, {self.place}{ram}"


def forecast(case: Case, spec: ModelSpec, context: int) -> Predictor | CardPredictor:
    """What the plan says of a case, from new probes.

    Raises:
        ConfigError: it does not fit.
    """
    described = describe(spec, {})
    if case.place == "streamed":
        described = with_disk(described, spec, case.folder)
    wishes = Wishes(context, 1, case.place, case.expert_ram)
    plan = make_plan(ModelSizes.of(spec), described.rates, described.machine, wishes)
    if plan.predictor is None:
        raise ConfigError(f"{case.name}: {plan.problem}")
    return plan.predictor


@dataclass(frozen=True, slots=True)
class Piece:
    """Some tokens that were decoded at about so much context."""

    context: int
    tokens_s: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What one loaded model did. Tokens per second."""

    prefill: float
    pieces: list[Piece]
    found: float | None  # share of experts that were in their slots


def measure(case: Case, spec: ModelSpec, prompt: int, tokens: int, seed: int) -> Measured:
    """Two random prompts, the first one for warming up, each with `tokens` tokens decoded behind it."""
    vocab = spec.vocab_size - 256  # plain tokens; which they are does not matter
    with k2hybrid.load(
        case.folder,
        expert_place=case.place,
        expert_ram=case.expert_ram,
        context_tokens=prompt + tokens + 64,
        latent_bytes=1 << 28,
        idle_prefill=False,
    ) as runtime:
        while runtime.status()["experts"].get("filling"):
            time.sleep(0.1)
        for number in (2 * seed, 2 * seed + 1):
            ids = random.Random(number).choices(range(vocab), k=prompt)
            prefill, pieces = 0.0, list[Piece]()
            while len(ids) < prompt + tokens:
                run = runtime.generate(ids, SamplingParams(temperature=1.0, seed=number), PIECE, stop_ids=())
                answer = [event.token for event in run if isinstance(event, TokenEvent)]
                usage = run.usage
                prefill = prefill or prompt / usage.prefill_ms * 1e3
                speed = (usage.completion_tokens - 1) / usage.decode_ms * 1e3
                pieces.append(Piece(len(ids) + PIECE // 2, speed))
                ids += answer
        return Measured(prefill, pieces, runtime.status()["experts"].get("hit_rate"))


def compare(case: Case, rounds: int, prompt: int, tokens: int) -> list[Row]:
    """Two rows: decode and prefill."""
    spec = read_spec(case.folder)
    decodes: list[tuple[float, float]] = []
    prefills: list[tuple[float, float]] = []
    before = forecast(case, spec, prompt + tokens)
    for number in range(rounds):
        done = measure(case, spec, prompt, tokens, number)
        after = forecast(case, spec, prompt + tokens)
        prefills.append((fmean(one.prefill(prompt).tokens_s for one in (before, after)), done.prefill))
        decodes += [
            (fmean(one.decode(1, piece.context).tokens_s for one in (before, after)), piece.tokens_s)
            for piece in done.pieces
        ]
        before = after
    rows = [
        _row(f"{case.name}: {name}", pairs)
        for name, pairs in ((f"decode {tokens}", decodes), (f"prefill {prompt}", prefills))
    ]
    for row in rows:
        row["found_in_slots"] = done.found if done.found is not None else ""
        print(row, file=sys.stderr)
    return rows


def _row(name: str, pairs: list[tuple[float, float]]) -> Row:
    """Of (predicted, measured) tokens per second."""
    errors = [said / done - 1 for said, done in pairs]
    median = statistics.median(errors)
    return {
        "case": name,
        "predicted_tokens_s": statistics.median(said for said, _ in pairs),
        "measured_tokens_s": statistics.median(done for _, done in pairs),
        "error": median,
        "error_least": min(errors),
        "error_most": max(errors),
        "within_bar": sum(abs(error) <= BAR for error in errors) / len(errors),
        "bar": BAR,
        "holds": abs(median) <= BAR,
    }


def main() -> int:
    """Run the cases; exit status 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="+", type=Case.of, metavar="FOLDER:PLACE[:RAM]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    found = conditions(Machine(), prompt=options.prompt, tokens=options.tokens, rounds=options.rounds)
    rows = [
        row for case in options.cases for row in compare(case, options.rounds, options.prompt, options.tokens)
    ]
    found["load_average_after"] = float(Path("/proc/loadavg").read_text().split()[0])
    print_report("predictions of `k2hybrid plan`", found, rows)
    if options.json:
        write_json(options.json, found, rows)
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
