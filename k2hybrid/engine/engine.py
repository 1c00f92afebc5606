"""Engine: one thread that owns model and pages; tick = admit, plan, run, commit. Layer 4."""

from __future__ import annotations

import atexit
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Protocol

from k2hybrid.config import STEP_TOKENS, RuntimeConfig
from k2hybrid.engine.admission import WaitingLine, total_tokens
from k2hybrid.engine.archive import Archive, Fetch, Fetched
from k2hybrid.engine.choice import choose
from k2hybrid.engine.cost import CostModel, NetworkSizes
from k2hybrid.engine.handle import JobHandle
from k2hybrid.engine.inbox import Call, Inbox
from k2hybrid.engine.memory import PageMemory, PagePool
from k2hybrid.engine.metrics import ByteMeter, EngineMetrics, StepRecord
from k2hybrid.engine.scheduler import Candidate, Chunk, Scheduler, Share, pages_for
from k2hybrid.engine.sequence import Phase, Sequence
from k2hybrid.engine.step import Pass, StepModel, StepResult, StepRunner
from k2hybrid.errors import CapacityError, EngineError, ExpertReadError, K2Error, TimeLimitError
from k2hybrid.model.sampler import Sampler
from k2hybrid.types import DoneEvent, EngineEvent, Job, ReasonCode, StopRule

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5  # between two looks at time limits while nothing can run
MAX_BACKGROUND = 8  # jobs for idle times that may wait; the oldest is dropped


class EnginePages(PagePool, Protocol):
    """Latent pages as the engine sees them (`LatentPages` has it)."""

    @property
    def PAGE_TOKENS(self) -> int: ...  # noqa: N802 - a constant of the pages


