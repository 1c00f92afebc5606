"""Runs a checkpoint's chat template in a process of its own, bounded in time, memory and output.

This side never imports jinja2 and never evaluates anything of the template; `render_worker.py` is the other
side.
"""

from __future__ import annotations

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

from k2hybrid.chat.conversation import Conversation
from k2hybrid.chat.prompt import Piece
from k2hybrid.chat.tokenizer import Tokenizer
from k2hybrid.errors import RequestError, TemplateError

_WORKER = Path(__file__).with_name("render_worker.py")
_START_TIMEOUT_S = (
    60.0  # interpreter and imports take 0.2 s; a machine that loads weights may take far longer
)
_MEMORY_BYTES = 2 << 30
# An honest template writes each text once or twice; this lets it also add some to every message.
_OUTPUT_FACTOR = 8
_OUTPUT_EXTRA_CHARS = 1 << 20
_CHUNK_BYTES = 1 << 20
# What an interpreter needs to start and find its packages; keys and tokens of the parent stay with the
# parent.
_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "TZ", "LANG", "LC_ALL")


class JinjaRenderer:
    """One template in one lazily started process, killed when it exceeds its bounds and started anew after
    that.

    Thread-safe: renderings take turns, and each has `timeout_s` of its own.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, *, timeout_s: float = 10.0) -> None:
        self._source = source
        self._timeout_s = timeout_s
        self._specials = list(tokenizer.specials)
        self._special_ids = [tokenizer.specials[name] for name in self._specials]
        named = {key: tokenizer.named(key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        self._variables = {key: value for key, value in named.items() if value is not None}
        self._lock = threading.Lock()
        self._process: _Worker | None = None

    def render(self, conversation: Conversation, add_generation_prompt: bool) -> list[Piece]:
        """The template's output as pieces.

        Raises RequestError where the template refuses the messages (`raise_exception`), TemplateError where
        it fails, reaches for something forbidden, or exceeds its bounds.
        """
        context = {
            "messages": conversation.messages,
            "tools": conversation.tools or None,
            "add_generation_prompt": add_generation_prompt,
        }
        data = json.dumps(context)
        max_chars = _OUTPUT_FACTOR * len(data) + _OUTPUT_EXTRA_CHARS
        request = f'{{"cpu_s":{self._cpu_s},"max_chars":{max_chars},"context":{data}}}'.encode()
        with self._lock:
            answer = self._exchange(request, max_answer_bytes=16 * max_chars)
        return [
            piece if isinstance(piece, str) else self._special_ids[piece]
            for piece in _checked(answer)["pieces"]
        ]

    def close(self) -> None:
        """End the process, if one runs."""
        with self._lock:
            self._end()

    @property
    def _cpu_s(self) -> int:
        return int(self._timeout_s) + 1

    def _exchange(self, request: bytes, max_answer_bytes: int) -> dict[str, Any]:
        if self._process is not None and not self._process.alive():
            self._end()  # it died between two requests
        try:
            if self._process is None:
                self._process = _Worker()
                start = {
                    "source": self._source,
                    "specials": self._specials,
                    "variables": self._variables,
                    "memory_bytes": _MEMORY_BYTES,
                    "cpu_s": self._cpu_s,
                }
                _checked(self._process.exchange(json.dumps(start).encode(), _START_TIMEOUT_S, 1 << 20))
            return self._process.exchange(request, self._timeout_s, max_answer_bytes)
        except TemplateError:
            self._end()
            raise

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.end()


class _Worker:
    """The running process and its two pipes."""

    def __init__(self) -> None:
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        # -P: the script's own folder is not searched for modules. Its file stands alone for that reason.
        command = [sys.executable, "-P", "-B", str(_WORKER)]
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
            raise TemplateError(f"cannot start the template process {command}: {error}") from error
        if self._process.stdin is None or self._process.stdout is None:
            raise TemplateError("the template process has no pipes")
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        os.set_blocking(self._stdin.fileno(), False)
        os.set_blocking(self._stdout.fileno(), False)
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
        """Send a request, receive its answer; TemplateError if that takes too long or the process dies."""
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
                    raise TemplateError(f"the chat template took more than {timeout_s:g} s")
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
                                raise TemplateError("the chat template wrote too much")
        answer: dict[str, Any] = json.loads(incoming[8:expected])
        return answer

    def _write(self, data: memoryview) -> int:
        try:
            return os.write(self._stdin.fileno(), data[:_CHUNK_BYTES])
        except BlockingIOError:
            return 0
        except BrokenPipeError as error:
            raise TemplateError("the template process died") from error

    def _read(self) -> bytes:
        try:
            data = os.read(self._stdout.fileno(), _CHUNK_BYTES)
        except BlockingIOError:
            return b""
        if not data:
            raise TemplateError("the template process died: out of its memory or CPU time")
        return data


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _checked(answer: dict[str, Any]) -> dict[str, Any]:
    if "rejected" in answer:
        raise RequestError(
            f"the chat template refuses these messages: {answer['rejected']}", param="messages"
        )
    if "error" in answer:
        raise TemplateError(f"the chat template failed: {answer['error']}")
    return answer
