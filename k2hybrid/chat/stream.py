"""Tokens of the model's answer → events: reasoning, content, tool calls.

A pure machine: `(state, token) → (state, events)`. Markers are recognised by id, so text that merely spells
one is text. What is neither text nor a usable call becomes a `Malformed` event: its `text` is what the model
wrote (never a marker), its `reason` names the trouble. Rules where the format leaves them open:

* White space around a marker is dropped inside a tool section, around arguments, and where a content is
  nothing but white space between two markers; every other text is kept exactly.
* Text between calls is `Malformed`. `<think>` there begins a reasoning, and the section is over.
* A call without a section is a section of its own: text after it is content.
* A tool section begun inside `<think>` ends the reasoning.
* A marker that says again what holds already (`<think>` in the reasoning, `</think>` in the content, a
  section begin in a section, its end after one, a call begin directly after one) changes nothing. Any other
  marker or control token out of its place is stripped, and a `Malformed` without text tells.
* Some models spell the section markers in text, and in the singular (`<|tool_call_section_begin|>`). That
  text is taken for the marker only where it touches a real one: the begin directly before a call, the end
  directly after a call. Anywhere else it is text.
* Absent or blank arguments become `{}`, others are passed on verbatim, valid JSON or not. Of a call that was
  cut off what there is goes out, and a `Malformed` follows; nothing is made up for it.
* Where a call's begin is missing in a section, the text before its arguments is its id.
* A header that is a mere number waits for the end of its call: if the arguments fit exactly one declared
  tool, it is that one's; if not, the call is `Malformed`.

Which state a token leads to never depends on the declared tools: `stop.py` reads the same text without them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from enum import Enum, auto
from typing import Any

from k2hybrid.chat.content import SINGULAR_BEGIN, SINGULAR_END, ContentText, SectionBegin
from k2hybrid.chat.holdback import Utf8Pieces
from k2hybrid.chat.markers import Markers
from k2hybrid.chat.tokenizer import Tokenizer
from k2hybrid.chat.toolcall import DeclaredTools, canonical_id
from k2hybrid.types import (
    Content,
    Event,
    Malformed,
    Reasoning,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)


class _State(Enum):
    CONTENT = auto()
    REASONING = auto()
    GAP = auto()  # in a section, between calls
    HEADER = auto()  # after a call's begin: its id
    ARGUMENTS = auto()  # of a call that was announced
    UNNAMED = auto()  # arguments of a call whose header names no tool (yet)
    ENDED = auto()


class ChatStream:
    """Feed it every generated token, then `finish()`; the events of both, in order, are the answer.

    `tools` are the request's declarations; `first_call_index` and `in_reasoning` come from the `Prompt`;
    `stop_ids` end the answer (None: the vocabulary's own).
    `stopped` is set once a stop string was met in the content; the text before it is the end of the answer.
    """

    def __init__(
        self,
        markers: Markers,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        tools: Sequence[Mapping[str, Any]] = (),
        first_call_index: int = 0,
        in_reasoning: bool = False,
        stop_ids: Collection[int] | None = None,
    ) -> None:
        self._markers = markers
        self._tokenizer = tokenizer
        self._stop_ids = tokenizer.stop_ids if stop_ids is None else frozenset(stop_ids)
        self._tools = DeclaredTools(tools)
        self._first_call_index = first_call_index
        self._calls = 0
        self._state = _State.REASONING if in_reasoning else _State.CONTENT
        self._in_section = False  # a section marker was seen, so text between calls is not content
        self._utf8 = Utf8Pieces()
        self._reasoning = SectionBegin()
        self._content = ContentText(stop)
        self._buffer = ""  # gap text, header, or arguments held back
        self._header = ""
        self._arguments_begun = False
        self._events: list[Event] = []
        self._on_marker = {
            markers.think_begin: self._think_begin,
            markers.think_end: self._think_end,
            markers.section_begin: self._section_begin,
            markers.section_end: self._section_end,
            markers.call_begin: self._call_begin,
            markers.argument_begin: self._argument_begin,
            markers.call_end: self._call_end,
        }

    @property
    def has_tool_calls(self) -> bool:
        """Whether a call was announced so far."""
        return self._calls > 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._content.stopped

    @property
    def stopped_by(self) -> str | None:
        """The stop string that was met."""
        return self._content.stopped_by

    @property
    def in_reasoning(self) -> bool:
        """Whether the last token belonged to the reasoning."""
        return self._state is _State.REASONING

    def _is_over(self) -> bool:
        return self._state is _State.ENDED

    def push(self, token: int) -> list[Event]:
        """The events that `token` completes. Tokens after a stop token or a stop string are ignored."""
        if self._is_over():
            return []
        if 0 <= token < self._tokenizer.num_ranks:
            self._text(self._utf8.push(self._tokenizer.token_bytes(token)))
        elif token in self._stop_ids:
            self._close(at_stop_token=True)
        else:
            self._text(self._utf8.flush())
            if not self._is_over():
                self._control(token)
        return self._taken()

    def finish(self) -> list[Event]:
        """The events still held back. Idempotent."""
        if not self._is_over():
            self._close(at_stop_token=False)
        return self._taken()

    # --- text -------------------------------------------------------------------------------------

    def _text(self, text: str) -> None:
        if not text:
            return
        match self._state:
            case _State.CONTENT:
                self._content_text(text)
            case _State.REASONING:
                self._emit_reasoning(self._reasoning.push(text))
            case _State.GAP:
                self._gap_text(text)
            case _State.HEADER | _State.UNNAMED:
                self._buffer += text
            case _State.ARGUMENTS:
                self._argument_text(text)

    def _content_text(self, text: str) -> None:
        self._emit_content(self._content.push(text))
        if self._content.stopped:
            self._state = _State.ENDED

    def _emit_reasoning(self, text: str) -> None:
        if text:
            self._events.append(Reasoning(text))

    def _emit_content(self, text: str) -> None:
        if text:
            self._events.append(Content(text))

    def _gap_text(self, text: str) -> None:
        self._buffer += text
        bare = self._buffer.lstrip()
        if bare.startswith(SINGULAR_END):
            self._leave_section()
            self._text(bare[len(SINGULAR_END) :])

    def _argument_text(self, text: str) -> None:
        text = self._buffer + text
        if not self._arguments_begun:
            text = text.lstrip()
            self._arguments_begun = bool(text)
        kept = text.rstrip()
        self._buffer = text[len(kept) :]
        if kept:
            self._events.append(ToolCallArguments(self._calls - 1, kept))

    # --- markers ----------------------------------------------------------------------------------

    def _control(self, token: int) -> None:
        """A control token: it ends the text before it, whatever else it does."""
        before_call = token == self._markers.call_begin
        if self._state is _State.CONTENT:
            self._emit_content(self._content.leave(before_call=before_call))
        elif self._state is _State.REASONING:
            self._emit_reasoning(self._reasoning.leave(before_call=before_call))
        if handler := self._on_marker.get(token):
            handler()
        else:
            name = self._tokenizer.special_names.get(token, f"token id {token}")
            self._stray(f"{name} does not belong in an answer")

    def _think_begin(self) -> None:
        if self._state in (_State.CONTENT, _State.GAP):
            self._drop_gap()
            self._in_section = False
            self._enter(_State.REASONING)
        elif self._state is not _State.REASONING:
            self._stray("<think> inside a tool call")

    def _think_end(self) -> None:
        if self._state is _State.REASONING:
            self._enter_content()
        elif self._state is not _State.CONTENT:
            self._stray("</think> inside a tool section")

    def _section_begin(self) -> None:
        self._end_open_call()
        self._drop_gap()
        self._in_section = True
        self._enter(_State.GAP)

    def _section_end(self) -> None:
        if self._state is _State.CONTENT and self._content.after_section:
            return  # of a call that had no section begin
        if self._state in (_State.CONTENT, _State.REASONING):
            self._stray("a tool section ends that never began")
            return
        self._end_open_call()
        self._drop_gap()
        self._leave_section()

    def _call_begin(self) -> None:
        self._end_open_call(repeated=True)
        self._drop_gap(before_call=True)
        self._enter(_State.HEADER)

    def _argument_begin(self) -> None:
        if self._state is _State.HEADER or (self._state is _State.GAP and self._buffer.strip()):
            self._open_call(self._buffer)
        else:
            self._stray("<|tool_call_argument_begin|> outside a call")

    def _call_end(self) -> None:
        if self._state in (_State.HEADER, _State.ARGUMENTS, _State.UNNAMED):
            self._end_open_call()
        else:
            self._stray("a tool call ends that never began")

    # --- calls ------------------------------------------------------------------------------------

    def _open_call(self, header: str) -> None:
        """The header is complete: announce the call, or wait for its arguments to tell the tool."""
        self._header = header.strip()
        self._buffer = ""
        self._arguments_begun = False
        name = self._tools.name_of(self._header)
        if name is None:
            self._state = _State.UNNAMED
        else:
            self._state = _State.ARGUMENTS
            self._start(name)

    def _start(self, name: str) -> None:
        call_id = canonical_id(name, self._first_call_index + self._calls)
        self._events.append(ToolCallStart(self._calls, call_id, name))
        self._calls += 1

    def _end_open_call(self, *, repeated: bool = False) -> None:
        """End the call that is open, if one is; the state is then the one between calls."""
        if self._state is _State.HEADER:
            header = self._buffer
            if repeated:  # what stood between is no call
                if header.strip():
                    self._malformed(header, "a call began again before its arguments")
            else:  # the arguments are absent, or the marker before them is
                at = header.find("{")
                self._open_call(header if at < 0 else header[:at])
                self._text("" if at < 0 else header[at:])
        if self._state is _State.ARGUMENTS:
            if not self._arguments_begun:
                self._events.append(ToolCallArguments(self._calls - 1, "{}"))
            self._events.append(ToolCallEnd(self._calls - 1))
        elif self._state is _State.UNNAMED:
            self._infer_call()
        elif self._state is not _State.HEADER:
            return
        self._buffer = ""
        if self._in_section:
            self._enter(_State.GAP)
        else:
            self._enter_content(after_section=True, after_call=True)

    def _infer_call(self) -> None:
        arguments = self._buffer.strip()
        name = self._tools.inferred(arguments) if self._tools.is_nameless(self._header) else None
        if name is None:
            self._malformed(self._header + self._buffer, f"no tool fits the call id {self._header[:80]!r}")
            return
        self._start(name)
        self._events.append(ToolCallArguments(self._calls - 1, arguments or "{}"))
        self._events.append(ToolCallEnd(self._calls - 1))

    def _cut_open_call(self) -> None:
        """Generation ended inside a call, if one is open: what there is goes out, and it is told."""
        reason = "the answer ended inside a tool call"
        match self._state:
            case _State.HEADER:
                self._malformed(self._buffer, "the answer ended inside a call's id")
            case _State.ARGUMENTS:
                self._events.append(ToolCallEnd(self._calls - 1, cut=True))
                self._stray(reason)
            case _State.UNNAMED:
                self._malformed(self._header + self._buffer, reason)

    # --- between states ---------------------------------------------------------------------------

    def _drop_gap(self, *, before_call: bool = False) -> None:
        """Text between calls is not content; the singular section begin before a call is not even text."""
        if self._state is not _State.GAP:
            return
        buffer, self._buffer = self._buffer, ""
        if before_call and (bare := buffer.rstrip()).endswith(SINGULAR_BEGIN):
            buffer = bare.removesuffix(SINGULAR_BEGIN)
        if buffer.strip():
            self._malformed(buffer, "text between tool calls")

    def _leave_section(self) -> None:
        self._in_section = False
        self._enter_content(after_section=True)

    def _enter_content(self, *, after_section: bool = False, after_call: bool = False) -> None:
        self._enter(_State.CONTENT)
        self._content.begin(after_section=after_section, after_call=after_call)

    def _enter(self, state: _State) -> None:
        self._state = state
        self._buffer = ""

    def _close(self, *, at_stop_token: bool) -> None:
        """The answer is over: by a stop token, or because generation ended."""
        self._text(self._utf8.flush())
        if at_stop_token:
            self._end_open_call()
        else:
            self._cut_open_call()
        self._drop_gap()
        if self._state is _State.CONTENT:
            self._emit_content(self._content.finish())
        elif self._state is _State.REASONING:
            self._emit_reasoning(self._reasoning.leave())
        self._state = _State.ENDED

    def _malformed(self, text: str, reason: str) -> None:
        self._events.append(Malformed(text, reason))

    def _stray(self, reason: str) -> None:
        self._malformed("", reason)

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return events
