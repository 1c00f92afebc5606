"""Deltas of a run → the events of OpenAI's Responses stream, and the response they add up to. Pure: no clock.

A whole response is the one in the last event that a stream would have sent, so both say the same.

What the model wrote that is neither text nor a usable call is not dropped: the response has it as
`"k2hybrid": {"malformed": [{"text": …, "reason": …, "code": …}]}`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from k2hybrid.server.chat_reply import finish_reason
from k2hybrid.server.failures import Failure
from k2hybrid.server.logprobs import HeldLogprobs
from k2hybrid.server.progress import told_progress
from k2hybrid.server.responses_items import call_id, item_id
from k2hybrid.server.responses_request import ResponsesCall
from k2hybrid.server.responses_tools import Origin, custom_input
from k2hybrid.server.sealed import seal
from k2hybrid.server.served import ChatRun, Delta, Tokenizer
from k2hybrid.types import (
    Content,
    Event,
    Malformed,
    PromptProgress,
    Reasoning,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)

Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """What every form of one response starts with."""

    id: str
    created: int  # seconds since 1970
    model: str


class Reply:
    """One response as it grows: deltas in, events out. They get their numbers when they are sent."""

    def __init__(self, call: ResponsesCall, head: ResponseHead, tokenizer: Tokenizer) -> None:
        self._call = call
        self._head = head
        wanted = call.request.sampling.logprobs is not None
        self._logprobs = HeldLogprobs(tokenizer) if wanted else None
        self._items: list[_Item] = []
        self._open: _Item | None = None
        self._malformed: list[Fields] = []

    def opening(self) -> list[Fields]:
        """The first events."""
        return [self._whole(f"response.{kind}", "in_progress") for kind in ("created", "in_progress")]

    def in_progress(self) -> Fields:
        """The event that says no more than that the response is being worked on.

        It may come many times, so of the request it repeats only what clients' types insist on.
        """
        response = {
            **self._identity("in_progress"),
            "output": [],
            "parallel_tool_calls": self._call.request.parallel_tool_calls,
            "tool_choice": self._call.request.tool_choice,
            "tools": [],
        }
        return {"type": "response.in_progress", "response": response}

    def push(self, delta: Delta) -> list[Fields]:
        """The events that one more token makes."""
        if self._logprobs is not None:
            self._logprobs.hold(delta)
        events = [] if delta.progress is None else [self._progressed(delta.progress)]
        return events + [fields for event in delta.events for fields in self._event(event)]

    def _progressed(self, progress: PromptProgress) -> Fields:
        """As `in_progress`, and says how far the prompt is."""
        return {**self.in_progress(), "prompt_progress": told_progress(progress)}

    def finish(self, run: ChatRun, completed_at: int) -> list[Fields]:
        """The last events, after the run's end; the very last has the whole response."""
        cut = finish_reason(run) == "length"
        events = self._close("incomplete" if cut else "completed")
        usage = response_usage(run)
        if not cut:
            return [*events, self._whole("response.completed", "completed", usage, completed_at=completed_at)]
        why = {"reason": "max_output_tokens"}
        return [*events, self._whole("response.incomplete", "incomplete", usage, incomplete_details=why)]

    def failed(self, failure: Failure) -> Fields:
        """The last event of a response that came to no end."""
        if self._open is not None:
            self._open.status = "incomplete"
        error = {"code": _error_code(failure), "message": failure.message}
        return self._whole("response.failed", "failed", error=error)

    def _whole(self, kind: str, status: str, usage: Fields | None = None, **more: Any) -> Fields:
        response: Fields = {
            **self._identity(status),
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            # While it grows, items come in events of their own.
            "output": [] if status == "in_progress" else [item.fields() for item in self._items],
            "usage": usage,
            **self._call.echo,
            **more,
        }
        if self._malformed:
            response["k2hybrid"] = {"malformed": self._malformed}
        return {"type": kind, "response": response}

    def _identity(self, status: str) -> Fields:
        return {
            "id": self._head.id,
            "object": "response",
            "created_at": self._head.created,
            "status": status,
            "model": self._head.model,
        }

    def _event(self, event: Event) -> list[Fields]:
        match event:
            case Reasoning(text):
                return self._add(_Reasoning, text)
            case Content(text):
                return self._add(_Text, text, self._logprobs.taken() if self._logprobs else [])
            case ToolCallStart(_, _, name):
                return self._start(_Call, self._call.toolbox.origin(name))
            case ToolCallArguments(_, text):
                return self._located(self._open.delta(text, [])) if self._open else []
            case ToolCallEnd(_, cut):
                return self._close("incomplete" if cut else "completed")
            case Malformed(text, reason, code):
                self._malformed.append({"text": text, "reason": reason, "code": code})
                return []

    def _add(self, cls: type[_Item], text: str, logprobs: list[Fields] | None = None) -> list[Fields]:
        events = [] if isinstance(self._open, cls) else self._start(cls)
        assert self._open is not None
        return events + self._located(self._open.delta(text, logprobs or []))

    def _start(self, cls: type[_Item], origin: Origin | None = None) -> list[Fields]:
        events = self._close("completed")
        self._open = cls(self._call, self._head.id, len(self._items), origin)
        self._items.append(self._open)
        added = {"type": "response.output_item.added", "output_index": self._open.index}
        return [*events, {**added, "item": self._open.fields()}, *self._located(self._open.opening())]

    def _close(self, status: str) -> list[Fields]:
        item, self._open = self._open, None
        if item is None:
            return []
        item.status = status
        if status == "incomplete" and isinstance(item, _Call):
            return []  # a client acts on a finished call; half a one must not look like it
        done = {"type": "response.output_item.done", "output_index": item.index, "item": item.fields()}
        return [*self._located(item.closing(), item), done]

    def _located(self, events: list[Fields], item: _Item | None = None) -> list[Fields]:
        """`events` with the item that they are about."""
        item = item or self._open
        assert item is not None
        return [{**event, "item_id": item.id, "output_index": item.index} for event in events]


