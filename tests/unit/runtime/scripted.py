"""A model that says what a test tells it to, behind a real engine, tokenizer and template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from k2hybrid.cache.pages import LatentPages
from k2hybrid.cache.rows import Fp32Rows
from k2hybrid.chat.template import ChatTemplate
from k2hybrid.chat.tokenizer import Tokenizer
from k2hybrid.checkpoint.spec import read_spec
from k2hybrid.config import RuntimeConfig
from k2hybrid.engine.engine import Engine
from k2hybrid.model.batch import Batch
from k2hybrid.runtime import Runtime
from k2hybrid.runtime.sizes import network_sizes


@dataclass
class State:
    batch: Batch
    failed_rows: set[int] = field(default_factory=set)


class ScriptedModel:
    """Wants to say the tokens of `play`, one run at a time; asked for more, it repeats `filler`."""

    def __init__(self, vocab_size: int, filler: int) -> None:
        self.vocab_size = vocab_size
        self.filler = filler
        self.before_step: Callable[[], None] = lambda: None
        self._script: list[int] = []
        self._first_position: int | None = None

    def play(self, script: Sequence[int]) -> None:
        """What to say next."""
        self._script = list(script)
        self._first_position = None

    def begin(self, batch: Batch) -> State:
        return State(batch)

    def forward(self, state: State, until: int) -> State:
        self.before_step()
        return state

    def logits(self, state: State) -> torch.Tensor:
        logits = torch.zeros(len(state.batch.logit_rows), self.vocab_size)
        for row, position in enumerate(state.batch.positions[state.batch.logit_rows].tolist()):
            if self._first_position is None:
                self._first_position = position
            said = position - self._first_position
            wanted = self._script[said] if said < len(self._script) else self.filler
            logits[row, wanted] = 60.0
            logits[row, self.filler] += 30.0  # what comes where the wanted token is forbidden
        return logits


def scripted_runtime(checkpoint: Path, *, idle_prefill: bool = False) -> tuple[Runtime, ScriptedModel]:
    """A started runtime with 1,024 tokens of context."""
    tokenizer = Tokenizer.load(checkpoint)
    spec = read_spec(checkpoint)
    config = RuntimeConfig(model=checkpoint, max_step_tokens=64, idle_prefill=idle_prefill)
    model = ScriptedModel(spec.vocab_size, tokenizer.encode("x")[0])
    pages = LatentPages(1, 32, Fp32Rows(1))
    engine = Engine(
        model,
        pages,
        sizes=replace(network_sizes(spec, 0, 1), layers=1, moe_layers=0),
        vocab_size=spec.vocab_size,
        context_tokens=1024,
        config=config,
    )
    engine.start()
    template = ChatTemplate(tokenizer)  # the built-in rendering: no process to start
    runtime = Runtime(
        name="scripted", config=config, spec=spec, tokenizer=tokenizer, template=template, engine=engine
    )
    return runtime, model
