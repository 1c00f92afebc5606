"""Whether `k2hybrid plan` predicts what then is measured: decode and prefill of checkpoints, place by place.

    k2hybrid synth slice --like kimi-k2-thinking --layers 5 --experts 24 --vocab k2hybrid/mini/tiktoken.model
    python -m bench.plan slice:mapped slice:resident slice:streamed:2GiB [--json FILE]

A case is FOLDER:PLACE, and for streamed experts the RAM for their slots. Predictions, each from new probes of
the machine as the plan makes them, and measurements of the model through the engine take turns, a prediction
first and last; no figure goes from a measurement to a prediction. A measurement is compared with the mean of
the predictions before and after it. A shared machine's memory changes its speed within seconds, so decoding
is measured in pieces with reads of memory between them, and predicted for the speed that these found (the
plan's `--ram-gb-s`). The median counts, the quartiles are printed. Bar: 15 % on either side.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, quantiles
from typing import cast

import torch

import k2hybrid
from k2hybrid.bench.report import Row, conditions, print_report, write_json
from k2hybrid.checkpoint.spec import ModelSpec, read_spec
from k2hybrid.cli.machine import describe, with_disk
from k2hybrid.errors import ConfigError
from k2hybrid.experts.card_prediction import CardPredictor
from k2hybrid.experts.placement import Place
from k2hybrid.experts.plan import Wishes, make_plan
from k2hybrid.experts.prediction import ModelSizes, Predictor
from k2hybrid.hardware.bandwidth import quick_gb_s
from k2hybrid.native import Machine
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


class Forecast:
    """What the plan says of a case, from one run of the probes."""

    def __init__(self, case: Case, spec: ModelSpec, context: int) -> None:
        self._described = describe(spec, {})
        if case.place == "streamed":
            self._described = with_disk(self._described, spec, case.folder)
        self._case, self._sizes = case, ModelSizes.of(spec)
        self._wishes = Wishes(context, 1, case.place, case.expert_ram)

    def prefill(self, tokens: int) -> float:
        """Tokens per second."""
        return self._predictor(None).prefill(tokens).tokens_s

    def decode(self, context: int, ram_gb_s: float) -> float:
        """Tokens per second where memory is read at `ram_gb_s`."""
        return self._predictor(ram_gb_s).decode(1, context).tokens_s

    def _predictor(self, ram_gb_s: float | None) -> Predictor | CardPredictor:
        rates = self._described.rates
        if ram_gb_s is not None:
            rates = rates.at(ram_gb_s=ram_gb_s, cores=rates.cores)
        plan = make_plan(self._sizes, rates, self._described.machine, self._wishes)
        if plan.predictor is None:
            raise ConfigError(f"{self._case.name}: {plan.problem}")
        return plan.predictor


@dataclass(frozen=True, slots=True)
class Piece:
    """Some tokens that were decoded, between two reads of memory."""

    context: int
    ram_gb_s: float
    tokens_s: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What one loaded model did. Tokens per second."""

    prefill: float
    pieces: list[Piece]
    found: float | None  # share of experts that were in their slots


class Memory:
    """Reads memory beside the engine, while that waits."""

    def __init__(self) -> None:
        self._machine = Machine()
        self._data = torch.ones(1 << 30, dtype=torch.uint8)

    def gb_s(self) -> float:
        return quick_gb_s(self._machine, self._data)


def measure(case: Case, spec: ModelSpec, memory: Memory, prompt: int, tokens: int, seed: int) -> Measured:
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
            before = memory.gb_s()
            while len(ids) < prompt + tokens:
                run = runtime.generate(ids, SamplingParams(temperature=1.0, seed=number), PIECE, stop_ids=())
                answer = [event.token for event in run if isinstance(event, TokenEvent)]
                after = memory.gb_s()
                usage = run.usage
                prefill = prefill or prompt / usage.prefill_ms * 1e3
                speed = (usage.completion_tokens - 1) / usage.decode_ms * 1e3
                pieces.append(Piece(len(ids) + PIECE // 2, (before + after) / 2, speed))
                ids, before = ids + answer, after
        return Measured(prefill, pieces, runtime.status()["experts"].get("hit_rate"))


def compare(case: Case, rounds: int, prompt: int, tokens: int) -> list[Row]:
    """Two rows: decode and prefill."""
    spec = read_spec(case.folder)
    memory = Memory()
    decodes: list[tuple[float, float]] = []
    prefills: list[tuple[float, float]] = []
    before = Forecast(case, spec, prompt + tokens)
    for number in range(rounds):
        done = measure(case, spec, memory, prompt, tokens, number)
        after = Forecast(case, spec, prompt + tokens)
        prefills.append((fmean(one.prefill(prompt) for one in (before, after)), done.prefill))
        decodes += [
            (fmean(one.decode(piece.context, piece.ram_gb_s) for one in (before, after)), piece.tokens_s)
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
    low, median, high = quantiles(errors, n=4) if len(errors) > 1 else 3 * errors
    return {
        "case": name,
        "predicted_tokens_s": statistics.median(said for said, _ in pairs),
        "measured_tokens_s": statistics.median(done for _, done in pairs),
        "error": median,
        "error_lower_quartile": low,
        "error_upper_quartile": high,
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
