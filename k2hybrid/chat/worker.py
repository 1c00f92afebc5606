"""A child process for work on hostile input, bounded in time, memory and output. This is the parent's side.

Requests and answers are JSON objects over the child's stdin and stdout; `worker_side.py` is the other side. A
child that exceeds its bounds, or dies, is replaced at the next request.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]  # where the package lies
_START_TIMEOUT_S = (
    60.0  # interpreter and imports take 0.2 s; a machine that loads weights may take far longer
)
_MAX_START_ANSWER = 1 << 20
_CHUNK_BYTES = 1 << 20
# What an interpreter needs to start and find its packages; keys and tokens of the parent stay with the
# parent.
_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "TZ", "LANG", "LC_ALL")


class WorkerError(Exception):
    """There was no answer. The message follows the name of what was to be done: "took more than 1 s"."""


class Worker:
    """One lazily started process. Thread-safe: requests take turns, and each has a time limit of its own.

    Args:
        module: the module to run, which calls `worker_side.serve`.
        start: the first request to each process. If it fails, `exchange` returns its answer.
    """

    def __init__(self, module: str, start: dict[str, Any]) -> None:
        self._module = module
        self._start = json.dumps(start).encode()
        self._lock = threading.Lock()
        self._process: _Process | None = None

    @property
    def pid(self) -> int | None:
        """Of the running process, if one runs."""
        process = self._process
        return None if process is None else process.pid

    def exchange(self, request: bytes, timeout_s: float, max_answer_bytes: int) -> dict[str, Any]:
        """Send a request, receive its answer; WorkerError if that takes too long or the process dies."""
        with self._lock:
            if self._process is not None and not self._process.alive():
                self._end()  # it died between two requests
            try:
                if self._process is None:
                    self._process = _Process(self._module)
                    started = self._process.exchange(self._start, _START_TIMEOUT_S, _MAX_START_ANSWER)
                    if "error" in started:
                        self._end()
                        return started
                return self._process.exchange(request, timeout_s, max_answer_bytes)
            except WorkerError:
                self._end()
                raise

    def close(self) -> None:
        """End the process, if one runs. The next request starts another."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.end()


class _Process:
    """The running process and its two pipes."""

    def __init__(self, module: str) -> None:
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        # The package is the parent's own, wherever that found it.
        paths = [str(_ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        # -P: the current folder is not searched for modules.
        command = [sys.executable, "-P", "-B", "-m", module]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env=environment,
                start_new_session=True,  # a Ctrl-C meant for the server must not reach it in mid-answer
            )
        except OSError as error:
            raise WorkerError(f"cannot start its process {command}: {error}") from error
        if self._process.stdin is None or self._process.stdout is None:
            raise WorkerError("has no pipes to its process")
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        for pipe in (self._stdin.fileno(), self._stdout.fileno()):
            os.set_blocking(pipe, False)
            with contextlib.suppress(OSError):  # all pipes of a user together have a limit
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _CHUNK_BYTES)
        self._finalizer = weakref.finalize(self, _kill, self._process)

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        """Kill and reap."""
        self._finalizer()

    def exchange(self, request: bytes, timeout_s: float, max_answer_bytes: int) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        outgoing = memoryview(len(request).to_bytes(8, "little") + request)
        incoming = bytearray()
        expected = 8
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdout, selectors.EVENT_READ)
            selector.register(self._stdin, selectors.EVENT_WRITE)
            while len(incoming) < expected:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise WorkerError(f"took more than {timeout_s:g} s")
                for ready, _ in selector.select(left_s):
                    if ready.fileobj is self._stdin:
                        outgoing = outgoing[self._write(outgoing) :]
                        if not outgoing:
                            selector.unregister(self._stdin)
                    else:
                        incoming += self._read()
                        if expected == 8 and len(incoming) >= 8:
                            expected = 8 + int.from_bytes(incoming[:8], "little")
                            if expected > max_answer_bytes:
                                raise WorkerError("wrote too much")
        answer: dict[str, Any] = json.loads(incoming[8:expected])
        return answer

    def _write(self, data: memoryview) -> int:
        try:
            return os.write(self._stdin.fileno(), data[:_CHUNK_BYTES])
        except BlockingIOError:
            return 0
        except BrokenPipeError as error:
            raise WorkerError("died") from error

    def _read(self) -> bytes:
        try:
            data = os.read(self._stdout.fileno(), _CHUNK_BYTES)
        except BlockingIOError:
            return b""
        if not data:
            raise WorkerError("died: out of its memory or CPU time")
        return data


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
