"""Models on an emulated device beside the same on the CPU: what both said, and the logits behind it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from k2hybrid.config import MINI_MODEL, RuntimeConfig
from k2hybrid.engine.step import StepModel
from k2hybrid.model.batch import Batch
from k2hybrid.runtime import Runtime
from k2hybrid.runtime.loading import open_runtime
from k2hybrid.types import ChatRequest, Message, SamplingParams, TokenEvent
from tests.mini_sizes import EXPERT_BYTES

GREEDY = SamplingParams(temperature=0)
OPTIONS: dict[str, Any] = {
    "threads": 1,
    "context_tokens": 640,
    "idle_prefill": False,
    "latent_bytes": 8 << 20,
}
# Of the built-in model: fewer than 64 rows are handed off at the emulated rates, hundreds are streamed.
HANDED, STREAMED = 16, 256
SOME_HOT = 8 * EXPERT_BYTES

QUESTIONS = (
    "which one is bigger, 9.11 or 9.9? think carefully.",
    "What's the weather like in Beijing today?",
    "Compare 3.7 and 3.65 please, and " + "say it twice, and " * 12 + "be brief.",
    "Hello",
)


class Spied:
    """A `StepModel` that keeps the logits that it gives: by position in the order of the passes."""

    def __init__(self, model: StepModel) -> None:
        self.model = model
        self.logits_seen: list[torch.Tensor] = []
        self.sizes: list[tuple[int, ...]] = []  # spans of each pass

    def begin(self, batch: Batch, /) -> Any:
        self.sizes.append(tuple(span.count for span in batch.spans))
        return self.model.begin(batch)

    def forward(self, state: Any, until: int, /) -> Any:
        return self.model.forward(state, until)

    def logits(self, state: Any, /) -> torch.Tensor:
        logits = self.model.logits(state)
        self.logits_seen.append(logits.clone())
        return logits


@dataclass
class Opened:
    runtime: Runtime
    spied: Spied

    def ids(self, text: str) -> list[int]:
        """Of a chat prompt."""
        return self.runtime.template.render([Message("user", text)], ()).ids

    def tokens(self, ids: list[int], count: int = 8) -> list[int]:
        run = self.runtime.generate(ids, GREEDY, count, stop_ids=())
        return [event.token for event in run if isinstance(event, TokenEvent)]

    def answer(self, ids: list[int], count: int = 8) -> tuple[list[int], torch.Tensor]:
        """Tokens, and the logits that each was drawn from; nothing else may run."""
        self.spied.logits_seen.clear()
        said = self.tokens(ids, count)
        return said, torch.cat(self.spied.logits_seen)[:count]

    def together(self, prompts: list[list[int]], count: int = 8) -> list[list[int]]:
        runs = [self.runtime.generate(ids, GREEDY, count, stop_ids=()) for ids in prompts]
        return [[event.token for event in run if isinstance(event, TokenEvent)] for run in runs]


@contextmanager
def opened(device: str, model: Path = MINI_MODEL, **options: Any) -> Iterator[Opened]:
    spies: list[Spied] = []

    def spied(inner: StepModel) -> Spied:
        spies.append(Spied(inner))
        return spies[-1]

    config = RuntimeConfig.from_mapping({"model": model, "device": device, **OPTIONS, **options})
    with open_runtime(config, wrapped=spied) as runtime:
        yield Opened(runtime, spies[0])


def largest_distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """Of two rows of logits, relative to the second."""
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())


def agree(got: tuple[list[int], torch.Tensor], want: tuple[list[int], torch.Tensor], bound: float) -> None:
    """Logits within `bound`, up to where another token was drawn, which must have been as near as that."""
    (mine, mine_logits), (yours, your_logits) = got, want
    same = next((i for i, (a, b) in enumerate(zip(mine, yours, strict=True)) if a != b), len(mine))
    rows = min(same + 1, len(mine))
    assert largest_distance(mine_logits[:rows], your_logits[:rows]) <= bound
    if same < len(mine):
        gap = your_logits[same, yours[same]] - your_logits[same, mine[same]]
        assert gap <= 2 * (mine_logits[same] - your_logits[same]).abs().max()


def chat(text: str, **fields: Any) -> ChatRequest:
    return ChatRequest((Message("user", text),), **{"sampling": GREEDY, "max_tokens": 24, **fields})


def idle(runtime: Runtime) -> bool:
    """Whether nothing runs any more and no page is held, soon."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        status = runtime.status()
        if status["engine"]["running"] == status["engine"]["waiting"] == status["latents"]["used"] == 0:
            return True
        time.sleep(0.01)
    return False
