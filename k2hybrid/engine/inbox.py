"""What other threads have for the engine's thread: sequences, calls, a nudge, the word to stop. Layer 4."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from k2hybrid.engine.memory import PageMemory
from k2hybrid.engine.sequence import Sequence
from k2hybrid.errors import CapacityError, EngineError

Call = Callable[[PageMemory], None]


class Arrivals(NamedTuple):
    """All that came since the last time, in order."""

    sequences: list[Sequence]
    calls: list[Call]


class Inbox:
    """Filled from any thread, emptied by one, which may sleep until something comes."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._sequences: deque[Sequence] = deque()
        self._calls: deque[Call] = deque()
        self._woken = False
        self._stopping = False

    def __len__(self) -> int:
        """Sequences that lie here."""
        return len(self._sequences)

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called: no sequence comes any more."""
        return self._stopping

    def put(
        self, sequence: Sequence, *, limit: int | None = None, waiting: Callable[[], int] = lambda: 0
    ) -> None:
        """Leave a sequence.

        Args:
            limit: how many may wait, here and elsewhere; None: any number.
            waiting: how many wait elsewhere.

        Raises:
            CapacityError: so many wait already.
            EngineError: the engine is stopped.
        """
        with self._condition:
            if self._stopping:
                raise EngineError("the engine is stopped")
            if limit is not None and len(self._sequences) + waiting() >= limit:
                raise CapacityError(f"{limit} requests are waiting already (max_queue); try again later")
            self._sequences.append(sequence)
            self._wake()

    def call(self, function: Call) -> None:
        """Leave a call."""
        with self._condition:
            self._calls.append(function)
            self._wake()

    def wake(self) -> None:
        """End a sleep."""
        with self._condition:
            self._wake()

    def stop(self) -> None:
        """Take no sequence any more, and end a sleep."""
        with self._condition:
            self._stopping = True
            self._wake()

    def sleep(self, seconds: float | None) -> None:
        """Until something comes, or so many seconds; not at all if something came since the last `take`."""
        with self._condition:
            self._condition.wait_for(lambda: self._woken or self._stopping, seconds)

    def take(self) -> Arrivals:
        """Empty it."""
        with self._condition:
            self._woken = False
            arrivals = Arrivals(list(self._sequences), list(self._calls))
            self._sequences.clear()
            self._calls.clear()
            return arrivals

    def _wake(self) -> None:
        self._woken = True
        self._condition.notify()
