"""Engine: one thread that owns model and pages; tick = admit, plan, run, commit. Layer 4."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Protocol

from k2hybrid.config import RuntimeConfig
from k2hybrid.engine.admission import WaitingLine, total_tokens
from k2hybrid.engine.memory import PageMemory, PagePool
from k2hybrid.engine.metrics import ByteMeter, EngineMetrics, StepRecord
from k2hybrid.engine.scheduler import Candidate, Scheduler, Share, StepPlan, pages_for
from k2hybrid.engine.sequence import Phase, Sequence
from k2hybrid.engine.step import StepModel, StepResult, StepRunner
from k2hybrid.errors import CapacityError, EngineError, ExpertReadError
from k2hybrid.model.sampler import Sampler
from k2hybrid.types import DoneEvent, EngineEvent, Job, ReasonCode, TokenEvent

log = logging.getLogger(__name__)


class EnginePages(PagePool, Protocol):
    """Latent pages as the engine sees them (`LatentPages` has it)."""

    @property
    def PAGE_TOKENS(self) -> int: ...  # noqa: N802 - a constant of the pages


class JobHandle:
    """A submitted job."""

    def __init__(self, engine: Engine, sequence: Sequence) -> None:
        self._engine = engine
        self._sequence = sequence

    def cancel(self) -> None:
        """End the job before its next step, with reason "cancelled". From any thread, at any time."""
        self._sequence.cancelled = True
        self._engine.wake()


class Engine:
    """Runs jobs together, each exactly as it would run alone.

    Args:
        model: owned by the engine's thread from now on, and so are `pages`.
        vocab_size: length of a logits row.
        context_tokens: prompt and output of one request at most.
        meter: what the model reads, where its builder counts it.
        torch_threads: of torch's own operations in large steps.
        on_start: called in the engine's thread before its first step.

    Every submitted job gets exactly one `DoneEvent`, its last event. Events are delivered from the engine's
    thread; a sink that raises has its job cancelled.
    """

    def __init__(
        self,
        model: StepModel,
        pages: EnginePages,
        *,
        vocab_size: int,
        context_tokens: int,
        config: RuntimeConfig,
        meter: ByteMeter | None = None,
        torch_threads: int = 1,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        self.metrics = EngineMetrics()
        self.context_tokens = context_tokens
        self._vocab_size = vocab_size
        self._max_queue = config.max_queue
        self._memory = PageMemory(pages, pages.PAGE_TOKENS)
        self._waiting = WaitingLine(self._memory, config.max_running)
        self._scheduler = Scheduler(config.max_step_tokens)
        self._runner = StepRunner(model, torch_threads)
        self._meter = meter or ByteMeter()
        self._on_start = on_start
        self._numbers = itertools.count()
        self._condition = threading.Condition()
        self._inbox: deque[Sequence] = deque()  # guarded by the condition; the rest is the engine thread's
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._running: dict[int, Sequence] = {}
        self._checked = True

    # --- from any thread --------------------------------------------------------------------------

    @property
    def capacity_tokens(self) -> int:
        """Prompt and output of one request at most: what context and pages both hold."""
        return min(self.context_tokens, self._memory.total_tokens)

    def start(self) -> None:
        """Start the engine's thread."""
        with self._condition:
            if self._thread is not None or self._stopping:
                raise EngineError("the engine was started before; build a new one")
            self._thread = threading.Thread(target=self._loop, name="k2hybrid-engine", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End all jobs with "cancelled" and wait for the thread; later submissions are refused."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread is None:
            self._end_all("cancelled")
        elif self._thread is not threading.current_thread():
            self._thread.join()

    def submit(self, job: Job) -> JobHandle:
        """Queue `job`.

        Raises:
            RequestError: empty prompt, ids outside the vocabulary, sampling parameters out of range.
            ContextLengthError: prompt and max_tokens exceed the context.
            CapacityError: they exceed all latent pages, or the queue is full.
            EngineError: the engine is stopped.
        """
        total = total_tokens(
            job,
            vocab_size=self._vocab_size,
            context_tokens=self.context_tokens,
            pool_tokens=self._memory.total_tokens,
        )
        sequence = Sequence(
            number=next(self._numbers),
            job=job,
            sampler=Sampler(job.sampling, self._vocab_size, job.ids),
            ids=list(job.ids),
            prompt_tokens=len(job.ids),
            reserved_pages=pages_for(total, self._memory.page_tokens),
        )
        with self._condition:
            if self._stopping:
                raise EngineError("the engine is stopped")
            if len(self._inbox) + len(self._waiting) >= self._max_queue:
                raise CapacityError(
                    f"{self._max_queue} requests are waiting already (max_queue); try again later"
                )
            self._inbox.append(sequence)
            self._condition.notify()
        return JobHandle(self, sequence)

    def wake(self) -> None:
        """Let the engine's thread look around."""
        with self._condition:
            self._condition.notify()

    # --- the engine's thread ----------------------------------------------------------------------

    def tick(self) -> bool:
        """Admit, plan, run, commit; False if there was nothing to run."""
        with self._condition:
            self._waiting.join(self._inbox)
            self._inbox.clear()
        self._sweep_cancelled()
        self._waiting.admit(self._running)
        self.metrics.running, self.metrics.waiting = len(self._running), len(self._waiting)
        plan = self._scheduler.plan(
            [Candidate(s.number, s.pending, s.decoding) for s in self._running.values()]
        )
        if not plan.shares:
            self._check_when_idle()
            return False
        self._checked = False
        self._step(plan)
        return True

    def _loop(self) -> None:
        try:
            self._on_start()
        except Exception:
            log.exception("preparing the engine's thread failed; it runs unprepared")
        while True:
            with self._condition:
                while not (
                    self._stopping or self._inbox or self._waiting or self._running or not self._checked
                ):
                    self._condition.wait()
                if self._stopping:
                    break
            try:
                self.tick()
            except Exception as error:  # a bug of ours: those concerned are told, and the thread lives on
                log.exception("engine step failed")
                self._end_all("error", EngineError(f"the engine failed: {error}"))
        self._end_all("cancelled")

    def _sweep_cancelled(self) -> None:
        for sequence in [*self._waiting, *self._running.values()]:
            if sequence.cancelled:
                self._finish(sequence, "cancelled")

    def _step(self, plan: StepPlan) -> None:
        started_s = time.perf_counter()
        expert_bytes = self._meter.expert_bytes
        try:
            for share in plan.shares:
                sequence = self._running[share.number]
                sequence.started_s = sequence.started_s or started_s
                self._memory.grow(sequence, sequence.computed + share.tokens)
            result = self._runner.run(plan, self._running)
        except Exception as error:
            log.exception("a step of %d tokens failed", plan.tokens)
            self.metrics.failed_steps += 1
            for share in plan.shares:
                self._fail(self._running[share.number], error)
            return
        decoding = sum(1 for share in plan.shares if self._running[share.number].decoding)
        for share in plan.shares:
            self._commit(self._running[share.number], share, result)
        read = self._meter.expert_bytes - expert_bytes
        self.metrics.step(
            StepRecord(
                decode_tokens=decoding,
                prefill_tokens=plan.tokens - decoding,
                ms=(time.perf_counter() - started_s) * 1e3,
                bytes_read=self._meter.step_bytes + read,
                expert_bytes=read,
            )
        )

    def _commit(self, sequence: Sequence, share: Share, result: StepResult) -> None:
        if share.number in result.failed:
            self._fail(
                sequence, ExpertReadError("an expert could not be read for this request; others go on")
            )
            return
        if sequence.cancelled:
            sequence.computed += share.tokens
            self._finish(sequence, "cancelled")
            return
        if not share.last:
            sequence.computed += share.tokens
            return
        job = sequence.job
        first = not sequence.decoding
        try:
            token, logprob = sequence.sampler.sample(result.logits[share.number], job.mask)
            ends = job.stop.push(token)
        except Exception as error:  # non-finite logits, or a mask or stop rule at fault: this request alone
            self._fail(sequence, error)
            return
        sequence.computed += share.tokens
        sequence.ids.append(token)
        sequence.last_token_s = time.perf_counter()
        if first:
            sequence.first_token_s = sequence.last_token_s
            self._memory.publish(sequence)
            self._waiting.unblock()
        self._emit(sequence, TokenEvent(token, logprob))
        if ends:
            self._finish(sequence, "stop")
        elif sequence.generated >= job.max_tokens:
            self._finish(sequence, "length")

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        """End with "error". Its pages are not offered to others: they may hold what made it fail."""
        self._finish(sequence, "error", error)

    def _finish(self, sequence: Sequence, reason: ReasonCode, error: Exception | None = None) -> None:
        if sequence.phase is Phase.RUNNING:
            del self._running[sequence.number]
            try:
                if reason != "error":
                    self._memory.publish(sequence)
                self._memory.leave(sequence)
            except Exception:  # a bug of ours; whoever waits for this request must still hear its end
                log.exception("the pages of request %r could not be given back", sequence.job.request_id)
                self.metrics.integrity_errors += 1
            self._runner.forget(sequence)
        elif sequence.phase is Phase.WAITING:
            self._waiting.leave(sequence)
        sequence.phase = Phase.DONE
        self._waiting.unblock()
        usage = sequence.usage()
        self.metrics.request(reason, usage)
        self._emit(sequence, DoneEvent(reason, usage, error))

    def _end_all(self, reason: ReasonCode, error: Exception | None = None) -> None:
        with self._condition:
            self._waiting.join(self._inbox)
            self._inbox.clear()
        for sequence in [*self._waiting, *self._running.values()]:
            self._finish(sequence, reason, error)

    def _emit(self, sequence: Sequence, event: EngineEvent) -> None:
        try:
            sequence.job.sink(event)
        except Exception:
            log.exception("the sink of request %r failed; the request is cancelled", sequence.job.request_id)
            sequence.cancelled = True

    def _check_when_idle(self) -> None:
        if self._checked or self._running or self._waiting:
            return
        self._checked = True
        self.check()

    def check(self) -> None:
        """Prove that the references on pages add up. For the engine's thread, or while it does not run.

        Raises:
            EngineError: they do not.
        """
        try:
            self._memory.check()
        except EngineError:
            self.metrics.integrity_errors += 1
            raise

    def cached_prefix(self, ids: Seq[int]) -> int:
        """How many of `ids` need no prefill now. Same threads as `check`."""
        return self._memory.tree.match(ids)[1]
