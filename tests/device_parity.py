"""One model on two devices: the greedy tokens of one said again by the other, and the logits behind them.

The tokens that were drawn first are forced on the second, so that both are asked the same at every position.
They agree where the first's two best logits lie further apart than the bound.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from k2hybrid.config import RuntimeConfig
from k2hybrid.engine.memory import PageMemory
from k2hybrid.engine.step import StepModel
from k2hybrid.model.batch import Batch
from k2hybrid.native.extension import INSTRUCTION_SETS
from k2hybrid.runtime import Runtime
from k2hybrid.runtime.loading import open_runtime
from k2hybrid.types import Message, SamplingParams, TokenEvent
from tests.mini_sizes import EXPERT_BYTES

MODEL = Path(__file__).parent / "models" / "mini-4"
GREEDY = SamplingParams(temperature=0)
# Sets with exact products agree bit for bit, so that every machine excludes the same positions.
EXACT_SET = "avx2" if "avx2" in INSTRUCTION_SETS else "scalar"
OPTIONS: dict[str, Any] = {"threads": 2, "context_tokens": 4096, "idle_prefill": False, "isa": EXACT_SET}
SOME_HOT = 12 * EXPERT_BYTES

DISTANCE = 0.012  # docs/numerics.md, of two devices
MARGIN = 6 * 2**0.5 * DISTANCE
REROUTED = 3 * DISTANCE
MOST_EXCLUDED = 0.02

QUESTIONS = (
    "which one is bigger, 9.11 or 9.9? think carefully.",
    "What's the weather like in Beijing today?",
    "Hello",
    "Compare 3.7 and 3.65 please.",
    "Who are you?",
    "What is 17 plus 25?",
    "Please book a table for two in Lisbon.",
    "Which is larger: 12.3 or 12.29?",
)


class Told:
    """A `StepModel` that keeps logits by the position of the row that gave them, and may force what follows.

    Args:
        forced: tokens by the same positions; None: whatever is drawn.
    """

    def __init__(self, model: StepModel, forced: Mapping[int, int] | None) -> None:
        self.model = model
        self.forced = forced
        self.seen: dict[int, torch.Tensor] = {}
        self.decoded: set[int] = set()  # rows of passes in which every sequence had one

    def begin(self, batch: Batch, /) -> Any:
        if all(span.count == 1 for span in batch.spans):
            self.decoded.add(len(batch.spans))
        return self.model.begin(batch)

    def forward(self, state: Any, until: int, /) -> Any:
        return self.model.forward(state, until)

    def logits(self, state: Any, /) -> torch.Tensor:
        logits = self.model.logits(state)
        batch = state.batch
        for row, position in enumerate(batch.positions[batch.logit_rows].tolist()):
            assert position not in self.seen, "prompts are of lengths that no two answers share a position"
            self.seen[position] = logits[row].clone()
            if self.forced is not None:
                logits[row] = -1e4
                logits[row, self.forced[position]] = 0.0
        return logits


@dataclass
class Opened:
    """A runtime whose model is told and tells."""

    runtime: Runtime
    told: Told
    said: dict[int, int] = field(default_factory=dict)
    prefilled: list[int] = field(default_factory=list)  # tokens of each prompt

    def prompts(self, count: int, spread: int, start: int = 0) -> list[list[int]]:
        """Questions behind so much talk that prompt n has `start` + (n + 1) · `spread` tokens."""
        found = []
        for number, question in enumerate(QUESTIONS[:count]):
            length = start + (number + 1) * spread
            talk = f"This is note {number}. " * (length // 4)
            ids = self.runtime.template.render([Message("user", talk + question)], ()).ids
            found.append(ids[-length:])
            assert len(found[-1]) == length
        return found

    def answer(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """What is said to all of them at once; remembered in `said` by position."""
        # All arrive in one tick and share a chunk, so that none is done before another begins to decode.
        held, arrived = threading.Event(), threading.Event()

        def hold(_: PageMemory) -> None:
            held.set()
            arrived.wait()

        self.runtime.engine.call(hold)
        held.wait()
        try:
            runs = [self.runtime.generate(ids, GREEDY, tokens, stop_ids=()) for ids in prompts]
        finally:
            arrived.set()
        answers = []
        for ids, run in zip(prompts, runs, strict=True):
            answers.append([event.token for event in run if isinstance(event, TokenEvent)])
            self.said |= {len(ids) - 1 + at: token for at, token in enumerate(answers[-1])}
            self.prefilled.append(len(ids) - run.usage.cached_tokens)
        return answers


@contextmanager
def opened(device: str, forced: Mapping[int, int] | None = None, **options: Any) -> Iterator[Opened]:
    """The model that the bounds are for, on a device. `forced`: see `Told`."""
    told: list[Told] = []

    def telling(model: StepModel) -> Told:
        told.append(Told(model, forced))
        return told[-1]

    config = RuntimeConfig.from_mapping({"model": MODEL, "device": device, **OPTIONS, **options})
    with open_runtime(config, wrapped=telling) as runtime:
        yield Opened(runtime, told[0])


@dataclass(frozen=True)
class Agreement:
    """Of two devices over the same positions; docs/numerics.md derives the bounds.

    Attributes:
        close: positions at which the margin is within its bound.
        rerouted: others at which another token is the likeliest, and the logits as far apart as only a tie in
            the routing that fell the other way can bring them.
        differing: others at which another token is the likeliest.
        distance: the median of ‖difference‖ / ‖logits‖.
    """

    positions: int
    close: list[int]
    rerouted: list[int]
    differing: list[int]
    distance: float

    def check(self) -> None:
        """Raise AssertionError if they disagree, or too much is excluded."""
        excluded = f"margins within the bound at {self.close}, routed otherwise at {self.rerouted}"
        print(f"{self.positions} positions, distance {self.distance:.4f}; excluded: {excluded}")
        assert self.positions > 0
        assert self.differing == []
        assert len(self.close) + len(self.rerouted) <= MOST_EXCLUDED * self.positions
        assert self.distance <= DISTANCE


def agreement(want: Mapping[int, torch.Tensor], got: Mapping[int, torch.Tensor]) -> Agreement:
    """Logits by position."""
    assert want.keys() == got.keys()
    close, rerouted, differing, apart = [], [], [], []
    for position, logits in want.items():
        distance = float((got[position] - logits).norm() / logits.norm())
        apart.append(distance)
        best = logits.topk(2).values
        if best[0] - best[1] <= MARGIN * logits.std():
            close.append(position)
        elif int(got[position].argmax()) != int(logits.argmax()):
            (rerouted if distance > REROUTED else differing).append(position)
    return Agreement(len(want), close, rerouted, differing, statistics.median(apart))
