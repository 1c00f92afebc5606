"""`python -m tests.clients.server`: the k2hybrid server around the played model, on a free port."""

from __future__ import annotations

import tempfile
from pathlib import Path

from k2hybrid.server.app import create_app
from k2hybrid.server.live import LiveRuns
from k2hybrid.server.process import bind, run
from tests.clients.player import playing


def main() -> None:
    live = LiveRuns()
    with (
        tempfile.TemporaryDirectory() as folder,
        playing(Path(folder)) as model,
        bind("127.0.0.1", 0) as listener,
    ):
        run(create_app(model, live=live), listener, live, drain_s=1, on_stopped=model.close)


if __name__ == "__main__":
    main()
