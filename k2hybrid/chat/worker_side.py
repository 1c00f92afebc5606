"""What runs in a worker process: reads requests from stdin and writes answers to stdout, each a JSON object
after its length in bytes (8, little-endian). Standard library only; `worker.py` is the parent's side.

The process may use bounded memory, bounded CPU time for each request, and write no file.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

Answer = Callable[[dict[str, Any]], dict[str, Any]]
Failure = Callable[[Exception], dict[str, Any] | None]


def serve(start: Callable[[dict[str, Any]], Answer], failure: Failure = lambda error: None) -> None:
    """Answer requests until stdin closes.

    `start` is given the first request, which bounds the memory (`memory_bytes`), and returns what answers
    all others. Each request has its CPU time (`cpu_s`). An exception is answered by what `failure` makes of
    it, or else by an "error" with its message.
    """
    receiving, sending = sys.stdin.buffer, sys.stdout.buffer
    answer: Answer | None = None
    while (request := _receive(receiving)) is not None:
        _allow_cpu(int(request["cpu_s"]))

        def work(request: dict[str, Any] = request) -> dict[str, Any]:
            nonlocal answer
            if answer is not None:
                return answer(request)
            _limit(int(request["memory_bytes"]))
            answer = start(request)
            return {"ready": True}

        _send(sending, _answered(work, failure))


def _answered(work: Callable[[], dict[str, Any]], failure: Failure) -> dict[str, Any]:
    """The result of `work`, or what went wrong: whatever the input does, its process answers."""
    try:
        return work()
    except MemoryError as error:
        return {"error": f"too much memory: {error}"[:1000]}
    except RecursionError:
        return {"error": "recursion too deep"}
    except Exception as error:  # failures that hostile input brings about have no common class
        return failure(error) or {"error": f"{type(error).__name__}: {error}"[:1000]}


def _limit(memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _allow_cpu(seconds: int) -> None:
    """Let this process use `seconds` of CPU time from now on; then the kernel ends it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _receive(stream: BinaryIO) -> dict[str, Any] | None:
    head = stream.read(8)
    if len(head) < 8:
        return None
    request: dict[str, Any] = json.loads(stream.read(int.from_bytes(head, "little")))
    return request


def _send(stream: BinaryIO, answer: dict[str, Any]) -> None:
    data = json.dumps(answer).encode()
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()
