"""Server processes for tests."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


def command(*argv: object) -> list[str]:
    return [sys.executable, "-m", "k2hybrid.server", "--latent-gb", "0.1", "--threads", "1", *map(str, argv)]


@contextmanager
def started(*argv: object) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """A server process that has said where it listens: (process, url, lines printed until then)."""
    process = subprocess.Popen(
        command("--port", 0, *argv),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        lines = []
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if match := re.fullmatch(r"Listening on (http://127\.0\.0\.1:\d+)", lines[-1]):
                yield process, match[1], lines
                return
        assert process.stderr is not None
        pytest.fail(f"it ended with {process.wait()}: {process.stderr.read()}")
    finally:
        process.kill()
        process.communicate()
