"""Requests beside each other: what a batch gains, what a long prefill does to decodes, what the engine costs.

    python -m bench.serve                          the built-in model
    python -m bench.serve --model SLICE --prefill 32768 --json FILE

Bars: eight requests together decode ≥ 0.9 × the gain that the distinct bytes predict; during a long prefill
every decode keeps ≥ half of its speed, no gap exceeds max(2 decode steps, one layer of the chunk), and
the prefill takes ≤ 2.2 × as long as alone; all but the model costs ≤ 300 µs a step at batch 8 and ≤ 20 µs for
each further sequence. The exit status is 1 if one is missed.

Tokens are taken as the server takes them, by coroutines of one event loop, and speeds are by the clock of
those who take them: events, planning and the interpreter's lock are part of them.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

from bench.stub import Silent
from k2hybrid.bench.report import conditions
from k2hybrid.checkpoint.spec import read_spec
from k2hybrid.config import MINI_MODEL, STEP_TOKENS, RuntimeConfig
from k2hybrid.engine.cost import LARGE_ROWS
from k2hybrid.engine.scheduler import Candidate, Scheduler
from k2hybrid.engine.step import Pass, StepRunner
from k2hybrid.native.machine import Machine
from k2hybrid.runtime.generate import StopTokens
from k2hybrid.runtime.loading import open_runtime
from k2hybrid.runtime.runtime import Runtime
from k2hybrid.types import DoneEvent, EngineEvent, Job, SamplingParams

GREEDY = SamplingParams(temperature=0.0)
BATCH, DECODED = 8, 128  # requests together, and tokens of each
DECODES = 2  # beside a prefill
GAIN_BAR, SPEED_BAR, PREFILL_BAR = 0.9, 0.5, 2.2
STEP_BAR_US, FURTHER_BAR_US = 300.0, 20.0


class Stream:
    """One request, taken by a task of the running event loop: when its tokens came."""

    def __init__(self, runtime: Runtime, prompt: list[int], tokens: int) -> None:
        self.at: list[float] = []
        self.began = time.perf_counter()
        self._run = runtime.generate(prompt, GREEDY, tokens, stop_ids=())
        self.task = asyncio.create_task(self._take())

    async def _take(self) -> None:
        async for _ in self._run:
            self.at.append(time.perf_counter())

    async def cancel(self) -> None:
        """End it, and wait until it has ended."""
        self._run.cancel()
        await self.task

    @property
    def first_s(self) -> float:
        """Seconds to the first token."""
        return self.at[0] - self.began


class ChunkWatch:
    """Times what the engine runs of large chunks: the metrics do not say how many parts a record is of."""

    def __init__(self) -> None:
        self._took: dict[int, tuple[float, int]] = {}  # context at a chunk's end → seconds, parts

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While it lasts."""
        advance = StepRunner.advance

        def timed(runner: StepRunner, run: Pass, parts: int) -> bool:
            first, began = run.part, time.perf_counter()
            over = advance(runner, run, parts)
            if run.tokens >= LARGE_ROWS:
                context = run.rows[0].context
                seconds, before = self._took.get(context, (0.0, 0))
                self._took[context] = (
                    seconds + time.perf_counter() - began,
                    before + run.part - first,
                )
            return over

        with mock.patch.object(StepRunner, "advance", timed):
            yield

    def layer_seconds(self, tokens: int, layer_parts: int) -> float:
        """A mean layer of the chunk that holds the token at `tokens`."""
        seconds, parts = self._took[min(self._took, key=lambda context: (context <= tokens, context))]
        return seconds / parts * layer_parts


@dataclass(frozen=True)
class Beside:
    """What one decode noticed of one prefill."""

    kept: float  # of its mean speed
    step_s: float  # without a prefill
    gaps: list[float]  # all that the prefill lay in at least in part
    allowed_s: float
    alone: list[float]  # gaps before and after

    @property
    def too_long(self) -> int:
        """Gaps that the bar does not allow."""
        return sum(gap > self.allowed_s for gap in self.gaps)


