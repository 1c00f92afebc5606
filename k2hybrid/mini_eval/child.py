"""A server of our own for the length of a run."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

from k2hybrid.errors import EvaluationError

_END_S = 30


@contextmanager
def served(model: Path, threads: int | None = None) -> Iterator[str]:
    """The URL of a server of `model` on a free port; it ends with the block.

    EvaluationError, with what the server said last, if it does not come up.
    """
    command = [sys.executable, "-m", "k2hybrid.server", "--port", "0", "--model", str(model)]
    command += ["--no-journal", "--no-idle-prefill", "--drain", "0"]
    if threads is not None:
        command += ["--threads", str(threads)]
    with _ended_in_order(), tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True)
        assert process.stdout is not None
        try:
            url = _listening(process.stdout)
            if url is None:
                code = process.wait()
                complaints.seek(0)
                said = complaints.read().strip().splitlines()[-1:]
                raise EvaluationError(
                    f"the server ended with exit code {code}: {' '.join(said) or 'no word'}"
                )
            # What else it prints must not fill the pipe.
            threading.Thread(target=process.stdout.read, daemon=True).start()
            yield url
        finally:
            process.terminate()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM leaves the block as Ctrl-C does: the server must not outlive us."""

    def leave(_number: int, _frame: FrameType | None) -> NoReturn:
        sys.exit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _listening(lines: IO[str]) -> str | None:
    for line in lines:
        if match := re.match(r"Listening on (http://\S+)", line):
            return match[1]
    return None
