"""Sequence: one job on its way through the engine. Layer 4; knows no tensor."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from k2hybrid.cache.page_keys import PageKey
from k2hybrid.types import DoneEvent, Job, PromptProgress, ReasonCode, TokenEvent, Usage

if TYPE_CHECKING:
    from k2hybrid.model.sampler import Sampler


class Phase(enum.Enum):
    """Where a sequence stands."""

    WAITING = "waiting"  # accepted, holds no pages
    RUNNING = "running"  # holds pages; prefilling or decoding
    DONE = "done"  # its last event was delivered


@dataclass(eq=False, slots=True)
class Sequence:
    """A job and its progress. `ids[:computed]` have their latents in `pages`; the rest is still to be run.

    Owned by the engine's thread, except `cancelled`, which any thread may set. Once DONE it is left alone.
    """

    number: int  # order of arrival
    job: Job
    sampler: Sampler
    ids: list[int]
    prompt_tokens: int
    most_pages: int  # for prompt and max_tokens
    reserved_pages: int = 0  # what it was promised, held or not
    phase: Phase = Phase.WAITING
    computed: int = 0
    cached_tokens: int = 0
    pages: list[int] = field(default_factory=list)
    pages_version: int = 0  # changes with `pages`, so that a tensor of them can be kept
    page_keys: list[PageKey] = field(default_factory=list)  # of its full pages, as far as they were needed
    journaled: int = 0  # full pages that were offered to the journal
    fetching: bool = False  # its pages come back from RAM or disk; it does not run meanwhile
    awaits: tuple[Sequence, int] | None = None  # while it waits: who computes its prefix, and so many tokens
    cancelled: bool = False
    ending: tuple[ReasonCode, Exception | None] | None = None  # how it ends once it can, if not as cancelled
    kept: list[TokenEvent] = field(default_factory=list)  # of a resumable job: all that was delivered
    done: DoneEvent | None = None
    resumes: Sequence | None = None  # whose progress it takes over before it waits
    goes_on: bool = False  # what an ended one generated is its beginning
    cached_before: int | None = None  # of the prompt, as that one began
    submitted_s: float = field(default_factory=time.perf_counter)
    started_s: float = 0.0  # first prefill step
    first_token_s: float = 0.0
    last_token_s: float = 0.0

    @property
    def pending(self) -> int:
        """Tokens still to be run: more than one while prefilling, one while decoding."""
        return len(self.ids) - self.computed

    @property
    def generated(self) -> int:
        return len(self.ids) - self.prompt_tokens

    @property
    def decoding(self) -> bool:
        """Whether the next step gives the next token from one row; not while a resumed one is prefilled."""
        count = len(self.ids)
        return count > self.prompt_tokens and count - self.computed == 1

    @property
    def cached_of_prompt(self) -> int:
        """Tokens of the prompt that were not prefilled for this request."""
        cached = self.cached_tokens if self.cached_before is None else self.cached_before
        return min(cached, self.prompt_tokens)

    def progress(self) -> PromptProgress:
        """How far the prompt is."""
        ms = (time.perf_counter() - self.started_s) * 1e3 if self.started_s else 0.0
        cached = self.cached_of_prompt
        return PromptProgress(self.prompt_tokens, cached, min(self.computed, self.prompt_tokens), ms)

    def usage(self) -> Usage:
        """Counts and times so far. Time in the queue belongs to neither prefill nor decode."""
        prefill_s = self.first_token_s - self.started_s if self.first_token_s else 0.0
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.generated,
            cached_tokens=self.cached_of_prompt,
            prefill_ms=prefill_s * 1e3,
            decode_ms=(self.last_token_s - self.first_token_s) * 1e3,
        )
