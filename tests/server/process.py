"""Server processes for tests."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import pytest

Listening = tuple[subprocess.Popen[str], str, list[str]]


def command(*argv: object) -> list[str]:
    return [
        sys.executable,
        "-m",
        "k2hybrid.server",
        "--latent-gb",
        "0.1",
        "--threads",
        "1",
        "--no-journal",
        *map(str, argv),
    ]


def scripted(*argv: object) -> list[str]:
    """The command of a server with a scripted model."""
    return [sys.executable, "-m", "tests.server.scripted_server", "--port", "0", *map(str, argv)]


def started(*argv: object) -> AbstractContextManager[Listening]:
    """A server of a real model on a free port."""
    return listening(command("--port", 0, *argv))


@contextmanager
def listening(argv: Sequence[str]) -> Iterator[Listening]:
    """A server process that has said where it listens: (process, url, lines printed until then)."""
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        assert process.stdout is not None
        while line := process.stdout.readline():
            lines.append(line.rstrip())
            if match := re.fullmatch(r"Listening on (http://127\.0\.0\.1:\d+)", lines[-1]):
                yield process, match[1], lines
                return
        assert process.stderr is not None
        pytest.fail(f"it ended with {process.wait()}: {process.stderr.read()}")
    finally:
        process.kill()
        process.communicate()
