"""A ServedModel that plays scripts instead of running a network: the server's other side in these tests."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import threading
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from k2hybrid.engine.metrics import EngineMetrics
from k2hybrid.errors import ContextLengthError, RequestError
from k2hybrid.types import (
    ChatRequest,
    CompletionRequest,
    Content,
    Event,
    Message,
    PromptProgress,
    TokenLogprob,
    Usage,
)


@dataclass
class Step:
    """One token: after `delay_s`, its events; or a failure."""

    events: tuple[Event, ...] = ()
    logprob: TokenLogprob | None = None
    progress: PromptProgress | None = None
    delay_s: float = 0.0
    error: Exception | None = None

    @property
    def text(self) -> str:
        """What a text completion makes of it."""
        return "".join(event.text for event in self.events if isinstance(event, Content))


@dataclass
class Script:
    """What one answer consists of."""

    steps: Iterable[Step]
    finish: str = "stop"
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    stop_sequence: str | None = None
    max_tokens: int | None = None  # None: what was asked for


@dataclass
class ScriptedRun:
    """`replay` comes first, at once: what another run generated before it was parked; then `script`'s steps.

    `cancelled`: generation was told to end, by `cancel` or `park`. `generated` counts its own tokens.
    """

    script: Script
    prompt_tokens: int
    max_tokens: int
    retry_key: str = ""
    parked: dict[str, list[ScriptedRun]] = field(default_factory=dict)
    replay: list[Step] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)
    cancelled_at: float = 0.0
    generated: int = 0
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.past = list(self.replay)
        self.ahead = iter(self.script.steps)
        self.next = next(self.ahead, None)

    @property
    def played(self) -> int:
        """Tokens of the answer so far."""
        return len(self.past)

    @property
    def stop_sequence(self) -> str | None:
        return self.script.stop_sequence

    @property
    def usage(self) -> Usage:
        return Usage(
            self.prompt_tokens,
            self.played,
            self.script.cached_tokens,
            reasoning_tokens=self.script.reasoning_tokens,
        )

    async def __aiter__(self) -> AsyncIterator[Step]:
        for step in self.replay:
            yield step
        while (step := self.next) is not None:
            ready = time.monotonic() + step.delay_s
            while not self.cancelled.is_set() and (left := ready - time.monotonic()) > 0:
                await asyncio.sleep(min(left, 0.02))
            if self.cancelled.is_set():
                self.finish_reason = "cancelled"
                return
            if step.error is not None:
                raise step.error
            self.generated += 1
            self.past.append(step)
            self.next = next(self.ahead, None)
            yield step
        self.finish_reason = self.script.finish

    def cancel(self) -> None:
        if not self.cancelled.is_set():
            self.cancelled_at = time.monotonic()
            self.cancelled.set()

    def park(self) -> None:
        if not self.cancelled.is_set():
            self.cancel()
            self.parked.setdefault(self.retry_key, []).append(self)

    def again(self) -> ScriptedRun:
        """What takes this parked run up."""
        rest = itertools.chain([] if self.next is None else [self.next], self.ahead)
        script = dataclasses.replace(self.script, steps=rest)
        return ScriptedRun(
            script, self.prompt_tokens, self.max_tokens, self.retry_key, self.parked, list(self.past)
        )


@dataclass
class Prompt:
    ids: list[int]


class ByteTokenizer:
    """Token i is byte i; above them one control token per name."""

    specials: Mapping[str, int] = {"<|im_end|>": 256, "</think>": 257}
    vocab_size = 258

    def encode_with_specials(self, text: str) -> list[int]:
        out: list[int] = []
        while text:
            name = next((name for name in self.specials if text.startswith(name)), None)
            if name:
                out.append(self.specials[name])
            else:
                out += text[0].encode()
            text = text[len(name or text[0]) :]
        return out

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        names = {number: name for name, number in self.specials.items()}
        return names[token].encode() if token in names else bytes([token])


class PlainTemplate:
    """Roles and texts on lines of their own."""

    def __init__(self, tokenizer: ByteTokenizer) -> None:
        self._tokenizer = tokenizer

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        add_generation_prompt: bool = True,
    ) -> Prompt:
        lines = [f"tools:{len(tools)}"] if tools else []
        for message in messages:
            parts = message.content
            text = parts if isinstance(parts, str) else "".join(part["text"] for part in parts or ())
            lines.append(f"{message.role}:{text}")
        if add_generation_prompt:
            lines.append("assistant:")
        return Prompt(list("\n".join(lines).encode()))


class ScriptedModel:
    """Plays `scripts` one after the other, the last one for ever; records requests and runs."""

    def __init__(
        self, *scripts: Script | Exception, name: str = "scripted", context_tokens: int = 4096
    ) -> None:
        self.name = name
        self.context_tokens = context_tokens
        self.tokenizer = ByteTokenizer()
        self.template = PlainTemplate(self.tokenizer)
        self.requests: list[ChatRequest] = []
        self.completions: list[CompletionRequest] = []
        self.runs: list[ScriptedRun] = []
        self.parked: dict[str, list[ScriptedRun]] = {}
        self._scripts = list(scripts)
        self._lock = threading.Lock()

    def status(self) -> dict[str, dict[str, Any]]:
        return {
            "engine": EngineMetrics().snapshot(),
            "latents": {"rows": "bf16", "page_tokens": 64, "pages": 8, "used": 0, "kept": 0, "free": 8},
            "experts": {"place": "mapped"},
            "device": {"name": "cpu"},
            "weights": {"lost_files": []},
            "journal": {"enabled": False},
            "memory": {"private_bytes": 1 << 20, "mapped_bytes": 0},
        }

    def play(self, *scripts: Script | Exception) -> None:
        """What comes next; forgets the past."""
        self._scripts = list(scripts)
        self.requests.clear()
        self.completions.clear()
        self.runs.clear()
        self.parked.clear()

    def play_next(self, *scripts: Script | Exception) -> None:
        """What comes next; the past, and what is parked, stays."""
        self._scripts = list(scripts)

    def _resumed(self, retry_key: str) -> ScriptedRun | None:
        if not (retry_key and (parked := self.parked.get(retry_key))):
            return None
        self.runs.append(parked.pop(0).again())
        return self.runs[-1]

    def chat(self, request: ChatRequest) -> ScriptedRun:
        with self._lock:
            self.requests.append(request)
            if (resumed := self._resumed(request.retry_key)) is not None:
                return resumed
            script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
            if isinstance(script, Exception):
                raise script
            length = len(self.template.render(request.messages, request.tools).ids)
            if length >= self.context_tokens:
                raise ContextLengthError(f"the prompt has {length} tokens; the context {self.context_tokens}")
            limit = script.max_tokens or request.max_tokens or self.context_tokens - length
            run = ScriptedRun(script, length, limit, request.retry_key, self.parked)
            self.runs.append(run)
            return run

    def complete(self, request: CompletionRequest) -> ScriptedRun:
        with self._lock:
            self.completions.append(request)
            if (resumed := self._resumed(request.retry_key)) is not None:
                return resumed
            script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
            if isinstance(script, Exception):
                raise script
            prompt = request.prompt
            if not isinstance(prompt, str) and max(prompt, default=0) >= self.tokenizer.vocab_size:
                raise RequestError("prompt ids must lie in the vocabulary", param="prompt")
            length = len(prompt.encode() if isinstance(prompt, str) else prompt)
            if length >= self.context_tokens:
                raise ContextLengthError(f"the prompt has {length} tokens", param="prompt")
            limit = request.max_tokens or self.context_tokens - length
            run = ScriptedRun(script, length, limit, request.retry_key, self.parked)
            self.runs.append(run)
            return run

    def count(self, request: ChatRequest) -> int:
        return len(self.template.render(request.messages, request.tools).ids)
