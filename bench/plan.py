"""Whether `k2hybrid plan` predicts what then is measured: decode and prefill of checkpoints, place by place.

    k2hybrid synth slice --like kimi-k2-thinking --layers 5 --experts 24 --vocab k2hybrid/mini/tiktoken.model
    python -m bench.plan slice:mapped slice:resident slice:streamed:2GiB [--json FILE]

A case is FOLDER:PLACE, and for streamed experts the RAM for their slots. Each round probes the machine as the
plan does, predicts, and then runs the model through the engine; no figure goes from a measurement to a
prediction. Medians over the rounds are compared. Bar: 15 % on either side.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import k2hybrid
from k2hybrid.bench.report import Row, conditions, print_report, write_json
from k2hybrid.checkpoint.spec import ModelSpec, read_spec
from k2hybrid.cli.machine import describe, with_disk
from k2hybrid.errors import ConfigError
from k2hybrid.experts.placement import Place
from k2hybrid.experts.plan import Wishes, make_plan
from k2hybrid.experts.prediction import ModelSizes
from k2hybrid.native import Machine
from k2hybrid.runtime.runtime import Runtime
from k2hybrid.server.options import size
from k2hybrid.types import SamplingParams

BAR = 0.15
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


@dataclass(frozen=True, slots=True)
class Speeds:
    """Tokens per second."""

    decode: float
    prefill: float


def predicted(case: Case, spec: ModelSpec, prompt: int, tokens: int) -> Speeds:
    """What the plan says of decoding in the middle of `tokens` tokens behind `prompt`, and of its prefill.

    Raises:
        ConfigError: it does not fit.
    """
    described = describe(spec, {})
    if case.place == "streamed":
        described = with_disk(described, spec, case.folder)
    wishes = Wishes(prompt + tokens, 1, case.place, case.expert_ram)
    plan = make_plan(ModelSizes.of(spec), described.rates, described.machine, wishes)
    if plan.predictor is None:
        raise ConfigError(f"{case.name}: {plan.problem}")
    return Speeds(
        plan.predictor.decode(1, prompt + tokens // 2).tokens_s, plan.predictor.prefill(prompt).tokens_s
    )


def measured(runtime: Runtime, vocab: int, prompt: int, tokens: int, seed: int) -> Speeds:
    """One answer of `tokens` tokens to a random prompt, through the engine."""
    ids = random.Random(seed).choices(range(vocab), k=prompt)
    run = runtime.generate(ids, SamplingParams(temperature=1.0, seed=seed), tokens, stop_ids=())
    for _ in run:
        pass
    usage = run.usage
    return Speeds((usage.completion_tokens - 1) / usage.decode_ms * 1e3, prompt / usage.prefill_ms * 1e3)


def compare(case: Case, rounds: int, prompt: int, tokens: int) -> list[Row]:
    """Two rows: decode and prefill."""
    spec = read_spec(case.folder)
    vocab = spec.vocab_size - 256  # plain tokens; which they are does not matter
    says: list[Speeds] = []
    does: list[Speeds] = []
    found: float | None = None  # share of experts that were in their slots
    for number in range(rounds):
        says.append(predicted(case, spec, prompt, tokens))
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
            warm = measured(runtime, vocab, prompt, tokens, seed=2 * number)
            does.append(measured(runtime, vocab, prompt, tokens, seed=2 * number + 1))
            found = runtime.status()["experts"].get("hit_rate")
        print(f"{case.name}: predicted {says[-1]}, warming up {warm}, measured {does[-1]}", file=sys.stderr)
    rows: list[Row] = []
    for name, tokens_of in (("decode", tokens), ("prefill", prompt)):
        said, done = (statistics.median(getattr(one, name) for one in speeds) for speeds in (says, does))
        rows.append(
            {
                "case": f"{case.name}: {name} {tokens_of}",
                "predicted_tokens_s": said,
                "measured_tokens_s": done,
                "error": said / done - 1,
                "bar": BAR,
                "holds": abs(said / done - 1) <= BAR,
                "found_in_slots": found if found is not None else "",
            }
        )
    return rows


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
