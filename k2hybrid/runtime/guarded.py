"""GuardedRun: tokens of an answer; what its grammar cannot promise is validated first. Layer 5.

Some schemas say more than a grammar can hold. A call under such a schema is held back until it is complete
and validated; one that fails is taken back in the engine and generated again from its start, and after the
last attempt it is reported instead of sent. The same for JSON content. Everything else passes at once.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass
from enum import Enum, auto

from k2hybrid.chat.constraint import Phase
from k2hybrid.chat.markers import Markers
from k2hybrid.chat.tokenizer import Tokenizer
from k2hybrid.runtime.generate import TokenRun
from k2hybrid.runtime.mask import ConstraintMask
from k2hybrid.types import Malformed, PromptProgress, ReasonCode, StopRule, TokenEvent, Usage

RETRIES = 3  # of a call, or of the content, that is not valid
RETRY_TEMPERATURE = 0.6  # at least: at zero the same would come again

_BROKEN = "the grammar of the arguments met a limit"

# Why a text is not valid; None if it is. May take a while.
Check = Callable[[str], str | None]
Item = TokenEvent | PromptProgress | Malformed


class InvalidCalls:
    """Counts calls that were not valid: those generated again, and those given up. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.retried = 0
        self.given_up = 0

    def add(self, *, given_up: bool) -> None:
        """One more."""
        with self._lock:
            if given_up:
                self.given_up += 1
            else:
                self.retried += 1


@dataclass(frozen=True, slots=True)
class Guard:
    """What of an answer is held back.

    Attributes:
        calls: by the name of the tool, how the arguments of its calls are validated.
        content: how the content is validated, as a whole.
        stop_after: a stop rule that has read these tokens already.
    """

    calls: Mapping[str, Check]
    content: Check | None
    stop_after: Callable[[Sequence[int]], StopRule]
    counts: InvalidCalls


class _State(Enum):
    START = auto()  # of an answer whose content is held, but for a reasoning that may begin it
    OPEN = auto()  # everything passes
    HEADER = auto()  # of a call: whether it is to be held is not known yet
    CALL = auto()  # its arguments
    CONTENT = auto()  # JSON