def response_usage(run: ChatRun) -> Fields:
    """Token counts of a finished run."""
    usage = run.usage
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": usage.prompt_tokens - usage.cached_tokens,  # what is computed is kept
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _error_code(failure: Failure) -> str:
    """The code, among those that the API has for responses."""
    if failure.code == "context_length_exceeded":
        return failure.code  # not among them, but what clients look for
    return {400: "invalid_prompt", 429: "rate_limit_exceeded"}.get(failure.status, "server_error")


# --- items as they grow ---------------------------------------------------------------------------


class _Item(ABC):
    """One output item. `opening` follows upon its addition, `closing` precedes its end."""

    kind = ""

    def __init__(self, call: ResponsesCall, response_id: str, index: int, _origin: Origin | None) -> None:
        self.id = item_id(self.kind, response_id, index)
        self.index = index
        self.status = "in_progress"
        self._sealed = call.sealed
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """What it says so far."""
        return "".join(self._pieces)

    def fields(self) -> Fields:
        """The item as it is now."""
        return {"id": self.id, "type": self.kind, "status": self.status}

    def opening(self) -> list[Fields]:
        return []

    @abstractmethod
    def delta(self, text: str, logprobs: list[Fields]) -> list[Fields]:
        """The events that more of its text makes."""

    def closing(self) -> list[Fields]:
        return []


class _Parted(_Item):
    """An item with content: one part, in which its text is."""

    events = ""  # the beginning of their names

    @abstractmethod
    def part(self) -> Fields:
        """The part as it is now."""

    def logprobs(self) -> Fields:
        """Of all of the text; in an object that is empty where the part has none."""
        return {}

    def opening(self) -> list[Fields]:
        return [{"type": "response.content_part.added", "content_index": 0, "part": self.part()}]

    def delta(self, text: str, logprobs: list[Fields]) -> list[Fields]:
        self._pieces.append(text)
        return [{"type": f"{self.events}.delta", "content_index": 0, "delta": text}]

    def closing(self) -> list[Fields]:
        done = {"type": f"{self.events}.done", "content_index": 0, "text": self.text, **self.logprobs()}
        return [done, {"type": "response.content_part.done", "content_index": 0, "part": self.part()}]


class _Reasoning(_Parted):
    kind = "reasoning"
    events = "response.reasoning_text"

    def fields(self) -> Fields:
        content = [self.part()] if self._pieces else []
        fields = {**super().fields(), "summary": [], "content": content}
        if self._sealed and self.status != "in_progress":
            fields["encrypted_content"] = seal(self.text)
        return fields

    def part(self) -> Fields:
        return {"type": "reasoning_text", "text": self.text}


class _Text(_Parted):
    kind = "message"
    events = "response.output_text"

    def __init__(self, call: ResponsesCall, response_id: str, index: int, origin: Origin | None) -> None:
        super().__init__(call, response_id, index, origin)
        self._logprobs: list[Fields] = []

    def fields(self) -> Fields:
        content = [self.part()] if self._pieces else []
        return {**super().fields(), "role": "assistant", "content": content}

    def part(self) -> Fields:
        return {"type": "output_text", "text": self.text, "annotations": [], **self.logprobs()}

    def logprobs(self) -> Fields:
        return {"logprobs": list(self._logprobs)}

    def delta(self, text: str, logprobs: list[Fields]) -> list[Fields]:
        self._logprobs += logprobs
        return [{**event, "logprobs": logprobs} for event in super().delta(text, logprobs)]


class _Call(_Item):
    """A call. A custom tool's text lies in JSON, and so comes out in one piece when that is complete."""

    def __init__(self, call: ResponsesCall, response_id: str, index: int, origin: Origin | None) -> None:
        assert origin is not None
        self._origin = origin
        self.kind = "custom_tool_call" if origin.custom else "function_call"
        super().__init__(call, response_id, index, origin)
        self._call_id = call_id(response_id, index)

    def fields(self) -> Fields:
        fields = {**super().fields(), "call_id": self._call_id, "name": self._origin.name}
        if self._origin.namespace is not None:
            fields["namespace"] = self._origin.namespace
        if self._origin.custom:
            return {**fields, "input": custom_input(self.text) if self._pieces else ""}
        return {**fields, "arguments": self.text}

    def delta(self, text: str, logprobs: list[Fields]) -> list[Fields]:
        self._pieces.append(text)
        if self._origin.custom:
            return []
        return [{"type": "response.function_call_arguments.delta", "delta": text}]

    def closing(self) -> list[Fields]:
        if not self._origin.custom:
            name = {"name": self._origin.name}
            return [{"type": "response.function_call_arguments.done", "arguments": self.text, **name}]
        text = custom_input(self.text)
        return [
            {"type": "response.custom_tool_call_input.delta", "delta": text},
            {"type": "response.custom_tool_call_input.done", "input": text},
        ]
