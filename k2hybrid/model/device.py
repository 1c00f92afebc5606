"""The network on a device: passes go on its stream, the routed experts answer from the CPU meanwhile.

A decode step of up to `graph_rows` sequences is recorded ahead (`record_ahead`), or the first time its batch
size occurs, and repeated from then on. Every other pass (prefill, alone or with decoding) goes on the stream
operation by operation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch

from k2hybrid.model.batch import Batch, Span
from k2hybrid.model.decode_step import DecodeStep, Recorder
from k2hybrid.model.kimi import ForwardState, Kimi
from k2hybrid.types import ExpertSteps

log = logging.getLogger(__name__)


@dataclass(slots=True)
class DevicePass:
    """A pass on the device. `step`: it is a recorded one, else `state` holds it."""

    batch: Batch
    step: DecodeStep | None = None
    state: ForwardState | None = None
    failed_rows: set[int] = field(default_factory=set)


class DeviceModel:
    """A `StepModel` on a device.

    Args:
        network: built with a decode kernel; its experts are `experts`, which record on the device's stream.
        synchronize: waits for the stream.
        recorder: of the stream.
        context_tokens: the longest context.
        graph_rows: sequences that a recorded step may have; 0: none is recorded.
    """

    def __init__(
        self,
        network: Kimi,
        experts: ExpertSteps,
        *,
        synchronize: Callable[[], None],
        recorder: Recorder,
        context_tokens: int,
        graph_rows: int,
    ) -> None:
        self.network = network
        self._experts = experts
        self._synchronize = synchronize
        self._recorder = recorder
        self._table_pages = -(-context_tokens // network.pages.PAGE_TOKENS)
        self._graph_rows = graph_rows
        self._moe_layers = network.spec.moe_layers
        self._steps: dict[int, DecodeStep] = {}
        self._unrecorded: set[int] = set()  # batch sizes of steps that could not be

    @property
    def recorded(self) -> list[int]:
        """Batch sizes whose steps are recorded; may be asked from any thread."""
        return sorted(rows for rows, step in list(self._steps.items()) if step.recorded)

    @torch.no_grad()
    def record_ahead(self, most: int, quietly: Callable[[], AbstractContextManager[object]]) -> None:
        """Record the steps of up to `most` sequences before anybody waits for one: it may take seconds.

        Each runs once, in a page that is given back: kernels are compiled and loaded, libraries choose.
        The largest comes first, whose memory serves the others. For the thread that runs passes, while no
        other has pages to lose.

        Args:
            quietly: while it lasts, the experts read none.

        Raises:
            CapacityError: there is no page; nothing is recorded ahead.
        """
        pages = self.network.pages
        page = pages.allocate(1)
        try:
            for rows in range(min(most, self._graph_rows), 0, -1):
                if rows in self._unrecorded or (step := self._step(rows)).recorded:
                    continue
                zeros = torch.zeros(rows, dtype=torch.int64)
                spans = (Span(0, 1, torch.tensor(page)),) * rows
                step.fill(Batch(zeros, zeros, spans, torch.arange(rows)))
                with quietly():
                    self._run(self._moe_layers, rows, step.work)
                self._record(step)
        finally:
            pages.release(page)

    def begin(self, batch: Batch, /) -> DevicePass:
        """See `StepModel.begin`. The batch lies in RAM."""
        decoding = all(span.count == 1 for span in batch.spans)
        rows = len(batch.spans)
        if decoding and 0 < rows <= self._graph_rows and rows not in self._unrecorded:
            return DevicePass(batch, step=self._step(len(batch.spans)))
        return DevicePass(batch, state=self.network.begin(batch))

    @torch.no_grad()
    def forward(self, state: DevicePass, until: int, /) -> DevicePass:
        """See `StepModel.forward`; when it returns, the device has done its part."""
        if state.step is not None and until == self.network.parts:
            step, rows = state.step, len(state.batch.ids)
            step.fill(state.batch)
            # The first of its size runs unrecorded: kernels are compiled and loaded, libraries choose theirs.
            work = step.run if step.recorded else step.work
            state.failed_rows.update(self._run(self._moe_layers, rows, work))
            if not step.recorded:
                self._record(step)
            return state
        if state.state is None:  # a decode pass that stops in between, after all
            state.step, state.state = None, self.network.begin(state.batch)
        begun = state.state
        layers = self.network.routed(begun.part, until)
        lost = self._run(layers, len(state.batch.ids), lambda: self.network.forward(begun, until))
        state.failed_rows.update(lost, begun.failed_rows)
        return state

    @torch.no_grad()
    def logits(self, state: DevicePass, /) -> torch.Tensor:
        """See `StepModel.logits`; they lie in RAM."""
        if state.state is None:
            assert state.step is not None
            return state.step.logits.cpu()[state.batch.logit_rows]
        return self.network.logits(state.state).cpu()

    def _run(self, layers: Sequence[int], rows: int, work: Callable[[], object]) -> Collection[int]:
        self._experts.begin(layers, rows)
        try:
            work()
            self._synchronize()
        except BaseException:
            self._experts.abort()  # else the device would wait for rings that are never answered
            self._synchronize()
            try:
                self._experts.end()
            except Exception:
                log.debug("the step was aborted", exc_info=True)
            raise
        return self._experts.end()

    def _record(self, step: DecodeStep) -> None:
        try:
            step.record(self._recorder)
        except Exception:  # memory is short, or the driver refuses: it is served all the same
            log.exception("a decode step of %d sequences cannot be recorded; it runs unrecorded", step.rows)
            del self._steps[step.rows]
            self._unrecorded.add(step.rows)

    def _step(self, rows: int) -> DecodeStep:
        step = self._steps.get(rows)
        if step is None:
            pinned = self.network.pages.device.type == "cuda"
            step = self._steps[rows] = DecodeStep(self.network, rows, self._table_pages, pinned=pinned)
        return step
