"""TextRun: a text, or token ids, continued as they stand. No template, no roles. Layer 5."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection, Generator
from contextlib import aclosing, closing
from dataclasses import dataclass

from k2hybrid.chat.holdback import StopScan, Utf8Pieces
from k2hybrid.chat.tokenizer import Tokenizer
from k2hybrid.runtime.generate import TokenRun
from k2hybrid.types import (
    CompletionRequest,
    PromptProgress,
    ReasonCode,
    TokenEvent,
    TokenLogprob,
    Usage,
)


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What one generated token added; a last one without a token may flush what was held back."""

    text: str = ""
    logprob: TokenLogprob | None = None


def prompt_ids(request: CompletionRequest, tokenizer: Tokenizer) -> list[int]:
    """What is to be continued. An empty prompt is a document's beginning, if the vocabulary names one."""
    if not isinstance(request.prompt, str):
        ids = list(request.prompt)
    elif request.specials:
        ids = tokenizer.encode_with_specials(request.prompt)
    else:
        ids = tokenizer.encode(request.prompt)
    beginning = tokenizer.specials.get(tokenizer.named("bos_token") or "")
    return ids if ids or beginning is None else [beginning]


class TextReader:
    """Generated tokens → text, up to a stop string. Characters come out whole.

    End tokens are never text; other control tokens are their spelling with `specials`, else nothing.
    """

    def __init__(self, request: CompletionRequest, tokenizer: Tokenizer, stop_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._silent = frozenset(stop_ids)
        if not request.specials:
            self._silent |= frozenset(tokenizer.specials.values())
        self._utf8 = Utf8Pieces()
        self._scan = StopScan(request.stop)

    @property
    def stopped_by(self) -> str | None:
        """The stop string that was met."""
        return self._scan.stopped_by

    def push(self, token: int) -> str:
        """The text that can go out now."""
        if token in self._silent:
            return self._scan.push(self._utf8.flush())
        return self._scan.push(self._utf8.push(self._tokenizer.token_bytes(token)))

    def finish(self) -> str:
        """The text held back, as nothing follows."""
        return self._scan.push(self._utf8.flush()) + self._scan.flush()


class TextStopRule:
    """A `types.StopRule`: ends at an end token, or once the text holds a stop string."""

    def __init__(self, request: CompletionRequest, tokenizer: Tokenizer, stop_ids: Collection[int]) -> None:
        self._stop_ids = frozenset(stop_ids)
        self._reader = TextReader(request, tokenizer, stop_ids) if any(request.stop) else None
        self.paused = False

    def push(self, token: int) -> bool:
        """True if generation ends with `token`."""
        if self._reader is None or token in self._stop_ids:
            return token in self._stop_ids
        self._reader.push(token)
        return self._reader.stopped_by is not None


class TextRun:
    """A continuation under way. Iterate it once, by `for` or by `async for`; leaving early cancels it.

    `usage` and `finish_reason` are valid after the end. Whoever never iterates must `cancel`, or `park`.

    Args:
        reader: makes what reads the tokens.
        max_tokens: of output at most, as far as the context goes.
        parked: takes the run if its consumer is gone; None: then it is cancelled.
    """

    def __init__(
        self,
        tokens: TokenRun,
        reader: Callable[[], TextReader],
        max_tokens: int,
        parked: Callable[[TextRun], None] | None = None,
    ) -> None:
        self._tokens = tokens
        self._new_reader = reader
        self._reader = reader()
        self._parked = parked
        self.prompt_tokens = tokens.prompt_tokens
        self.max_tokens = max_tokens

    @property
    def usage(self) -> Usage:
        """Token counts and times."""
        return self._tokens.usage

    @property
    def finish_reason(self) -> ReasonCode | None:
        """Why it ended; None while it goes on."""
        return self._tokens.finish_reason

    @property
    def stop_sequence(self) -> str | None:
        """The stop string that ended it, if one did."""
        return self._reader.stopped_by

    def cancel(self) -> None:
        """End generation soon. From any thread, repeatedly, and after the end."""
        self._tokens.cancel()

    def park(self) -> None:
        """As `cancel`, for a text that may be asked for again: what was generated is kept for a time."""
        self.cancel()
        if self._parked is not None and self.finish_reason != "error":
            self._parked(self)

    def resumed(self) -> TextRun:
        """The text of a parked run once more, from its beginning to the end it would have had."""
        return TextRun(self._tokens.resumed(), self._new_reader, self.max_tokens, self._parked)

    def __iter__(self) -> Generator[TextDelta, None, None]:
        """Deltas as they come.

        Raises:
            K2Error: what made it fail.
        """
        with closing(iter(self._tokens)) as tokens:
            for token in tokens:
                yield self._delta(token)
        if rest := self._reader.finish():
            yield TextDelta(rest)

    async def __aiter__(self) -> AsyncGenerator[TextDelta, None]:
        """As `__iter__`, never blocking the event loop."""
        async with aclosing(aiter(self._tokens)) as tokens:
            async for token in tokens:
                yield self._delta(token)
        if rest := self._reader.finish():
            yield TextDelta(rest)

    def _delta(self, event: TokenEvent | PromptProgress) -> TextDelta:
        if isinstance(event, PromptProgress):  # not asked for
            return TextDelta("")
        return TextDelta(self._reader.push(event.token), event.logprob)
