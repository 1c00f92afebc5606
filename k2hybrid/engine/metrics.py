"""What the engine did: counters since the start and a record of each recent step. Layer 4; pure."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from k2hybrid.types import ReasonCode, Usage

RECENT_STEPS = 1024
RATE_SECONDS = 5.0  # that rates of this moment look back


@dataclass(slots=True)
class ByteMeter:
    """Bytes that the model reads. Filled by whoever builds the model."""

    step_bytes: int = 0  # dense weights and head: read once by every step
    expert_bytes: int = 0  # routed experts, counted up as they are read


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step, or as much of a large pass as was run at once: of its prefill, that share of the tokens."""

    decode_tokens: int
    prefill_tokens: int
    ms: float  # model and sampling
    bytes_read: int  # dense and experts
    expert_bytes: int
    ended_s: float  # by time.perf_counter


@dataclass(slots=True)
class PageTraffic:
    """Latent pages between the pool, RAM and the journal."""

    pages_out: int = 0  # from the pool to RAM
    bytes_out: int = 0
    pages_in: int = 0  # back
    bytes_in: int = 0
    copy_errors: int = 0
    ram_tokens: int = 0  # of prompts, found in RAM
    journal_tokens: int = 0  # of prompts, found on disk
    ram_pages: int = 0  # in RAM now

    def snapshot(self) -> dict[str, int]:
        """All counts under stable names."""
        return {
            "pages_to_ram": self.pages_out,
            "bytes_to_ram": self.bytes_out,
            "pages_from_ram": self.pages_in,
            "bytes_from_ram": self.bytes_in,
            "page_copy_errors": self.copy_errors,
            "cached_ram_tokens": self.ram_tokens,
            "cached_journal_tokens": self.journal_tokens,
            "ram_pages": self.ram_pages,
        }


@dataclass(slots=True)
class EngineMetrics:
    """Written by the engine's thread; single counters may be read from any thread."""

    steps: int = 0
    failed_steps: int = 0
    integrity_errors: int = 0
    put_back: int = 0  # requests that gave their pages to older ones, to come back
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    running: int = 0
    waiting: int = 0
    traffic: PageTraffic = field(default_factory=PageTraffic)
    finished: Counter[str] = field(default_factory=Counter)  # reason → requests
    recent: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    now: Callable[[], float] = time.perf_counter

    def step(self, record: StepRecord) -> None:
        """A step went well."""
        self.steps += 1
        self.recent.append(record)

    def request(self, reason: ReasonCode, usage: Usage, times: int = 1) -> None:
        """A request ended; with −1 times, one that was counted goes on after all."""
        self.finished[reason] += times
        self.prompt_tokens += times * usage.prompt_tokens
        self.cached_tokens += times * usage.cached_tokens
        self.completion_tokens += times * usage.completion_tokens

    def snapshot(self) -> dict[str, Any]:
        """Counters, and rates over the recent steps and the last `RATE_SECONDS`, under stable names."""
        recent = list(self.recent)
        seconds = sum(record.ms for record in recent) / 1e3
        tokens = sum(record.decode_tokens + record.prefill_tokens for record in recent)
        read = sum(record.bytes_read for record in recent)
        return {
            "steps": self.steps,
            "failed_steps": self.failed_steps,
            "put_back": self.put_back,
            "integrity_errors": self.integrity_errors,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            **self.traffic.snapshot(),
            "running": self.running,
            "waiting": self.waiting,
            "finished": dict(self.finished),
            "recent_steps": len(recent),
            "recent_tokens_per_s": tokens / seconds if seconds else 0.0,
            "recent_gb_s": read / seconds / 1e9 if seconds else 0.0,
            **_rates(recent, self.now()),
        }


def _rates(recent: Sequence[StepRecord], now: float) -> dict[str, float | None]:
    """Tokens by the clock, the share of it that passes took, and GB/s of these (None: there were none)."""
    last = [record for record in recent if now - record.ended_s < RATE_SECONDS]
    span = RATE_SECONDS
    if last:
        reach = now - last[0].ended_s + last[0].ms / 1e3
        # Older records are gone, or one began before the time looked at.
        span = reach if len(last) == RECENT_STEPS else max(span, reach)
    seconds = sum(record.ms for record in last) / 1e3
    read = sum(record.bytes_read for record in last)
    return {
        "decode_tokens_per_s": sum(record.decode_tokens for record in last) / span,
        "prefill_tokens_per_s": sum(record.prefill_tokens for record in last) / span,
        "busy": min(1.0, seconds / span),
        "read_gb_s": read / seconds / 1e9 if seconds else None,
    }
