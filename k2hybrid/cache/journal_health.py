"""Whether the journal can be written: after a failure it pauses, and then tries again."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 300.0


class WriteHealth:
    """Failures and successes of writing. All methods may be called from any thread.

    Attributes:
        failed: why nothing is written at the moment; empty while all is well.
        last_error: the same of the last failure, also when it is over.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.failed = ""
        self.last_error = ""
        self._clock = clock
        self._guard = threading.Lock()
        self._pause_s = 0.0
        self._until = float("-inf")  # the end of the pause, or of the last one

    @property
    def ready(self) -> bool:
        """Whether a write may be tried now."""
        return not self.failed or self._clock() >= self._until

    def fail(self, error: OSError) -> None:
        """A write failed: none is tried for a while, each time for longer."""
        reason = error.strerror or str(error)
        with self._guard:
            now = self._clock()
            self.last_error = reason
            if self.failed and now < self._until:
                return  # it began before the pause did
            # Soon after a success as well: where the next page does not fit, an answer may.
            again = self.failed or now < self._until + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S) if again else FIRST_PAUSE_S
            self._until = now + self._pause_s
            told, self.failed = self.failed, reason
        if reason != told:
            log.warning(
                "journal: nothing is written for now: %s; requests go on without it, and it is tried again "
                "after %.0f s at first, then less often",
                reason,
                self._pause_s,
            )

    def worked(self) -> None:
        """Something was written."""
        if not self.failed:
            return
        with self._guard:
            over, self.failed = self.failed, ""
        if over:
            log.warning("journal: it is written again, after: %s", over)
