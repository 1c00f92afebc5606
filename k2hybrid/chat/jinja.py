"""Runs a checkpoint's chat template in a process of its own, bounded in time, memory and output.

This side never imports jinja2 and never evaluates anything of the template; `render_worker.py` is the other
side.
"""

from __future__ import annotations

import json
from typing import Any

from k2hybrid.chat.conversation import Conversation
from k2hybrid.chat.prompt import Piece
from k2hybrid.chat.tokenizer import Tokenizer
from k2hybrid.chat.worker import Worker, WorkerError
from k2hybrid.errors import RequestError, TemplateError

_MEMORY_BYTES = 2 << 30
# An honest template writes each text once or twice; this lets it also add some to every message.
_OUTPUT_FACTOR = 8
_OUTPUT_EXTRA_CHARS = 1 << 20


class JinjaRenderer:
    """One template in one lazily started process, killed when it exceeds its bounds and started anew after
    that.

    Thread-safe: renderings take turns, and each has `timeout_s` of its own.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, *, timeout_s: float = 10.0) -> None:
        self._timeout_s = timeout_s
        self._cpu_s = int(timeout_s) + 1
        specials = list(tokenizer.specials)
        self._special_ids = [tokenizer.specials[name] for name in specials]
        named = {key: tokenizer.named(key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        start = {
            "source": source,
            "specials": specials,
            "variables": {key: value for key, value in named.items() if value is not None},
            "memory_bytes": _MEMORY_BYTES,
            "cpu_s": self._cpu_s,
        }
        self._worker = Worker("k2hybrid.chat.render_worker", start)

    @property
    def pid(self) -> int | None:
        """Of the process, if one runs."""
        return self._worker.pid

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
        try:
            answer = self._worker.exchange(request, self._timeout_s, max_answer_bytes=16 * max_chars)
        except WorkerError as error:
            raise TemplateError(f"the chat template {error}") from error
        return [
            piece if isinstance(piece, str) else self._special_ids[piece]
            for piece in _checked(answer)["pieces"]
        ]

    def close(self) -> None:
        """End the process, if one runs."""
        self._worker.close()


def _checked(answer: dict[str, Any]) -> dict[str, Any]:
    if "rejected" in answer:
        raise RequestError(
            f"the chat template refuses these messages: {answer['rejected']}", param="messages"
        )
    if "error" in answer:
        raise TemplateError(f"the chat template failed: {answer['error']}")
    return answer
