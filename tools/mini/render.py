"""Conversations to token ids with a mask of what the model must learn to say.

The rendering is that of the chat template in the checkpoint folder; a test holds the two together.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import tiktoken

DEFAULT_SYSTEM = "You are Kimi, an AI assistant created by Moonshot AI."


@dataclass
class Call:
    """One tool call and its result text."""

    name: str
    arguments: str
    result: str


@dataclass
class Turn:
    """What the user says and the run of the assistant that answers it."""

    user: str
    answer: str
    think: str = ""
    call_think: str = ""
    calls: list[Call] = field(default_factory=list)


@dataclass
class Conversation:
    """A finished history of turns and a last one, which is what the model learns."""

    turns: list[Turn]
    tools: list[dict[str, Any]] = field(default_factory=list)
    system: str | None = None


@dataclass
class Example:
    """Token ids and, for each, whether predicting it is part of the loss."""

    ids: list[int]
    learn: list[bool]


def tools_json(tools: list[dict[str, Any]]) -> str:
    return json.dumps(tools, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def prompt_text(conversation: Conversation, *, last_calls: int = 0) -> str:
    """The prompt of the last turn, with its first `last_calls` calls made and answered."""
    return "".join(text for text, _ in _pieces(conversation, last_calls=last_calls))


def encode(conversation: Conversation, encoding: tiktoken.Encoding) -> Example:
    """The whole conversation; the last turn's words are learnt, everything before is read."""
    ids: list[int] = []
    learn: list[bool] = []
    for text, learnt in _pieces(conversation, last_calls=None):
        piece = encoding.encode(text, allowed_special="all")
        ids += piece
        learn += [learnt] * len(piece)
    return Example(ids, learn)


def _pieces(conversation: Conversation, last_calls: int | None) -> list[tuple[str, bool]]:
    """Rendered pieces, cut at control tokens; `last_calls` None renders the answer too."""
    head = ""
    if conversation.tools:
        head += f"<|im_system|>tool_declare<|im_middle|>{tools_json(conversation.tools)}<|im_end|>"
    system = DEFAULT_SYSTEM if conversation.system is None else conversation.system
    head += f"<|im_system|>system<|im_middle|>{system}<|im_end|>"
    pieces = [(head, False)]
    made = 0
    assistant = "<|im_assistant|>assistant<|im_middle|>"
    for position, turn in enumerate(conversation.turns):
        last = position == len(conversation.turns) - 1
        pieces.append((f"<|im_user|>user<|im_middle|>{turn.user}<|im_end|>", False))
        for index, call in enumerate(turn.calls):
            if last and last_calls is not None and index >= last_calls:
                break
            call_id = f"functions.{call.name}:{made}"
            made += 1
            think = turn.call_think if last else ""
            said = (
                f"<think>{think}</think><|tool_calls_section_begin|><|tool_call_begin|>{call_id}"
                f"<|tool_call_argument_begin|>{call.arguments}<|tool_call_end|><|tool_calls_section_end|><|im_end|>"
            )
            pieces += [
                (assistant, False),
                (said, last),
                (
                    f"<|im_system|>{call.name}<|im_middle|>## Return of {call_id}\n{call.result}<|im_end|>",
                    False,
                ),
            ]
        pieces.append((assistant, False))
        if last and last_calls is not None:
            return pieces
        think = turn.think if last else ""
        pieces.append((f"<think>{think}</think>{turn.answer}<|im_end|>", last))
    return pieces
