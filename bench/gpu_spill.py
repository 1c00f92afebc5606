"""Seconds until a session that was pushed out of the pool can go on, beside the rate of a pinned copy.

    python -m bench.gpu_spill [--tokens 65536] [--json FILE]

A session goes on after another one that does not fit beside it, through a real engine and a model that
computes nothing: first a new one, which has to leave at the same time, then the same again, whose copies lie
in RAM. Pages have the sizes of Kimi-K2's, of bf16 and of FP8 rows. Bar: 1.3 times bytes / rate, of the
median round. Without a card pages lie in memory of the CPU, few and small, the rate is that of a copy in
memory, the first two rounds are slower, as memory is touched for the first time, and there is no bar.
"""

from __future__ import annotations

import random
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from bench.device_rates import command, report
from bench.gpu_doorbell import conditions
from bench.stub import Scripted
from k2hybrid.cache.pages import LatentPages
from k2hybrid.cache.rows import Bf16Rows
from k2hybrid.config import RuntimeConfig
from k2hybrid.engine.cost import DenseWeights, NetworkSizes
from k2hybrid.engine.engine import Engine
from k2hybrid.model.batch import Batch
from k2hybrid.runtime.archive import make_archive
from k2hybrid.runtime.generate import StopTokens
from k2hybrid.types import DoneEvent, EngineEvent, Job, SamplingParams

VOCAB = 1000
ROWS = {"bf16": 1152, "fp8": 656}  # bytes of a row
BAR = 1.3
SIZES = NetworkSizes(layers=1, attention=DenseWeights(1, 1), latent_bytes=1)


class Watched(Scripted):
    """Notes when a pass begins."""

    begun_s = 0.0

    def begin(self, batch: Batch) -> Any:
        self.begun_s = time.perf_counter()
        return super().begin(batch)


def copy_rate(pages: LatentPages, room: torch.Tensor) -> float:
    """Bytes a second that come in, in one piece after the other; the median of several."""
    rates = []
    there = torch.zeros(room.shape, dtype=torch.uint8, device=pages.device)
    for _ in range(5):
        began = time.perf_counter()
        for page, to in zip(room, there, strict=True):
            if pages.device.type == "cuda":
                to.copy_(page, non_blocking=True)
            else:
                np.copyto(to.numpy(), page.numpy())
        if pages.device.type == "cuda":
            torch.cuda.synchronize()
        rates.append(room.numel() / (time.perf_counter() - began))
    return statistics.median(rates)


def resumes(rows: str, tokens: int, layers: int, device: str, rounds: int = 4) -> list[dict[str, Any]]:
    """Two rows for each round."""
    count = -(-tokens // LatentPages.PAGE_TOKENS)
    pages = LatentPages(layers, count + count // 7 + 8, Bf16Rows(ROWS[rows] // 2), device)
    pages.page(0).zero_()
    config = RuntimeConfig(
        cache_ram=(2 * count + 64) * pages.page_bytes, max_step_tokens=max(512, tokens // 8)
    )
    archive = make_archive(config, pages, None, None)
    assert archive is not None
    room = archive.mover.room(min(count, 64))
    room.fill_(1)
    rate = copy_rate(pages, room)
    model = Watched(VOCAB)
    engine = Engine(
        model, pages, sizes=SIZES, vocab_size=VOCAB, context_tokens=2 * tokens, config=config, archive=archive
    )
    engine.start()
    rng = random.Random(1)

    def ask(ids: list[int]) -> tuple[float, int]:
        """Seconds until its last piece is begun, and tokens that were found."""
        done = threading.Event()
        found = 0

        def sink(event: EngineEvent) -> None:
            nonlocal found
            if isinstance(event, DoneEvent):
                found = event.usage.cached_tokens
                done.set()

        began = time.perf_counter()
        engine.submit(Job(ids, SamplingParams(temperature=0.0), 1, StopTokens(()), sink))
        done.wait()
        return model.begun_s - began, found

    figures = []
    try:
        session = [rng.randrange(VOCAB) for _ in range(tokens)]
        ask(session)
        other: list[int] = []
        for n in range(2 * rounds):
            new = n % 2 == 0
            if new:
                other = [rng.randrange(VOCAB) for _ in range(tokens)]
            ask(other)
            session.append(rng.randrange(VOCAB))
            seconds, found = ask(session)
            if found < tokens:
                raise SystemExit(f"only {found} of {tokens} tokens came back")
            limit = count * pages.page_bytes / rate
            figures.append(
                {
                    "case": "resume of a spilled session",
                    "device": device,
                    "rows": rows,
                    "tokens": tokens,
                    "layers": layers,
                    "round": n // 2,
                    "other": "leaves meanwhile" if new else "in RAM already",
                    "mb": round(count * pages.page_bytes / 1e6, 1),
                    "copy_gb_s": round(rate / 1e9, 2),
                    "seconds": round(seconds, 4),
                    "limit_s": round(limit, 4),
                    "times_limit": seconds / limit,
                }
            )
    finally:
        engine.stop()
        archive.mover.close()
    return figures


def judged(rounds: list[dict[str, Any]], *, bar: bool) -> Iterator[dict[str, Any]]:
    """The rows of one format's rounds, and behind them one each for both ways to resume: their medians."""
    yield from (row | {"times_limit": round(row["times_limit"], 3)} for row in rounds)
    for other in dict.fromkeys(row["other"] for row in rounds):
        alike = [row for row in rounds if row["other"] == other]
        times = statistics.median(row["times_limit"] for row in alike)
        shared = {name: alike[0][name] for name in ("device", "rows", "tokens", "layers", "mb", "copy_gb_s")}
        row = {"case": "resume of a spilled session, median", **shared, "other": other}
        row |= {"rounds": len(alike), "times_limit": round(times, 3)}
        yield row | ({"bar": BAR, "holds": times <= BAR} if bar else {})


def rows(tokens: int, card: bool) -> Iterator[dict[str, Any]]:
    """Of both row formats."""
    for name in ROWS:
        figures = resumes(name, tokens, 61 if card else 12, "cuda" if card else "cpu")
        yield from judged(figures, bar=card)


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--tokens", type=int, default=None, help="of a session")
    options = parser.parse_args()
    card = torch.cuda.is_available()
    tokens = options.tokens or (65_536 if card else 4096)
    where = conditions() if card else {"torch": torch.__version__}
    return report(rows(tokens, card), options.json, where)


if __name__ == "__main__":
    sys.exit(main())
