"""Which jobs may enter at all, and when a waiting one may run. Layer 4."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from k2hybrid.cache.page_keys import common_tokens
from k2hybrid.engine.memory import PageMemory
from k2hybrid.engine.sequence import Phase, Sequence
from k2hybrid.errors import CapacityError, ContextLengthError, RequestError
from k2hybrid.types import Job


def total_tokens(job: Job, *, vocab_size: int, context_tokens: int, pool_tokens: int) -> int:
    """Prompt and output tokens of a job that can be run, at most.

    Raises:
        RequestError: empty prompt, ids outside the vocabulary, no output asked for.
        ContextLengthError: more than the context.
        CapacityError: more than all latent pages hold.
    """
    prompt, total = len(job.ids), len(job.ids) + job.max_tokens
    if prompt == 0:
        raise RequestError("the prompt is empty", param="prompt", code="invalid_value")
    if job.max_tokens < (0 if job.background else 1):
        raise RequestError(
            f"max_tokens must be at least 1, not {job.max_tokens}", param="max_tokens", code="invalid_value"
        )
    ids = np.frombuffer(array("q", job.ids), np.int64)  # numpy takes twice as long to read a list
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise RequestError(
            f"prompt ids must lie between 0 and {vocab_size - 1}", param="prompt", code="invalid_value"
        )
    asked = f"{prompt} prompt tokens + {job.max_tokens} output tokens = {total} tokens"
    if total > context_tokens:
        raise ContextLengthError(f"{asked} > {context_tokens} maximum")
    if total > pool_tokens:
        raise CapacityError(
            f"{asked}, but the latent pages hold {pool_tokens}; ask for fewer or raise latent_bytes"
        )
    return total


class WaitingLine:
    """Sequences that wait, in order of arrival.

    Who waits for a prefix that another one computes is passed by those behind; who waits for pages is not, or
    smaller requests would keep it waiting for ever.

    Args:
        memory: where pages are promised.
        max_running: sequences that run together.
    """

    def __init__(self, memory: PageMemory, max_running: int) -> None:
        self._memory = memory
        self._max_running = max_running
        self._line: deque[Sequence] = deque()
        self._blocked = False  # nobody can enter until something changes

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._line)

    def join(self, sequences: Iterable[Sequence]) -> None:
        """Newcomers go to the end; whoever was let in before, and only paused, to the front."""
        for sequence in sequences:
            if sequence.goes_on:
                self.put_back(sequence)
            else:
                self._line.append(sequence)
                self._blocked = False

    def put_back(self, sequence: Sequence) -> None:
        """`sequence`, which was let in before, waits again, in front of all others."""
        self._line.appendleft(sequence)
        self._blocked = False

    def leave(self, sequence: Sequence) -> None:
        """`sequence` waits no longer."""
        self._line.remove(sequence)
        self._blocked = False

    def unblock(self) -> None:
        """Pages or a prefix became available: those who wait may try again."""
        self._blocked = False

    def admit(self, running: dict[int, Sequence]) -> list[Sequence]:
        """Move sequences from the line to `running` as far as rows and pages allow; those moved."""
        admitted: list[Sequence] = []
        passed: list[Sequence] = []
        try:
            while self._line and not self._blocked and len(running) < self._max_running:
                sequence = self._line[0]
                if self._prefix_is_coming(sequence, running):
                    passed.append(self._line.popleft())
                elif self._memory.admit(sequence):
                    self._line.popleft()
                    sequence.phase = Phase.RUNNING
                    running[sequence.number] = sequence
                    admitted.append(sequence)
                else:
                    self._blocked = True
        finally:
            self._blocked |= bool(passed) and not self._line
            self._line.extendleft(reversed(passed))
        return admitted

    def _prefix_is_coming(self, sequence: Sequence, running: Mapping[int, Sequence]) -> bool:
        """Whether a running prefill will publish more of this prompt than is cached: worth waiting for."""
        if sequence.awaits is not None:
            other, tokens = sequence.awaits
            if other.number in running and not other.decoding and other.computed < tokens:
                return True
            sequence.awaits = None
        size = self._memory.page_tokens
        limit = (len(sequence.ids) - 1) // size * size
        if limit == 0 or not sequence.job.reuse:
            return False
        scope = sequence.job.scope
        first = sequence.ids[:size]
        prefills = [
            s for s in running.values() if not s.decoding and s.job.scope == scope and s.ids[:size] == first
        ]
        if not prefills:
            return False
        wanted = self._memory.tree.match(sequence.ids[:limit], scope).tokens // size * size + size
        if wanted > limit:
            return False
        for other in prefills:
            known = other.ids[: min(other.prompt_tokens, limit)]
            if known[:wanted] == sequence.ids[:wanted]:
                # All they have in common is waited for at once: to look each time a page came would be dear.
                sequence.awaits = other, common_tokens(known, sequence.ids) // size * size
                return True
        return False
