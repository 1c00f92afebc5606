"""The control tokens that structure a conversation, by id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from k2hybrid.errors import TokenizerError

_SPELLINGS = {
    "im_end": "<|im_end|>",
    "im_user": "<|im_user|>",
    "im_assistant": "<|im_assistant|>",
    "im_system": "<|im_system|>",
    "im_middle": "<|im_middle|>",
    "section_begin": "<|tool_calls_section_begin|>",
    "section_end": "<|tool_calls_section_end|>",
    "call_begin": "<|tool_call_begin|>",
    "argument_begin": "<|tool_call_argument_begin|>",
    "call_end": "<|tool_call_end|>",
    "think_begin": "<think>",
    "think_end": "</think>",
}


@dataclass(frozen=True, slots=True)
class Markers:
    """Ids of the twelve control tokens that templates write and the stream machine reads."""

    im_end: int
    im_user: int
    im_assistant: int
    im_system: int
    im_middle: int
    section_begin: int
    section_end: int
    call_begin: int
    argument_begin: int
    call_end: int
    think_begin: int
    think_end: int

    @classmethod
    def from_specials(cls, specials: Mapping[str, int]) -> Markers:
        """Look the ids up by spelling. Raises TokenizerError naming every one that is missing."""
        missing = [_SPELLINGS[f.name] for f in fields(cls) if _SPELLINGS[f.name] not in specials]
        if missing:
            raise TokenizerError(f"tokenizer_config.json names no {', '.join(missing)}")
        return cls(**{f.name: specials[_SPELLINGS[f.name]] for f in fields(cls)})
