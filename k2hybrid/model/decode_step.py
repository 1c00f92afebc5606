"""A whole decode step of one batch size, recorded once and repeated: a captured graph, or what plays one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from k2hybrid.errors import EngineError
from k2hybrid.model.batch import Batch
from k2hybrid.model.kimi import ForwardState, Kimi
from k2hybrid.model.mla import AttentionPlan
from k2hybrid.model.paged import PagedSpans
from k2hybrid.model.rope import Rotation


class Recorder(Protocol):
    """Records what goes on the device."""

    def __call__(self, work: Callable[[], None], /) -> Callable[[], None]:
        """Record what `work` puts on the device's stream; the result puts the same there again."""


class DecodeStep:
    """One token of each of `rows` sequences through all layers, over buffers at fixed addresses.

    What a step reads (embedded tokens, angles, rows to write, tables, lengths) is computed in RAM, as for any
    other pass, and copied into the buffers before the step.

    Args:
        table_pages: of the longest context.
        pinned: the staging buffers are page-locked, so that copies need not wait.
    """

    def __init__(self, network: Kimi, rows: int, table_pages: int, *, pinned: bool) -> None:
        self.rows = rows
        self._network = network
        spec, device = network.spec, network.pages.device
        half = spec.qk_rope_head_dim // 2
        self._staged = {
            "hidden": torch.zeros(rows, spec.hidden_size, pin_memory=pinned),
            "cos": torch.zeros(rows, 1, half, pin_memory=pinned),
            "sin": torch.zeros(rows, 1, half, pin_memory=pinned),
            "slots": torch.zeros(rows, dtype=torch.int64, pin_memory=pinned),
            "tables": torch.zeros(rows, table_pages, dtype=torch.int32, pin_memory=pinned),
            "lengths": torch.zeros(rows, dtype=torch.int32, pin_memory=pinned),
        }
        self._inputs = {name: torch.zeros_like(x, device=device) for name, x in self._staged.items()}
        self.logits = torch.zeros(rows, spec.vocab_size, device=device)
        self._repeat: Callable[[], None] | None = None

    @property
    def recorded(self) -> bool:
        """Whether `run` can be called."""
        return self._repeat is not None

    def fill(self, batch: Batch) -> None:
        """What the next run works on; the run before must have ended."""
        network, staged = self._network, self._staged
        staged["hidden"].copy_(network.embed(batch.ids))
        rotation = network.rope.at(batch.positions)
        staged["cos"].copy_(rotation.cos)
        staged["sin"].copy_(rotation.sin)
        for row, span in enumerate(batch.spans):
            table = span.page_table
            staged["slots"][row] = network.pages.slot(table, span.start)
            staged["tables"][row, : len(table)] = table
            staged["lengths"][row] = span.start + 1
        for name, buffer in self._inputs.items():
            buffer.copy_(staged[name], non_blocking=True)

    def work(self) -> None:
        """All layers and the head, once, on the device's stream."""
        inputs, network = self._inputs, self._network
        plan = AttentionPlan(
            batch=Batch(_NOTHING, _NOTHING, (), _NOTHING),
            slots=inputs["slots"],
            rotation=Rotation(inputs["cos"], inputs["sin"]),
            absorbed=(),
            expanded=(),
            paged=PagedSpans(None, inputs["tables"], inputs["lengths"]),
        )
        state = ForwardState(plan.batch, inputs["hidden"].clone(), plan, [slice(None)])
        network.forward(state)
        self.logits.copy_(network.logits_of(state.hidden))

    def record(self, recorder: Recorder) -> None:
        """Make `run` possible. `work` must have run before: what is compiled or loaded late is there then."""
        self._repeat = recorder(self.work)

    def run(self) -> None:
        """Put the recorded step on the device's stream."""
        if self._repeat is None:
            raise EngineError("a decode step is recorded before it runs")
        self._repeat()


_NOTHING = torch.empty(0, dtype=torch.int64)
