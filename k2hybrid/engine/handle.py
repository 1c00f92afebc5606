"""What a submitter holds of its job. Layer 4."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from k2hybrid.engine.memory import PageMemory
from k2hybrid.engine.sequence import Sequence
from k2hybrid.types import EngineEvent, StopRule

if TYPE_CHECKING:
    from k2hybrid.engine.engine import Engine


class JobHandle:
    """A submitted job."""

    def __init__(self, engine: Engine, sequence: Sequence) -> None:
        self._engine = engine
        self._sequence = sequence

    def cancel(self) -> None:
        """End the job before its next step, with reason "cancelled". From any thread, at any time."""
        self._sequence.cancelled = True
        self._engine.wake()

    def resume(self, sink: Callable[[EngineEvent], None]) -> JobHandle:
        """Give `sink` all events so far, and go on where a cancelled resumable job ended.

        The rest comes out as it would have without the break: sampler, mask and stop rule go on as well.
        A job that ended otherwise gives its end again. Once; afterwards this handle is spent.

        Raises:
            EngineError: the job is not resumable, or the engine is stopped.
        """
        return self._engine.resume(self._sequence, sink)

    def go_on(
        self,
        sink: Callable[[EngineEvent], None],
        keep: int,
        *,
        stop: StopRule | None = None,
        temperature: float = 0.0,
    ) -> JobHandle:
        """Go on, after the job's end, behind the first `keep` tokens that it generated.

        Sampler and mask go on as they are, but for the tokens taken back. `sink` is given what is new alone.
        Once; afterwards this handle is spent.

        Args:
            stop: another rule; None: the same.
            temperature: at least so much from now on, so that another try may differ.

        Raises:
            EngineError: the job has not ended, or the engine is stopped.
        """
        return self._engine.go_on(self._sequence, sink, keep, stop, temperature)

    def lease(self, seconds: float) -> None:
        """Keep the job's latents from eviction for a time, as far as nobody running needs the room."""
        job, ids = self._sequence.job, self._sequence.ids

        def lease(memory: PageMemory) -> None:
            memory.lease(job.scope, ids, seconds)

        self._engine.call(lease)