def prompts(count: int, length: int, vocab: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(length)] for _ in range(count)]


def verdict(holds: bool) -> str:
    return "holds" if holds else "MISSED"


async def decode(runtime: Runtime, count: int, seed: int) -> tuple[float, float]:
    """Tokens/s of `count` requests together, and bytes read a step, while all of them decode."""
    runtime.engine.metrics.recent.clear()
    vocab = runtime.spec.vocab_size - 300
    streams = [Stream(runtime, prompt, DECODED) for prompt in prompts(count, 16, vocab, seed)]
    for stream in streams:
        await stream.task
    began, ended = max(s.at[0] for s in streams), min(s.at[-1] for s in streams)
    came = sum(began < at <= ended for s in streams for at in s.at)
    records = [r for r in runtime.engine.metrics.recent if r.decode_tokens == count and not r.prefill_tokens]
    return came / (ended - began), statistics.median(r.bytes_read for r in records)


async def batching(runtime: Runtime, rounds: int) -> dict[str, Any]:
    """Gain of eight requests over one, beside what the bytes predict; alternating."""
    alone, together, gains, predicted = [], [], [], []
    for n in range(rounds):
        one, one_bytes = await decode(runtime, 1, n)
        eight, eight_bytes = await decode(runtime, BATCH, 100 + n)
        alone.append(one)
        together.append(eight)
        gains.append(eight / one)
        predicted.append(BATCH * one_bytes / eight_bytes)
    gain, bytes_gain = statistics.median(gains), statistics.median(predicted)
    holds = gain >= GAIN_BAR * bytes_gain
    print(
        f"batch of {BATCH}: {statistics.median(together):.1f} tokens/s, {gain:.2f}× those of one "
        f"({statistics.median(alone):.1f}); bytes predict {bytes_gain:.2f}× → {gain / bytes_gain:.2f} "
        f"(bar {GAIN_BAR}: {verdict(holds)})",
        flush=True,
    )
    return {
        "alone_tokens_s": alone,
        "together_tokens_s": together,
        "gain": gain,
        "predicted": bytes_gain,
        "share": gain / bytes_gain,
        "holds": holds,
    }