class GuardedRun:
    """As a `TokenRun`, with `Malformed` in place of what could not be made valid.

    Args:
        phase: where the prompt ends.
    """

    def __init__(
        self,
        tokens: TokenRun,
        guard: Guard,
        mask: ConstraintMask,
        markers: Markers,
        tokenizer: Tokenizer,
        *,
        phase: Phase,
    ) -> None:
        self._tokens = tokens
        self._guard = guard
        self._mask = mask
        self._markers = markers
        self._tokenizer = tokenizer
        self._phase = phase
        self._state = _State.OPEN
        if guard.content is not None and phase is not Phase.REASONING:
            self._state = _State.START if phase is Phase.START else _State.CONTENT
        self._passed: list[int] = []  # tokens of the answer that were let out
        self._held: list[TokenEvent] = []
        self._text = b""  # of what is held: the header, then the arguments or the content
        self._check: Check | None = None  # of the open call
        self._tries = 0
        self._given_up = False
        self._cancelled = False
        self._retries = False  # what was held is to be generated again, once the job has ended
        self.prompt_tokens = tokens.prompt_tokens

    @property
    def usage(self) -> Usage:
        """Token counts and times; valid after the end."""
        return self._tokens.usage

    @property
    def finish_reason(self) -> ReasonCode | None:
        """Why the answer ended; None while it goes on."""
        if self._mask.broken and self._tokens.finish_reason in ("stop", "paused"):
            return "length"  # the grammar's limits cut it off
        if self._given_up:
            return "stop"
        reason = self._tokens.finish_reason
        if self._cancelled and (reason == "paused" or self._retries):
            return "cancelled"
        return None if reason == "paused" else reason

    def cancel(self) -> None:
        """See `TokenRun.cancel`."""
        self._cancelled = True
        self._tokens.cancel()

    def resumed(self) -> GuardedRun:
        """See `TokenRun.resumed`."""
        return GuardedRun(
            self._tokens.resumed(), self._guard, self._mask, self._markers, self._tokenizer,
            phase=self._phase,
        )  # fmt: skip

    def lease(self, seconds: float) -> None:
        """See `TokenRun.lease`."""
        self._tokens.lease(seconds)

    def __iter__(self) -> Generator[Item, None, None]:
        """As `TokenRun`, with what was held once it is valid."""
        while True:
            with closing(iter(self._tokens)) as tokens:
                for event in tokens:
                    yield from self._pushed(event)
                    if check := self._due():
                        yield from self._judged(check(self._held_text()))
            if check := self._due(at_end=True):
                yield from self._judged(check(self._held_text()))
            if not self._goes_on():
                break
        yield from self._rest()

    async def __aiter__(self) -> AsyncGenerator[Item, None]:
        """As `__iter__`, never blocking the event loop."""
        while True:
            async with aclosing(aiter(self._tokens)) as tokens:
                async for event in tokens:
                    for item in self._pushed(event):
                        yield item
                    if check := self._due():
                        for item in self._judged(await asyncio.to_thread(check, self._held_text())):
                            yield item
            if check := self._due(at_end=True):
                for item in self._judged(await asyncio.to_thread(check, self._held_text())):
                    yield item
            if not self._goes_on():
                break
        for item in self._rest():
            yield item

    # --- steps ------------------------------------------------------------------------------------

    def _pushed(self, event: TokenEvent | PromptProgress) -> list[Item]:
        """What goes out with `event`."""
        if isinstance(event, PromptProgress):
            return [event]
        if self._retries or self._given_up:
            return []
        markers, token = self._markers, event.token
        self._held.append(event)
        if self._state is _State.START:
            self._state = _State.OPEN if token == markers.think_begin else _State.CONTENT
        match self._state:
            case _State.OPEN if token == markers.call_begin and self._guard.calls:
                self._state, self._text = _State.HEADER, b""
            case _State.OPEN if token == markers.think_end and self._guard.content is not None:
                out = self._let_out()
                self._state, self._text = _State.CONTENT, b""
                return out
            case _State.OPEN if token == markers.call_end and self._mask.broken:
                self._held.clear()  # so that the call does not look finished
            case _State.OPEN:
                return self._let_out()
            case _State.HEADER if token == markers.argument_begin:
                name = self._text.decode("utf-8", "replace").partition(".")[2].rpartition(":")[0]
                self._check = self._guard.calls.get(name)
                self._text = b""
                self._state = _State.OPEN if self._check is None else _State.CALL
                return self._let_out() if self._check is None else []
            case _State.CONTENT if token == markers.section_begin:  # calls instead of content
                self._state = _State.OPEN
                return self._let_out()
            case _ if token < self._tokenizer.num_ranks:
                self._text += self._tokenizer.token_bytes(token)
            case _:
                pass
        return []

    def _due(self, *, at_end: bool = False) -> Check | None:
        """How what is held is to be validated, if it is complete."""
        if self._retries or self._given_up:
            return None
        last = self._held[-1].token if self._held else -1
        if self._state is _State.CALL and last == self._markers.call_end:
            return (lambda _: _BROKEN) if self._mask.broken else self._check
        # A stop string ended it in its middle: then it is what the client wants.
        whole = self._tokens.finish_reason == "stop" and last >= self._tokenizer.num_ranks
        if at_end and self._state is _State.CONTENT and whole:
            return self._guard.content
        return None

    def _judged(self, reason: str | None) -> list[Item]:
        """What goes out after validation: all that was held, nothing yet, or a report."""
        if reason is None:
            if self._state is _State.CALL:
                self._tries = 0
            self._state = _State.OPEN
            return self._let_out()
        call = self._state is _State.CALL
        given_up = self._tries == RETRIES
        if call:
            self._guard.counts.add(given_up=given_up)
        if given_up:
            self._given_up = True
            self._held.clear()
            code = "invalid_tool_call" if call else "invalid_json"
            return [Malformed(self._held_text(), reason, code)]
        self._tries += 1
        # The call's first token stays: from there it is generated again.
        self._held = self._held[:1] if call else []
        self._text = b""
        self._state = _State.HEADER if call else _State.CONTENT
        self._retries = True
        return []

    def _goes_on(self) -> bool:
        """Whether there is more to come, as the job has ended: another try, or the rest after a pause."""
        paused = self._tokens.finish_reason == "paused"
        if self._given_up or self._is_cancelled() or not (paused or self._retries):
            return False
        if self._retries:
            self._retries = False
            kept = [*self._passed, *(event.token for event in self._held)]
            self._mask.rewind(len(kept))
            stop = self._guard.stop_after(kept)
            self._tokens = self._tokens.go_on(len(kept), stop=stop, temperature=RETRY_TEMPERATURE)
        elif self._mask.broken:
            self._guard.counts.add(given_up=True)
            self._given_up = True
            return False
        else:
            self._mask.resume()
            self._tokens = self._tokens.go_on(len(self._passed))
        if self._is_cancelled():  # meanwhile
            self._tokens.cancel()
        return True

    def _is_cancelled(self) -> bool:
        return self._cancelled

    def _held_text(self) -> str:
        return self._text.decode("utf-8", "replace")

    def _let_out(self) -> list[Item]:
        out, self._held = self._held, []
        self._passed += [event.token for event in out]
        return list(out)

    def _rest(self) -> list[Item]:
        """What is still held as the answer is over."""
        if self._mask.broken and self._state in (_State.OPEN, _State.CONTENT) and not self._cancelled:
            code = "invalid_json" if self._mask.in_content else "invalid_tool_call"
            return [*self._let_out(), Malformed("", _BROKEN, code)]
        if self._given_up or self._cancelled:
            return []
        if self._state is _State.CALL or (self._state is _State.HEADER and self._held):
            self._held.clear()
            return [Malformed(self._held_text(), "the answer ended inside a tool call", "invalid_tool_call")]
        return self._let_out()
