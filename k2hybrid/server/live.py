"""LiveRuns: the requests inside and the answers being generated, so that a server can end in order."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager

from k2hybrid.server.served import Run


class LiveRuns:
    """Used from the event loop alone, but for `drain`."""

    def __init__(self) -> None:
        self.draining = False  # nobody new is let in
        self.requests = 0  # inside now
        self._runs: dict[int, Run] = {}
        self._ended = False

    def drain(self) -> None:
        """Let in nobody new. May be called from a signal handler."""
        self.draining = True

    @contextmanager
    def request(self) -> Generator[None, None, None]:
        """A request is inside for as long as the block runs."""
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    def add(self, runs: Iterable[Run]) -> None:
        """These began; after `end_all` they end at once."""
        self._runs.update((id(run), run) for run in runs)
        if self._ended:
            self.end_all()

    def end(self, runs: Iterable[Run], *, park: bool = False) -> None:
        """These are over, or nobody waits for them any more: cancel or `park` them, and forget them.

        A server that drains takes no retries, so it parks nothing.
        """
        for run in runs:
            if park and not self.draining:
                run.park()
            else:
                run.cancel()
            self._runs.pop(id(run), None)

    def end_all(self) -> None:
        """Cancel whatever runs, or will yet begin; its client is told so."""
        self._ended = True
        self.end(list(self._runs.values()))

    def __len__(self) -> int:
        return len(self._runs)
