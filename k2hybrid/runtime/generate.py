"""TokenRun: the tokens of one job as a plain or asynchronous iterator. Layer 5."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection, Generator

from k2hybrid.engine.handle import JobHandle
from k2hybrid.errors import EngineError, K2Error
from k2hybrid.runtime.mailbox import Mailbox
from k2hybrid.types import (
    DoneEvent,
    EngineEvent,
    PromptProgress,
    ReasonCode,
    StopRule,
    TokenEvent,
    Usage,
)


class StopTokens:
    """A `types.StopRule`: ends at any of the given tokens."""

    def __init__(self, tokens: Collection[int]) -> None:
        self._tokens = frozenset(tokens)
        self.paused = False

    def push(self, token: int) -> bool:
        """True if generation ends with `token`."""
        return token in self._tokens


class TokenRun:
    """A submitted job. Iterate it once, by `for` or by `async for`; leaving the loop early cancels the job.

    `usage` and `finish_reason` are valid after the end. Whoever never iterates must `cancel`.
    """

    def __init__(self, start: Callable[[Mailbox], JobHandle], prompt_tokens: int) -> None:
        self._mailbox = Mailbox()
        self.prompt_tokens = prompt_tokens
        self.finish_reason: ReasonCode | None = None
        self.usage = Usage(prompt_tokens=prompt_tokens)
        self._handle = start(self._mailbox)

    def cancel(self) -> None:
        """End generation soon. From any thread, repeatedly, and after the end."""
        self._handle.cancel()

    def resumed(self) -> TokenRun:
        """End this run and give its tokens again, from the first, and then those that it would have given.

        Once, and only if its job is resumable; see `JobHandle.resume`.
        """
        self.cancel()
        return TokenRun(lambda mailbox: self._handle.resume(mailbox.put), self.prompt_tokens)

    def go_on(self, keep: int, *, stop: StopRule | None = None, temperature: float = 0.0) -> TokenRun:
        """What follows the first `keep` tokens of a run that has ended; see `JobHandle.go_on`."""
        return TokenRun(
            lambda mailbox: self._handle.go_on(mailbox.put, keep, stop=stop, temperature=temperature),
            self.prompt_tokens,
        )

    def lease(self, seconds: float) -> None:
        """See `JobHandle.lease`."""
        self._handle.lease(seconds)

    def __iter__(self) -> Generator[TokenEvent | PromptProgress, None, None]:
        """Tokens as they come; before the first, how far the prompt is, if the job tells.

        Raises:
            K2Error: what made the job fail.
        """
        try:
            while self.finish_reason is None:
                token = self._received(self._mailbox.get())
                if token is not None:
                    yield token
        finally:
            self._left()

    async def __aiter__(self) -> AsyncGenerator[TokenEvent | PromptProgress, None]:
        """As `__iter__`, never blocking the event loop."""
        try:
            while self.finish_reason is None:
                token = self._received(await self._mailbox.get_async())
                if token is not None:
                    yield token
        finally:
            self._left()

    def _received(self, event: EngineEvent) -> TokenEvent | PromptProgress | None:
        if not isinstance(event, DoneEvent):
            return event
        self.finish_reason = event.reason
        self.usage = event.usage
        if event.reason == "error":
            if isinstance(event.error, K2Error):
                raise event.error
            raise EngineError(f"generation failed: {event.error}") from event.error
        return None

    def _left(self) -> None:
        if self.finish_reason is None:
            self.cancel()
