"""Requests beside each other: what a batch gains, what a long prefill does to decodes, what the engine costs.

    python -m bench.serve                          the built-in model
    python -m bench.serve --model SLICE --prefill 32768 --json FILE

Bars: eight requests together decode ≥ 0.9 × the gain that the distinct bytes predict; during a long prefill
every decode keeps ≥ half of its speed, no gap exceeds max(2 decode steps, one layer of the chunk), and
the prefill takes ≤ 2.2 × as long as alone; all but the model costs ≤ 300 µs a step at batch 8 and ≤ 20 µs for
each further sequence.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.stub import Silent
from k2hybrid.checkpoint.spec import read_spec
from k2hybrid.config import MINI_MODEL, STEP_TOKENS, RuntimeConfig
from k2hybrid.engine.scheduler import Candidate, Scheduler
from k2hybrid.runtime.generate import StopTokens
from k2hybrid.runtime.loading import open_runtime
from k2hybrid.runtime.runtime import Runtime
from k2hybrid.types import DoneEvent, EngineEvent, Job, SamplingParams

GREEDY = SamplingParams(temperature=0.0)


class Stream(threading.Thread):
    """One request, consumed in a thread: when its tokens came."""

    def __init__(self, runtime: Runtime, prompt: list[int], tokens: int) -> None:
        super().__init__(daemon=True)
        self.at: list[float] = []
        self.began = time.perf_counter()
        self._run = runtime.generate(prompt, GREEDY, tokens, stop_ids=())
        self.start()

    def run(self) -> None:
        for _ in self._run:
            self.at.append(time.perf_counter())

    def cancel(self) -> None:
        self._run.cancel()

    @property
    def first_s(self) -> float:
        """Seconds to the first token."""
        return self.at[0] - self.began


def prompts(count: int, length: int, vocab: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(length)] for _ in range(count)]


def decode(runtime: Runtime, count: int, tokens: int, seed: int) -> tuple[float, float]:
    """Tokens/s of `count` requests together, and bytes read a step, while all of them decode."""
    streams = [Stream(runtime, p, tokens) for p in prompts(count, 16, runtime.spec.vocab_size - 300, seed)]
    for stream in streams:
        stream.join()
    records = [r for r in runtime.engine.metrics.recent if r.decode_tokens == count and not r.prefill_tokens]
    seconds = statistics.median(r.ms for r in records) / 1e3
    return count / seconds, statistics.median(r.bytes_read for r in records)


def batching(runtime: Runtime, rounds: int) -> dict[str, Any]:
    """Gain of eight requests over one, beside what the bytes predict; alternating."""
    gains, predicted, alone = [], [], []
    for n in range(rounds):
        runtime.engine.metrics.recent.clear()
        one, one_bytes = decode(runtime, 1, 64, n)
        runtime.engine.metrics.recent.clear()
        eight, eight_bytes = decode(runtime, 8, 64, 100 + n)
        gains.append(eight / one)
        predicted.append(8 * one_bytes / eight_bytes)
        alone.append(one)
    gain, bytes_gain = statistics.median(gains), statistics.median(predicted)
    print(
        f"batch of 8: {gain:.2f}× the tokens/s of one ({statistics.median(alone):.1f}); bytes predict "
        f"{bytes_gain:.2f}× → {gain / bytes_gain:.2f} (bar 0.9)"
    )
    return {"gain": gain, "predicted": bytes_gain, "share": gain / bytes_gain}


def disturbed(runtime: Runtime, length: int, rounds: int) -> dict[str, Any]:
    """Two decodes beside a long prefill, and both alone; alternating.

    The decodes' contexts grow meanwhile, so their speed alone is the mean of that before and that after.
    """
    vocab = runtime.spec.vocab_size - 300
    speeds, gaps, longest, allowed, ratios = [], [], [], [], []
    for n in range(rounds):
        (alone,) = (Stream(runtime, p, 1) for p in prompts(1, length, vocab, 1000 + n))
        alone.join()
        decodes = [Stream(runtime, p, 100_000) for p in prompts(2, 16, vocab, 2000 + n)]
        before = _gaps(decodes, skip=8)
        (long,) = (Stream(runtime, p, 1) for p in prompts(1, length, vocab, 3000 + n))
        long.join()
        end = long.at[0]
        after = _gaps(decodes)
        for s in decodes:
            s.cancel()
        beside = [
            b - a for s in decodes for a, b in zip(s.at, s.at[1:], strict=False) if long.began < b < end
        ]
        for s in decodes:
            s.join()
        step = statistics.fmean(map(statistics.median, (before, after)))
        calm = statistics.fmean(map(statistics.fmean, (before, after)))
        layer_s = layer_seconds(runtime, length, len(decodes))
        speeds.append(calm / statistics.fmean(beside))
        gaps.append(statistics.quantiles(beside, n=100)[98])
        longest.append(max(beside))
        allowed.append(max(2 * step, layer_s))
        ratios.append(long.first_s / alone.first_s)
    speed, gap = statistics.median(speeds), statistics.median(gaps)
    limit, ratio, most = statistics.median(allowed), statistics.median(ratios), statistics.median(longest)
    print(
        f"prefill of {length}: decodes keep {speed:.2f} of their speed (bar 0.5); gaps (99 %) "
        f"{gap * 1e3:.1f} ms, longest {most * 1e3:.1f}, allowed {limit * 1e3:.1f}; "
        f"the prefill takes {ratio:.2f}× as long as alone (bar 2.2)"
    )
    return {
        "speed": speed,
        "gap_ms": gap * 1e3,
        "longest_gap_ms": most * 1e3,
        "allowed_ms": limit * 1e3,
        "prefill_ratio": ratio,
    }


def layer_seconds(runtime: Runtime, length: int, decodes: int) -> float:
    """Of the chunk that is run in the middle of a prefill beside so many decodes."""
    costs, half = runtime.engine.costs, length // 2
    running = [Candidate(n, 1, True, 64) for n in range(decodes)]
    prefill = Candidate(decodes, length - half, False, half)
    plan = Scheduler(runtime.config.max_step_tokens or STEP_TOKENS, costs).plan([*running, prefill])
    return costs.layer_us([prefill.rows(share.tokens) for share in plan.begin]) / 1e6


def _gaps(streams: list[Stream], *, skip: int = 0, tokens: int = 56) -> list[float]:
    """Seconds between the next so many tokens of each stream, after `skip` of them."""
    first = [len(s.at) + skip for s in streams]
    while any(len(s.at) < at + tokens for s, at in zip(streams, first, strict=True)):
        if not all(s.is_alive() for s in streams):
            raise SystemExit("a decode ended before it was measured")
        time.sleep(0.01)
    return [b - a for s, at in zip(streams, first, strict=True) for a, b in pairwise(s.at[at : at + tokens])]


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
    print(
        f"all but the model, vocabulary of {vocab}: {costs[8]:.0f} µs a step at batch 8 (bar 300), "
        f"{further:.1f} µs for each further sequence (bar 20); alone {costs[1]:.0f} µs"
    )
    return {"us": costs, "further_us": further}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MINI_MODEL)
    parser.add_argument("--prefill", type=int, default=4096, help="tokens of the long prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None, help="write the figures there")
    args = parser.parse_args()
    vocab = read_spec(args.model).vocab_size
    figures: dict[str, Any] = {"model": args.model.name, "own": own_cost(args.model, vocab)}
    config = RuntimeConfig(model=args.model, threads=args.threads, idle_prefill=False)
    with open_runtime(config) as runtime:
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "batching": lambda: batching(runtime, args.rounds),
            "disturbed": lambda: disturbed(runtime, args.prefill, args.rounds),
        }
        for name, part in parts.items():
            figures[name] = part()
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
