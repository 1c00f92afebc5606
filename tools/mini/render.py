"""Conversations to token ids with a mask of what the model must learn to say.

The rendering is that of the chat template in the checkpoint folder; a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

import tiktoken

from k2hybrid.mini_eval.conversation import DEFAULT_SYSTEM, Conversation, Turn, tools_json

ASSISTANT = "<|im_assistant|>assistant<|im_middle|>"


@dataclass
class Example:
    """Token ids and, for each, whether predicting it is part of the loss."""

    ids: list[int]
    learn: list[bool]


def head_text(conversation: Conversation) -> str:
    """What conversations with the same tools and system prompt share."""
    head = ""
    if conversation.tools:
        head += f"<|im_system|>tool_declare<|im_middle|>{tools_json(conversation.tools)}<|im_end|>"
    system = DEFAULT_SYSTEM if conversation.system is None else conversation.system
    return head + f"<|im_system|>system<|im_middle|>{system}<|im_end|>"


def prompt_text(conversation: Conversation, *, steps: int = 0) -> str:
    """The prompt of the last turn, with its first `steps` steps of calls made and answered."""
    pieces = _pieces(conversation, steps=steps)
    return head_text(conversation) + "".join(text for text, _ in pieces)


def encode(conversation: Conversation, encoding: tiktoken.Encoding) -> Example:
    """What follows the head. Of the last turn all that the assistant says is learnt; history is read only."""
    ids: list[int] = []
    learn: list[bool] = []
    for text, learnt in _pieces(conversation, steps=None):
        piece = encoding.encode(text, allowed_special="all")
        ids += piece
        learn += [learnt] * len(piece)
    return Example(ids, learn)


def encode_head(conversation: Conversation, encoding: tiktoken.Encoding) -> list[int]:
    """Ids of `head_text`."""
    return encoding.encode(head_text(conversation), allowed_special="all")


def _pieces(conversation: Conversation, steps: int | None) -> list[tuple[str, bool]]:
    """Rendered pieces with what is learnt; `steps` None renders the last turn's answer too."""
    pieces: list[tuple[str, bool]] = []
    made = 0
    for turn in conversation.turns[:-1]:
        made = _turn(turn, pieces, made, last=False, steps=None)
    _turn(conversation.last, pieces, made, last=True, steps=steps)
    return pieces


def _turn(turn: Turn, pieces: list[tuple[str, bool]], made: int, *, last: bool, steps: int | None) -> int:
    pieces.append((f"<|im_user|>user<|im_middle|>{turn.user}<|im_end|>", False))
    for step in turn.steps[:steps]:
        pieces.append((ASSISTANT, False))
        pieces.append((f"<think>{step.think if last else ''}</think>", last))
        calls, results = "", ""
        for call in step.calls:
            call_id = f"functions.{call.name}:{made}"
            made += 1
            calls += f"<|tool_call_begin|>{call_id}<|tool_call_argument_begin|>"
            calls += f"{call.arguments_json}<|tool_call_end|>"
            results += f"<|im_system|>{call.name}<|im_middle|>## Return of {call_id}\n{call.result}<|im_end|>"
        said = f"<|tool_calls_section_begin|>{calls}<|tool_calls_section_end|><|im_end|>"
        pieces.append((said, last))
        pieces.append((results, False))
    pieces.append((ASSISTANT, False))
    if steps is None:
        pieces.append((f"<think>{turn.think if last else ''}</think>{turn.answer}<|im_end|>", last))
    return made
