"""LiveRuns: the answers being generated now, so that a server that ends can end them too."""

from __future__ import annotations

from collections.abc import Iterable

from k2hybrid.server.served import ChatRun


class LiveRuns:
    """Used from the event loop alone."""

    def __init__(self) -> None:
        self._runs: dict[int, ChatRun] = {}

    def add(self, runs: Iterable[ChatRun]) -> None:
        """These began."""
        self._runs.update((id(run), run) for run in runs)

    def end(self, runs: Iterable[ChatRun]) -> None:
        """These are over, or nobody wants them any more: cancel and forget them."""
        for run in runs:
            run.cancel()
            self._runs.pop(id(run), None)

    def end_all(self) -> None:
        """Cancel whatever runs; its client is told so."""
        self.end(list(self._runs.values()))

    def __len__(self) -> int:
        return len(self._runs)
