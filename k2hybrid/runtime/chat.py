"""ChatRun: one answer as it is generated. Joins the engine's tokens with the stream machine. Layer 5."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, closing
from dataclasses import dataclass, replace

from k2hybrid.chat.stream import ChatStream
from k2hybrid.runtime.guarded import GuardedRun, Item
from k2hybrid.types import (
    ChatRequest,
    Event,
    Malformed,
    PromptProgress,
    ReasonCode,
    TokenLogprob,
    Usage,
)


@dataclass(frozen=True, slots=True)
class Delta:
    """What one generated token added; a last one without a token may flush what was held back.

    `events` is empty while text is held back (half a character, a possible stop string, …) and for markers.
    """

    events: tuple[Event, ...] = ()
    logprob: TokenLogprob | None = None
    progress: PromptProgress | None = None  # of the prompt, before the first token


class ChatRun:
    """An answer under way. Iterate it once, by `for` or by `async for`; leaving the loop early cancels it.

    Tokens become events in the consumer's thread or task, microseconds each. `usage` and `finish_reason` are
    valid after the end. Whoever never iterates must `cancel`, or `park`.

    Args:
        request: what is answered.
        stream: makes the machine that reads the tokens.
        max_tokens: of the answer at most, as far as the context goes.
        ended: called once the last delta is out, before the loop ends; again if the run is resumed later.
        parked: takes the run if its consumer is gone; None: then it is cancelled.
    """

    def __init__(
        self,
        request: ChatRequest,
        tokens: GuardedRun,
        stream: Callable[[], ChatStream],
        max_tokens: int,
        ended: Callable[[ChatRun], None] = lambda run: None,
        parked: Callable[[ChatRun], None] | None = None,
    ) -> None:
        self.request = request
        self._tokens = tokens
        self._new_stream = stream
        self._stream = stream()
        self._ended = ended
        self._parked = parked
        self._reasoning_tokens = 0
        self.prompt_tokens = tokens.prompt_tokens
        self.max_tokens = max_tokens
        self.ids: list[int] = []  # generated so far, as far as the consumer came
        self.events: list[Event] = []

    @property
    def usage(self) -> Usage:
        """Token counts and times."""
        return replace(self._tokens.usage, reasoning_tokens=self._reasoning_tokens)

    @property
    def finish_reason(self) -> ReasonCode | None:
        """Why the answer ended; None while it goes on. A complete answer with calls is "tool_calls"."""
        reason = self._tokens.finish_reason
        return "tool_calls" if reason == "stop" and self._stream.has_tool_calls else reason

    @property
    def stop_sequence(self) -> str | None:
        """The stop string that ended the answer, if one did."""
        return self._stream.stopped_by

    def cancel(self) -> None:
        """End generation soon. From any thread, repeatedly, and after the end."""
        self._tokens.cancel()

    def park(self) -> None:
        """As `cancel`, for an answer that may be asked for again: what was generated is kept for a time."""
        self.cancel()
        if self._parked is not None and self.finish_reason != "error":
            self._parked(self)

    def resumed(self, request: ChatRequest) -> ChatRun:
        """The answer of a parked run once more, from its beginning to the end it would have had.

        `request` asks for the same, and may name the response otherwise.
        """
        tokens = self._tokens.resumed()
        return ChatRun(request, tokens, self._new_stream, self.max_tokens, self._ended, self._parked)

    def lease(self, seconds: float) -> None:
        """Keep the answer's latents, and those of what it answers, for a time."""
        self._tokens.lease(seconds)

    def __iter__(self) -> Generator[Delta, None, None]:
        """Deltas as they come.

        Raises:
            K2Error: what made the answer fail.
        """
        with closing(iter(self._tokens)) as tokens:
            for item in tokens:
                yield self._delta(item)
        if rest := self._finish():
            yield rest

    async def __aiter__(self) -> AsyncGenerator[Delta, None]:
        """As `__iter__`, never blocking the event loop."""
        async with aclosing(aiter(self._tokens)) as tokens:
            async for item in tokens:
                yield self._delta(item)
        if rest := self._finish():
            yield rest

    def _delta(self, event: Item) -> Delta:
        if isinstance(event, PromptProgress):
            return Delta(progress=event)
        if isinstance(event, Malformed):
            self.events.append(event)
            return Delta((event,))
        before = self._stream.in_reasoning
        events = self._stream.push(event.token)
        self._reasoning_tokens += before or self._stream.in_reasoning  # so `<think>` and `</think>` count too
        self.ids.append(event.token)
        self.events += events
        return Delta(tuple(events), event.logprob)

    def _finish(self) -> Delta | None:
        rest = self._stream.finish()
        self.events += rest
        self._ended(self)
        return Delta(tuple(rest)) if rest else None
