"""Runs a checkpoint's chat template in a process of its own, bounded in time, memory and output.

This side never imports jinja2 and never evaluates anything of the template; `render_worker.py` is the other
side. Both hold the last few histories: of one that grew only the new messages go there, and only the new
pieces come back. What the process does not hold, as after a restart, it is sent whole.
"""

from __future__ import annotations

import itertools
import json
import threading
from dataclasses import dataclass
from typing import Any

from k2hybrid.chat.conversation import Conversation
from k2hybrid.chat.growing import Held, chars_of
from k2hybrid.chat.prompt import Piece
from k2hybrid.chat.tokenizer import Tokenizer
from k2hybrid.chat.worker import Worker, WorkerError
from k2hybrid.errors import RequestError, TemplateError

_MEMORY_BYTES = 2 << 30
# An honest template writes each text once or twice; this lets it also add some to every message.
_OUTPUT_FACTOR = 8
_OUTPUT_EXTRA_CHARS = 1 << 20


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A history as the process holds it, and what came of it."""

    number: int | None
    messages: list[dict[str, Any] | str]  # `_exact`
    sizes: list[int]  # characters of each message
    tools: str
    pieces: list[Piece]


_NOTHING = _Rendered(None, [], [], "", [])


def _exact(message: dict[str, Any]) -> dict[str, Any] | str:
    """What is equal only where the message is the same: parts may hold numbers, and 1 == True."""
    return message if isinstance(message["content"], str) else json.dumps(message)


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
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._held: Held[_Rendered] = Held()

    @property
    def pid(self) -> int | None:
        """Of the process, if one runs."""
        return self._worker.pid

    def render(self, conversation: Conversation, add_generation_prompt: bool) -> list[Piece]:
        """The template's output as pieces, `merged`.

        Raises RequestError where the template refuses the messages (`raise_exception`), TemplateError where
        it fails, reaches for something forbidden, or exceeds its bounds.
        """
        messages = [_exact(message) for message in conversation.messages]
        tools = json.dumps(conversation.tools)
        with self._lock:
            number = next(self._numbers)
            _, found, known = self._held.longest(messages, lambda rendered: rendered.messages)
        base = found or _NOTHING
        while True:  # twice at most: without a base nothing can be forgotten
            new = [m if isinstance(m, str) else json.dumps(m) for m in messages[known:]]
            sizes = base.sizes[:known] + [len(text) for text in new]
            request = {
                "number": number,
                "base": base.number,
                "known": known,
                "add_generation_prompt": add_generation_prompt,
            }
            size = sum(sizes) + len(tools)
            answer = self._answer(request, new, None if tools == base.tools else tools, size)
            if "forgotten" not in answer:
                break
            if base is _NOTHING:
                raise TemplateError("the chat template's process forgot what it was not to remember")
            with self._lock:
                self._held.drop(base.number)
            base, known = _NOTHING, 0
        pieces = base.pieces[: answer["known"]]
        pieces += [p if isinstance(p, str) else self._special_ids[p] for p in answer["pieces"]]
        grown = base.number if known == len(base.messages) else None
        rendered = _Rendered(number, messages, sizes, tools, pieces)
        with self._lock:
            self._held.put(number, rendered, size + chars_of(pieces), grown)
        return pieces

    def _answer(
        self, request: dict[str, Any], new: list[str], tools: str | None, size: int
    ) -> dict[str, Any]:
        """Of the process: new messages, tools (None: as in the base), and the whole history's characters."""
        max_chars = _OUTPUT_FACTOR * size + _OUTPUT_EXTRA_CHARS
        head = json.dumps({**request, "cpu_s": self._cpu_s, "max_chars": max_chars, "chars": size})
        data = f'{head[:-1]}, "tools": {tools or "null"}, "messages": [{",".join(new)}]}}'.encode()
        try:
            answer = self._worker.exchange(data, self._timeout_s, max_answer_bytes=16 * max_chars)
        except WorkerError as error:
            raise TemplateError(f"the chat template {error}") from error
        return _checked(answer)

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