class Engine:
    """Runs jobs together, each exactly as it would run alone.

    Args:
        model: owned by the engine's thread from now on, and so are `pages`.
        sizes: the model's bytes and operations, by which the time of a pass is predicted.
        vocab_size: length of a logits row.
        context_tokens: prompt and output of one request at most.
        meter: what the model reads, where its builder counts it.
        torch_threads: of torch's own operations in large passes.
        archive: latent pages in RAM and on disk.
        on_start: called in the engine's thread before its first step.

    Every submitted job gets exactly one `DoneEvent`, its last event. Events are delivered from the engine's
    thread; a sink that raises has its job cancelled.
    """

    def __init__(
        self,
        model: StepModel,
        pages: EnginePages,
        *,
        sizes: NetworkSizes,
        vocab_size: int,
        context_tokens: int,
        config: RuntimeConfig,
        meter: ByteMeter | None = None,
        torch_threads: int = 1,
        archive: Archive | None = None,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        self.metrics = EngineMetrics()
        self.context_tokens = context_tokens
        self._vocab_size = vocab_size
        self._max_queue = config.max_queue
        self._time_limit_s = config.request_seconds
        self._memory = PageMemory(pages, pages.PAGE_TOKENS, archive.spill if archive else None)
        self._waiting = WaitingLine(self._memory, config.max_running)
        self._cost = CostModel(sizes)
        step_tokens = config.max_step_tokens or STEP_TOKENS
        self._scheduler = Scheduler(step_tokens, self._cost)
        self._runner = StepRunner(model, sizes.parts, torch_threads)
        self._meter = meter or ByteMeter()
        self._archive = archive
        if archive is not None:
            self.metrics.traffic = archive.traffic
        # Free ahead of need: what two of the largest steps take, but not much of a small pool.
        step_pages = pages_for(step_tokens, pages.PAGE_TOKENS) + config.max_running
        self._spare_pages = min(2 * step_pages, self._memory.total_pages // 8)
        self._on_start = on_start
        self._numbers = itertools.count()
        self._inbox = Inbox()
        self._thread: threading.Thread | None = None  # what follows is that thread's own
        self._running: dict[int, Sequence] = {}
        self._background: deque[Sequence] = deque()
        self._chunk: Pass | None = None
        self._checked = True
        self._ended_s: float | None = None  # of the last tick; None: something was waited for since

    # --- from any thread --------------------------------------------------------------------------

    @property
    def capacity_tokens(self) -> int:
        """Prompt and output of one request at most: what context and pages both hold."""
        return min(self.context_tokens, self._memory.total_tokens)

    @property
    def page_tokens(self) -> int:
        """Tokens of a latent page."""
        return self._memory.page_tokens

    @property
    def latents(self) -> dict[str, int]:
        """See `PageMemory.snapshot`."""
        return self._memory.snapshot()

    @property
    def idle(self) -> bool:
        """Whether no request runs or waits, as far as another thread can tell."""
        return not (self._inbox or self._waiting or self._running)

    @property
    def costs(self) -> CostModel:
        """What passes take, as far as is known by now. To be asked, not taught."""
        return self._cost

    def start(self) -> None:
        """Start the engine's thread."""
        if self._thread is not None or self._inbox.stopping:
            raise EngineError("the engine was started before; build a new one")
        self._thread = threading.Thread(target=self._loop, name="k2hybrid-engine", daemon=True)
        # A thread that is in native code when the interpreter ends would take the process down with an abort.
        atexit.register(self.stop)
        self._thread.start()

    def stop(self) -> None:
        """End all jobs with "cancelled" and wait for the thread; later submissions are refused."""
        self._inbox.stop()
        atexit.unregister(self.stop)
        if self._thread is None:
            self._end_all("cancelled")
            if self._archive is not None:
                self._archive.close()
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
            most_pages=pages_for(total, self._memory.page_tokens),
        )
        return self._enqueue(sequence)

    def resume(self, ended: Sequence, sink: Callable[[EngineEvent], None]) -> JobHandle:
        """See `JobHandle.resume`."""
        if not ended.job.resumable:
            raise EngineError(f"request {ended.job.request_id!r} cannot be resumed; it was not submitted so")
        return self._enqueue(
            Sequence(
                number=next(self._numbers),
                job=replace(ended.job, sink=sink),
                sampler=ended.sampler,
                ids=list(ended.job.ids),
                prompt_tokens=ended.prompt_tokens,
                most_pages=ended.most_pages,
                resumes=ended,
            )
        )

    def go_on(
        self,
        ended: Sequence,
        sink: Callable[[EngineEvent], None],
        keep: int,
        stop: StopRule | None,
        temperature: float,
    ) -> JobHandle:
        """See `JobHandle.go_on`."""
        if ended.phase is not Phase.DONE:
            raise EngineError(f"request {ended.job.request_id!r} has not ended")
        if (done := ended.done) is not None and done.reason != "paused":
            self.call(lambda _: self.metrics.request(done.reason, done.usage, times=-1))
        length = ended.prompt_tokens + keep
        ended.sampler.forget(ended.ids[length:])
        ended.sampler.warm(temperature)
        return self._enqueue(
            Sequence(
                number=next(self._numbers),
                job=replace(ended.job, sink=sink, stop=stop or ended.job.stop),
                sampler=ended.sampler,
                ids=ended.ids[:length],
                prompt_tokens=ended.prompt_tokens,
                most_pages=ended.most_pages,
                kept=ended.kept[:keep],
                goes_on=True,
                cached_before=ended.cached_of_prompt,
                submitted_s=ended.submitted_s,
                started_s=ended.started_s,
                first_token_s=ended.first_token_s,
            )
        )

    def call(self, function: Call) -> None:
        """Have the engine's thread call `function` between two steps."""
        self._inbox.call(function)

    def wake(self) -> None:
        """Let the engine's thread look around."""
        self._inbox.wake()

    def _enqueue(self, sequence: Sequence) -> JobHandle:
        # What was let in once comes back whenever it likes.
        limit = None if sequence.resumes or sequence.goes_on else self._max_queue
        self._inbox.put(sequence, limit=limit, waiting=lambda: len(self._waiting))
        return JobHandle(self, sequence)

    # --- the engine's thread ----------------------------------------------------------------------

    def tick(self) -> bool:
        """Admit, plan, run, commit; False if there is nothing to run until something comes from outside."""
        began_s = self._ended_s or time.perf_counter()
        self._look_around()
        self._memory.make_room(self._spare_pages)
        for sequence in self._waiting.admit(self._running):
            self._fetch(sequence)
        if not self._running:
            self._start_background()
        waiting = self._promise_pages()
        self.metrics.running, self.metrics.waiting = len(self._running), len(self._waiting)
        plan = self._scheduler.plan(
            [
                Candidate(s.number, s.pending, s.decoding, s.computed)
                for s in self._running.values()
                if not s.fetching and s not in waiting
            ],
            self._chunk_left(),
        )
        if not plan:
            self._check_when_idle()
            self._ended_s = None
            return False
        self._checked = False
        run = self._run(plan.shares) if plan.shares else None
        passed_s = time.perf_counter()
        if plan.begin:
            self._chunk = self._begin(plan.begin)
        if plan.advance and self._chunk is not None:
            chunk, self._chunk = self._chunk, None
            if not self._advance(chunk, plan.advance):
                self._chunk = chunk
        self._ended_s = time.perf_counter()
        chunk_us = (self._ended_s - passed_s) * 1e6
        # What a step takes for those who decode: all since the tick before but the chunk.
        step_us = (self._ended_s - began_s) * 1e6 - chunk_us
        if run is not None and run.took_us:
            self._cost.observe_rest(step_us - run.took_us)
        self._scheduler.ran(round(step_us) if plan.shares else 0, round(chunk_us))
        return True

    def _loop(self) -> None:
        try:
            self._on_start()
        except Exception:
            log.exception("preparing the engine's thread failed; it runs unprepared")
        idle = True
        while True:
            if idle:
                limited = self._time_limit_s and (self._waiting or self._running)
                self._inbox.sleep(LOOK_SECONDS if limited else None)
            if self._inbox.stopping:
                break
            try:
                idle = not self.tick()
            except Exception as error:  # a bug of ours: those concerned are told, and the thread lives on
                log.exception("engine step failed")
                self._end_all("error", EngineError(f"the engine failed: {error}"))
        self._end_all("cancelled")
        if self._archive is not None:
            self._archive.close()

    def _look_around(self) -> None:
        """Take in what came from other threads; end what is cancelled or overdue, or has to make room."""
        arrived, calls = self._inbox.take()
        for function in calls:
            try:
                function(self._memory)
            except Exception:  # a bug of ours; what else came must not be lost with it
                log.exception("a call into the engine's thread failed")
                self.metrics.integrity_errors += 1
        if calls:
            self._waiting.unblock()
        for sequence in (s for s in arrived if s.job.background):
            if len(self._background) == MAX_BACKGROUND:
                self._finish(self._background.popleft(), "cancelled")
            self._background.append(sequence)
        arrived = [s for s in arrived if not s.job.background]
        if arrived:
            for sequence in [s for s in self._running.values() if s.job.background]:
                sequence.cancelled = True
        overdue = time.perf_counter() - self._time_limit_s if self._time_limit_s else None
        for sequence in [*self._waiting, *self._running.values()]:
            if sequence.cancelled:
                self._end(sequence, *(sequence.ending or ("cancelled", None)))
            elif overdue is not None and sequence.submitted_s < overdue:
                self._end(
                    sequence, "error", TimeLimitError(
                        f"the request ran for more than {self._time_limit_s:g} s (request_seconds)"
                    )
                )  # fmt: skip
        self._waiting.join(s for s in arrived if s.resumes is None or self._take_up(s, s.resumes))

    def _take_up(self, sequence: Sequence, ended: Sequence) -> bool:
        """Let `sequence` go on where `ended` is; False if there is nothing to go on with."""
        sequence.resumes = None
        if ended.phase is not Phase.DONE:
            self._end(ended, "cancelled", now=True)
        sequence.ids, sequence.kept = ended.ids, ended.kept
        for event in sequence.kept:
            self._emit(sequence, event)
        if ended.done is None or ended.done.reason == "cancelled":
            return True
        sequence.phase, sequence.done = Phase.DONE, ended.done
        self._emit(sequence, ended.done)
        return False

    def _start_background(self) -> None:
        while self._background and not self._waiting and not self._running:
            sequence = self._background.popleft()
            if sequence.cancelled:
                self._finish(sequence, "cancelled")
            elif not self._memory.admit(sequence):
                self._finish(sequence, "error", CapacityError("no latent pages are left that nobody wants"))
            elif sequence.pending == 1 and not sequence.job.max_tokens:
                sequence.phase, self._running[sequence.number] = Phase.RUNNING, sequence
                self._finish(sequence, "length")  # all but the last token is known: as good as all of it
            else:
                sequence.phase, self._running[sequence.number] = Phase.RUNNING, sequence
                self._fetch(sequence)

    def _promise_pages(self) -> list[Sequence]:
        """See to pages for answers that outgrow what they were promised; those who must wait for some.

        The oldest come first. Where no pages are left the youngest makes room whose pages nothing writes to.
        """
        waiting: list[Sequence] = []
        size = self._memory.page_tokens
        short = [s for s in self._running.values() if len(s.ids) > s.reserved_pages * size]
        for sequence in sorted(short, key=_number):
            while sequence.phase is Phase.RUNNING and not self._memory.extend(sequence):
                younger = [s for s in self._running.values() if s.number >= sequence.number]
                free = [s for s in younger if not s.fetching and not self._in_chunk(s)]
                if not free or (free == [sequence] and len(younger) > 1):
                    waiting.append(sequence)
                    break
                self._put_back(max(free, key=_number))
        return waiting

    def _put_back(self, sequence: Sequence) -> None:
        """Have a running sequence give up its pages and wait; it goes on from what is left of them then."""
        if sequence.job.background:
            self._finish(sequence, "cancelled")
            return
        del self._running[sequence.number]
        sequence.phase = Phase.WAITING
        sequence.cached_before = sequence.cached_of_prompt
        try:
            self._memory.publish(sequence)
            self._keep(sequence)
        except Exception:  # a bug of ours; its pages are computed again then
            log.exception("the pages of request %r could not be published", sequence.job.request_id)
            self.metrics.integrity_errors += 1
        self._memory.leave(sequence)
        self._runner.forget(sequence)
        self._waiting.put_back(sequence)
        self.metrics.put_back += 1

    def _in_chunk(self, sequence: Sequence) -> bool:
        chunk = self._chunk
        return chunk is not None and any(share.number == sequence.number for share in chunk.shares)

    # --- RAM and journal ------------------------------------------------------------------------------

    def _fetch(self, sequence: Sequence, least: int = 1) -> None:
        """Begin to bring back what of the prompt lies in RAM or on disk and not in the pool.

        Args:
            least: tokens; less is sooner computed.
        """
        if self._archive is None or not sequence.job.reuse:
            return
        fetch = None
        try:
            fetch = self._archive.find(sequence, least)
            if fetch is None:
                return
            self._memory.drop_partial(sequence)
            self._memory.grow(sequence, fetch.tokens, ready=False)
            sequence.fetching = True
            self._archive.read(sequence, fetch, self._memory, self._reporting(sequence, fetch))
        except Exception:  # it is prefilled instead
            log.exception("no pages are brought back for request %r", sequence.job.request_id)
            sequence.fetching = False
            if fetch is not None:
                self._archive.end(fetch)
            for copy in self._memory.leaving(sequence.pages):
                copy.exception()  # waits: the sequence is about to write these pages

    def _reporting(self, sequence: Sequence, fetch: Fetch) -> Callable[[Fetched], None]:
        return lambda fetched: self.call(lambda _: self._fetched(sequence, fetch, fetched))

    def _fetched(self, sequence: Sequence, fetch: Fetch, fetched: Fetched) -> None:
        sequence.fetching = False
        if self._archive is not None:
            self._archive.end(fetch, fetched)
        if sequence.phase is Phase.RUNNING:
            sequence.cached_tokens += fetched.tokens - sequence.computed
            sequence.computed = fetched.tokens
            self._memory.shrink(sequence)
            self._memory.publish(sequence)

    def _keep(self, sequence: Sequence, *, last: bool = False) -> None:
        """Offer what was published to the journal."""
        if self._archive is not None and sequence.job.store:
            self._archive.keep(sequence, self._memory, self.call, last=last)

    # --- passes -----------------------------------------------------------------------------------

    def _chunk_left(self) -> Chunk | None:
        chunk = self._chunk
        if chunk is None:
            return None
        numbers = frozenset(share.number for share in chunk.shares)
        return Chunk(chunk.rows, chunk.part, numbers)

    def _run(self, shares: tuple[Share, ...]) -> Pass | None:
        """A whole pass; None: it could not begin."""
        begun = self._begin(shares)
        if begun is not None:
            self._advance(begun, self._runner.parts)
        return begun

    def _begin(self, shares: tuple[Share, ...]) -> Pass | None:
        started_s = time.perf_counter()
        try:
            for share in shares:
                sequence = self._running[share.number]
                sequence.started_s = sequence.started_s or started_s
                self._memory.grow(sequence, sequence.computed + share.tokens)
            # Who wants no token needs no logits.
            wanted = (
                s._replace(last=False) if s.last and not self._running[s.number].job.max_tokens else s
                for s in shares
            )
            return self._runner.begin(tuple(wanted), self._running)
        except Exception as error:
            self._fail_pass(shares, error)
            return None

    def _advance(self, run: Pass, parts: int) -> bool:
        """Some parts of layers more; whether the pass is over: finished and committed, or failed."""
        started_s = time.perf_counter()
        expert_bytes = self._meter.expert_bytes
        first = run.part
        result = None
        try:
            if self._runner.advance(run, parts):
                result = self._runner.finish(run)
        except Exception as error:
            self._fail_pass(run.shares, error)
            return True
        took_us, logits = (time.perf_counter() - started_s) * 1e6, run.batch.logit_rows.numel() > 0
        run.took_us += took_us
        self._cost.observe(list(run.rows), first, run.part, took_us, logits=logits)
        decoding = sum([self._running[share.number].decoding for share in run.shares])
        if result is not None:
            for share in run.shares:
                self._commit(self._running[share.number], share, result)
        read = self._meter.expert_bytes - expert_bytes
        prefilled = [(run.tokens - decoding) * part // self._runner.parts for part in (first, run.part)]
        ended_s = time.perf_counter()
        self.metrics.step(
            StepRecord(
                decode_tokens=decoding if result is not None else 0,
                prefill_tokens=prefilled[1] - prefilled[0],
                ms=(ended_s - started_s) * 1e3,
                bytes_read=self._meter.step_bytes * (run.part - first) // self._runner.parts + read,
                expert_bytes=read,
                ended_s=ended_s,
            )
        )
        return result is not None

    def _fail_pass(self, shares: Iterable[Share], error: Exception) -> None:
        shares = list(shares)
        log.exception("a pass over %d tokens failed", sum(share.tokens for share in shares))
        self.metrics.failed_steps += 1
        for share in shares:
            self._fail(self._running[share.number], error)

    def _commit(self, sequence: Sequence, share: Share, result: StepResult) -> None:
        if share.number in result.failed:
            self._fail(
                sequence,
                ExpertReadError(
                    "an expert, or a token's embedding, could not be read for this request; others go on. "
                    "The log names the file: put it back whole, and the same request works again"
                ),
            )
            return
        if sequence.cancelled or not share.last:
            sequence.computed += share.tokens
            if sequence.cancelled:
                self._finish(sequence, *(sequence.ending or ("cancelled", None)))
            elif not sequence.pending:  # of a job that wants no token
                self._finish(sequence, "length")
            else:
                # Whoever waits for this prefix goes on from here.
                if sequence.job.progress and not sequence.generated:
                    self._emit(sequence, sequence.progress())
                self._memory.publish(sequence)
                self._keep(sequence)
                self._waiting.unblock()
                # Others may lie behind a page that was lost: they are not computed as long as they exist.
                self._fetch(sequence, self._memory.page_tokens)
            return
        job = sequence.job
        try:
            events, ends = choose(sequence, result.logits[share.number], result.extremes[share.number])
        except Exception as error:  # non-finite logits, or a mask or stop rule at fault: this request alone
            if not isinstance(error, K2Error):
                log.exception("choosing a token failed for request %r", job.request_id)
            self._fail(sequence, error)
            return
        paged = sequence.computed // self._memory.page_tokens
        sequence.computed += share.tokens
        first = sequence.generated == 0
        sequence.ids += [event.token for event in events]
        sequence.last_token_s = time.perf_counter()
        if not sequence.first_token_s:
            sequence.first_token_s = sequence.last_token_s
            if job.progress:
                self._emit(sequence, sequence.progress())
        if first or share.tokens > 1:  # whoever waits for this prefix goes on from here
            self._memory.publish(sequence)
            self._waiting.unblock()
        if sequence.computed // self._memory.page_tokens != paged or first:
            self._keep(sequence)
        if job.resumable:
            sequence.kept += events
        for event in events:
            self._emit(sequence, event)
        if ends:
            self._finish(sequence, "paused" if job.stop.paused else "stop")
        elif sequence.generated >= job.max_tokens:
            self._finish(sequence, "length")

    # --- ends -------------------------------------------------------------------------------------

    def _end(
        self, sequence: Sequence, reason: ReasonCode, error: Exception | None = None, *, now: bool = False
    ) -> None:
        """Finish a sequence that may be part of the chunk, whose layers still write into its pages.

        Then it goes with the chunk: at once if nobody else in it goes on (or with `now`: the others begin
        anew), else when the chunk is through.
        """
        if sequence.fetching:  # its pages are written to until `_fetched`
            sequence.cancelled, sequence.ending = True, (reason, error)
            return
        chunk = self._chunk
        if chunk is not None and self._in_chunk(sequence):
            sequence.cancelled, sequence.ending = True, (reason, error)
            if not now and not all(self._running[share.number].cancelled for share in chunk.shares):
                return
            self._chunk = None
        self._finish(sequence, reason, error)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        """End with "error". Its pages are not offered to others: they may hold what made it fail."""
        self._finish(sequence, "error", error)

    def _finish(self, sequence: Sequence, reason: ReasonCode, error: Exception | None = None) -> None:
        if sequence.phase is Phase.RUNNING:
            del self._running[sequence.number]
            try:
                if reason != "error":
                    self._memory.publish(sequence)
                    self._keep(sequence, last=True)
                self._memory.leave(sequence)
            except Exception:  # a bug of ours; whoever waits for this request must still hear its end
                log.exception("the pages of request %r could not be given back", sequence.job.request_id)
                self.metrics.integrity_errors += 1
            self._runner.forget(sequence)
        elif sequence.phase is Phase.WAITING and sequence in self._waiting:
            self._waiting.leave(sequence)
        sequence.phase = Phase.DONE
        self._waiting.unblock()
        usage = sequence.usage()
        if not sequence.job.background and reason != "paused":
            self.metrics.request(reason, usage)
        sequence.done = DoneEvent(reason, usage, error)
        self._emit(sequence, sequence.done)

    def _end_all(self, reason: ReasonCode, error: Exception | None = None) -> None:
        arrived = self._inbox.take().sequences
        self._chunk = None
        for sequence in [*self._waiting, *self._running.values(), *self._background, *arrived]:
            if sequence.fetching and not self._inbox.stopping:
                sequence.cancelled, sequence.ending = True, (reason, error)
            else:
                self._finish(sequence, reason, error)
        self._background.clear()

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
        try:
            self.check()
        except EngineError:  # counted; requests to come are not to blame
            log.exception("a check of the latent pages failed")

    def check(self) -> None:
        """Prove that all holds on pages add up. For the engine's thread, or while it does not run.

        Raises:
            EngineError: they do not.
        """
        try:
            self._memory.check()
            if self._archive is not None:
                self._archive.check()
        except EngineError:
            self.metrics.integrity_errors += 1
            raise

    def cached_prefix(self, ids: Seq[int], scope: str = "") -> int:
        """How many of `ids` have their latents in the pool now. Same threads as `check`."""
        return self._memory.tree.match(ids, scope).tokens


def _number(sequence: Sequence) -> int:
    return sequence.number
