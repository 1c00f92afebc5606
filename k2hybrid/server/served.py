"""ServedModel: all that the server needs to know of a runtime. Tests put a scripted one in its place."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, Protocol

from k2hybrid.types import (
    ChatRequest,
    CompletionRequest,
    Event,
    Message,
    PromptProgress,
    ReasonCode,
    TokenLogprob,
    Usage,
)


class Delta(Protocol):
    """What one generated token added. `events` is empty while text is held back (half a character, …)."""

    @property
    def events(self) -> tuple[Event, ...]: ...
    @property
    def logprob(self) -> TokenLogprob | None: ...
    @property
    def progress(self) -> PromptProgress | None:
        """Set on deltas without a token that come before the first one, if the request asked for them."""


class Run(Protocol):
    """Something being generated. Iterating raises what made it fail; after the end the rest is valid."""

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def max_tokens(self) -> int:
        """Tokens of the answer at most: what was asked for, or less where the context leaves less."""

    @property
    def stop_sequence(self) -> str | None:
        """The stop string that ended the answer, if one did."""

    @property
    def usage(self) -> Usage: ...
    @property
    def finish_reason(self) -> ReasonCode | None: ...
    def cancel(self) -> None:
        """End generation soon; may be called from any thread, twice, and after the end."""

    def park(self) -> None:
        """As `cancel`, but what was generated is kept: a request with the same retry_key takes it up again.

        Also after the end: an answer may be finished and not have arrived. A later `cancel` changes nothing.
        """


class ChatRun(Run, Protocol):
    """One answer being generated."""

    def __aiter__(self) -> AsyncIterator[Delta]: ...


class TextDelta(Protocol):
    """What one generated token added to a text; `text` is empty while it is held back."""

    @property
    def text(self) -> str: ...
    @property
    def logprob(self) -> TokenLogprob | None: ...


class TextRun(Run, Protocol):
    """A continuation being generated."""

    def __aiter__(self) -> AsyncIterator[TextDelta]: ...


class Tokenizer(Protocol):
    """Text to ids and back."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def specials(self) -> Mapping[str, int]: ...
    def encode_with_specials(self, text: str) -> list[int]: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def token_bytes(self, token: int) -> bytes: ...


class Prompt(Protocol):
    """A rendered conversation."""

    @property
    def ids(self) -> list[int]: ...


class Template(Protocol):
    """The chat template."""

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        add_generation_prompt: bool = True,
    ) -> Prompt: ...


class ServedModel(Protocol):
    """A loaded model."""

    @property
    def name(self) -> str: ...
    @property
    def context_tokens(self) -> int: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def template(self) -> Template: ...
    def status(self) -> Mapping[str, Mapping[str, Any]]:
        """Figures of this moment, as `Runtime.status` tells them."""

    def chat(self, request: ChatRequest) -> ChatRun:
        """Validate, render and queue. Takes as long as rendering does: call it in a thread.

        Raises RequestError and its kin for what is wrong with the request.

        With the retry_key of a parked run, that one's deltas come again from the beginning, and then go on.
        """

    def complete(self, request: CompletionRequest) -> TextRun:
        """Tokenize and queue a text to be continued as it stands. Raises as `chat`; call it in a thread.

        A retry_key works as in `chat`.
        """

    def count(self, request: ChatRequest) -> int:
        """Tokens of the prompt that `chat` would make of `request`. Takes as long: call it in a thread."""
