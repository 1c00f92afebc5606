"""`python -m tests.clients [NAME …]`: each client runs one task with a tool call against a real server.

The task is to run a command in the shell and to say what it printed; the answer holds what only a shell can
have made of it. One line a client: passed, skipped (what is missing), or failed (why, and where its log is).
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.clients.agents import AGENTS, environment
from tests.clients.packages import UnavailableError
from tests.clients.reader import FINAL
from tests.clients.sdks import SDKS

ROOT = Path(__file__).resolve().parents[2]
TASK_S = 180


class FailedError(Exception):
    """A client did not do its task."""


def main() -> int:
    """Run those named, or all; 1 if one failed."""
    clients = {**{name: _sdk(name) for name in SDKS}, **{name: _agent(name) for name in AGENTS}}
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(clients)}")
    parser.add_argument("--logs", type=Path, help="folder for the logs (default: a new one)")
    parser.add_argument("--url", help="of a server that runs already, and can do the task")
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in clients]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(clients)}")
    logs = given.logs or Path(tempfile.mkdtemp(prefix="k2hybrid-clients-"))
    logs.mkdir(parents=True, exist_ok=True)
    failed = False
    with _server(given.url, logs / "server.log") as url:
        for name in given.names or clients:
            word, reason = _outcome(clients[name], url, logs / f"{name}.log")
            failed |= word == "failed"
            print(f"{name:<20}{word}{reason and f': {reason}'}", flush=True)
    print(f"logs: {logs}")
    return 1 if failed else 0


Client = Callable[[str, Path], None]


def _outcome(client: Client, url: str, log: Path) -> tuple[str, str]:
    try:
        client(url, log)
    except UnavailableError as error:
        return "skipped", str(error)
    except FailedError as error:
        return "failed", f"{error} ({log})"
    except Exception as error:
        log.write_text(traceback.format_exc())
        return "failed", f"{type(error).__name__} ({log})"
    return "passed", ""


def _sdk(name: str) -> Client:
    def client(url: str, log: Path) -> None:
        for stream in (False, True):
            said = SDKS[name](url, stream)
            log.write_text(said)
            if FINAL not in said:
                raise FailedError(f"its last words were others, {'streamed' if stream else 'whole'}")

    return client


def _agent(name: str) -> Client:
    def client(url: str, log: Path) -> None:
        with tempfile.TemporaryDirectory() as folder, log.open("w") as output:
            home = Path(folder)
            task = AGENTS[name](url, home)
            env = environment(home, task.env)
            code = _run(task.argv, home, env, output.fileno())
        if code is None:
            raise FailedError(f"not done within {TASK_S} s")
        if FINAL not in log.read_text("utf-8", "replace"):
            raise FailedError(f"exit code {code}, and its last words were others")
        if code != 0:
            raise FailedError(f"exit code {code}")

    return client


def _run(argv: list[str], folder: Path, env: dict[str, str], output: int) -> int | None:
    """The exit code; None if it took too long. It and what it started are gone afterwards."""
    process = subprocess.Popen(
        argv, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        start_new_session=True,
    )  # fmt: skip
    try:
        return process.wait(TASK_S)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def _server(url: str | None, log: Path) -> Iterator[str]:
    """The URL of a server: the given one, or one that plays the model for as long as the block runs."""
    if url:
        yield url.rstrip("/")
        return
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.clients.server"],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if match := re.fullmatch(r"Listening on (http://127\.0\.0\.1:\d+)\n", line):
                    yield match[1]
                    return
            raise SystemExit(f"the server ended with {process.wait()}; see {log}")
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