async def disturbed(runtime: Runtime, length: int, rounds: int) -> dict[str, Any]:
    """Decodes beside a long prefill, and both alone; alternating.

    The decodes' contexts grow meanwhile, so their speed alone is the mean of that before and that after.
    """
    vocab = runtime.spec.vocab_size - 300
    found: list[list[Beside]] = []
    alone_s, beside_s, predicted_s, measured_s = [], [], [], []
    for n in range(rounds):
        (alone,) = (Stream(runtime, p, 1) for p in prompts(1, length, vocab, 1000 + n))
        await alone.task
        decodes = [Stream(runtime, p, 100_000) for p in prompts(DECODES, 16, vocab, 2000 + n)]
        before = await gaps_of(decodes, skip=8)
        watch = ChunkWatch()
        with watch.watching():
            (long,) = (Stream(runtime, p, 1) for p in prompts(1, length, vocab, 3000 + n))
            await long.task
        after = await gaps_of(decodes)
        for stream in decodes:
            await stream.cancel()
        alone_s.append(alone.first_s)
        beside_s.append(long.first_s)
        predicted_s.append(predicted_layer_seconds(runtime, length))
        measured_s.append(watch.layer_seconds(length // 2, runtime.engine.costs.sizes.layer_parts))
        found.append(
            [
                beside(stream, long, calm, predicted_s[-1])
                for stream, calm in zip(decodes, zip(before, after, strict=True), strict=True)
            ]
        )
    return disturbance(found, alone_s, beside_s, predicted_s, measured_s)


def beside(
    stream: Stream, prefill: Stream, calm: tuple[Sequence[float], Sequence[float]], layer_s: float
) -> Beside:
    """`stream` during the prefill, given its gaps before and after."""
    began, ended = prefill.began, prefill.at[0]
    gaps = [b - a for a, b in pairwise(stream.at) if a < ended and b > began]
    step = statistics.fmean(map(statistics.median, calm))
    mean = statistics.fmean(map(statistics.fmean, calm))
    return Beside(mean / statistics.fmean(gaps), step, gaps, max(2 * step, layer_s), [*calm[0], *calm[1]])


def disturbance(
    found: Sequence[Sequence[Beside]],
    alone_s: Sequence[float],
    beside_s: Sequence[float],
    predicted_s: Sequence[float],
    measured_s: Sequence[float],
) -> dict[str, Any]:
    """Figures of all rounds against the bars: speed and time are medians over rounds, gaps are all gaps."""
    slowest = [min(decode.kept for decode in decodes) for decodes in found]
    each = [decode for decodes in found for decode in decodes]
    gaps = [gap for decode in each for gap in decode.gaps]
    too_long, worst = sum(d.too_long for d in each), max(max(d.gaps) / d.allowed_s for d in each)
    ratios = [long / alone for long, alone in zip(beside_s, alone_s, strict=True)]
    speed, ratio = statistics.median(slowest), statistics.median(ratios)
    ms = {
        "longest_gap_ms": max(gaps) * 1e3,
        "gap_99_ms": statistics.quantiles(gaps, n=100)[98] * 1e3,
        "longest_gap_alone_ms": max(max(d.alone) for d in each) * 1e3,
        "allowed_ms": statistics.median(d.allowed_s for d in each) * 1e3,
        "decode_step_ms": statistics.median(d.step_s for d in each) * 1e3,
        "layer_predicted_ms": statistics.median(predicted_s) * 1e3,
        "layer_measured_ms": statistics.median(measured_s) * 1e3,
    }
    holds = {"speed": speed >= SPEED_BAR, "gaps": not too_long, "prefill": ratio <= PREFILL_BAR}
    print(
        f"beside a prefill the slowest of {DECODES} decodes keeps {speed:.2f} of its speed "
        f"(bar {SPEED_BAR}: {verdict(holds['speed'])}; by round {', '.join(f'{s:.2f}' for s in slowest)})\n"
        f"  gaps: longest {ms['longest_gap_ms']:.1f} ms, 99 % {ms['gap_99_ms']:.1f}, longest without a "
        f"prefill {ms['longest_gap_alone_ms']:.1f}; allowed {ms['allowed_ms']:.1f} (a step "
        f"{ms['decode_step_ms']:.1f}; a layer, predicted {ms['layer_predicted_ms']:.1f}, measured "
        f"{ms['layer_measured_ms']:.1f}); {too_long} of {len(gaps)} are longer, the worst {worst:.2f} of "
        f"what is allowed (bar 1: {verdict(holds['gaps'])})\n"
        f"  the prefill takes {ratio:.2f}× as long as alone ({statistics.median(alone_s):.2f} s; "
        f"bar {PREFILL_BAR}: {verdict(holds['prefill'])})",
        flush=True,
    )
    return {
        "speed": speed,
        "speed_by_round": [[decode.kept for decode in decodes] for decodes in found],
        **ms,
        "longest_gap_by_round_ms": [max(max(d.gaps) for d in decodes) * 1e3 for decodes in found],
        "allowed_by_round_ms": [[decode.allowed_s * 1e3 for decode in decodes] for decodes in found],
        "gaps": len(gaps),
        "gaps_too_long": too_long,
        "worst_gap_over_allowed": worst,
        "prefill_alone_s": list(alone_s),
        "prefill_beside_s": list(beside_s),
        "prefill_ratio": ratio,
        "holds": holds,
    }


def predicted_layer_seconds(runtime: Runtime, length: int) -> float:
    """By the engine's own cost model: of the chunk in the middle of a prefill beside the decodes."""
    costs, half = runtime.engine.costs, length // 2
    running = [Candidate(n, 1, True, 64) for n in range(DECODES)]
    prefill = Candidate(DECODES, length - half, False, half)
    plan = Scheduler(runtime.config.max_step_tokens or STEP_TOKENS, costs).plan([*running, prefill])
    return costs.layer_us([prefill.rows(share.tokens) for share in plan.begin]) / 1e6


async def gaps_of(streams: Sequence[Stream], *, skip: int = 0, tokens: int = 56) -> list[list[float]]:
    """Seconds between the next so many tokens of each stream, after `skip` of them."""
    first = [len(s.at) + skip for s in streams]
    while any(len(s.at) < at + tokens for s, at in zip(streams, first, strict=True)):
        if any(s.task.done() for s in streams):
            raise SystemExit("a decode ended before it was measured")
        await asyncio.sleep(0.01)
    return [
        [b - a for a, b in pairwise(s.at[at : at + tokens])] for s, at in zip(streams, first, strict=True)
    ]


def own_cost(model: Path, vocab: int) -> dict[str, Any]:
    """Microseconds a step without a model, by batch: the engine alone, its sinks dropping what they get."""
    config = RuntimeConfig(model=model, max_running=32, idle_prefill=False)
    costs = {}
    with open_runtime(config, wrapped=lambda _: Silent(vocab, 64)) as runtime:
        for count in (1, 8, 16, 32):
            done = threading.Semaphore(0)

            def sink(event: EngineEvent, done: threading.Semaphore = done) -> None:
                if isinstance(event, DoneEvent):
                    done.release()

            began, steps = time.perf_counter(), runtime.engine.metrics.steps
            for prompt in prompts(count, 16, 1000, count):
                runtime.engine.submit(Job(prompt, GREEDY, 1000, StopTokens(()), sink))
            for _ in range(count):
                done.acquire()
            taken = time.perf_counter() - began
            costs[count] = taken / (runtime.engine.metrics.steps - steps) * 1e6
    further = (costs[32] - costs[8]) / 24
    holds = {"step": costs[8] <= STEP_BAR_US, "further": further <= FURTHER_BAR_US}
    print(
        f"all but the model, vocabulary of {vocab}: {costs[8]:.0f} µs a step at batch 8 "
        f"(bar {STEP_BAR_US:.0f}: {verdict(holds['step'])}), {further:.1f} µs for each further sequence "
        f"(bar {FURTHER_BAR_US:.0f}: {verdict(holds['further'])}); alone {costs[1]:.0f} µs",
        flush=True,
    )
    return {"us": costs, "further_us": further, "holds": holds}


def main() -> int:
    """Run the parts; exit status 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MINI_MODEL)
    parser.add_argument("--prefill", type=int, default=4096, help="tokens of the long prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None, help="write conditions and figures there")
    args = parser.parse_args()
    spec = read_spec(args.model)
    context = max(spec.max_positions, 2 * args.prefill)
    found = conditions(
        Machine(args.threads), model=args.model.resolve().name, prefill_tokens=args.prefill,
        rounds=args.rounds, decodes_beside=DECODES, decoded_tokens=DECODED, context_tokens=context,
    )  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in found.items()), flush=True)
    figures = {"own": own_cost(args.model, spec.vocab_size)}
    config = RuntimeConfig(model=args.model, threads=args.threads, context_tokens=context, idle_prefill=False)
    with open_runtime(config) as runtime:
        gc.freeze()  # as the server does
        figures["batching"] = asyncio.run(batching(runtime, args.rounds))
        figures["disturbed"] = asyncio.run(disturbed(runtime, args.prefill, args.rounds))
    found["load_average_after"] = float(Path("/proc/loadavg").read_text().split()[0])
    if args.json:
        args.json.write_text(json.dumps({"conditions": found, **figures}, indent=1) + "\n")
    held = [*figures["own"]["holds"].values(), figures["batching"]["holds"]]
    return 0 if all([*held, *figures["disturbed"]["holds"].values()]) else 1


if __name__ == "__main__":
    sys.exit(main())
