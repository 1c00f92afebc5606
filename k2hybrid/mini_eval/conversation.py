"""Conversations as values: what the built-in model is taught and what it is asked.

A conversation is a list of finished turns and a last one. Of the last turn everything the assistant says is
known, so the same value serves as a lesson (all of it is rendered) and as a question (it is played turn by
turn against a server, which must say the same calls and use the same results).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

DEFAULT_SYSTEM = "You are Kimi, an AI assistant created by Moonshot AI."

Kind = Literal["none", "one", "parallel", "sequential"]


@dataclass(frozen=True)
class Call:
    """One tool call with its result as the tool's text."""

    name: str
    arguments: dict[str, Any]
    result: str

    @property
    def arguments_json(self) -> str:
        """The arguments as the model writes them."""
        return json.dumps(self.arguments, ensure_ascii=False)


@dataclass(frozen=True)
class Step:
    """One assistant message that calls tools: its reasoning and one or more parallel calls."""

    think: str
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Turn:
    """What the user says, the steps of calls that follow (none, one, or more in sequence), and the answer."""

    user: str
    answer: str
    think: str = ""
    steps: tuple[Step, ...] = ()
    # Texts that a right answer must hold: what the results said. Empty where the answer is free.
    told: tuple[str, ...] = ()

    @property
    def calls(self) -> list[Call]:
        """All calls of the turn in order."""
        return [call for step in self.steps for call in step.calls]

    @property
    def kind(self) -> Kind:
        """none; one call; parallel calls in one message; or messages of calls in sequence."""
        if not self.steps:
            return "none"
        if len(self.steps) > 1:
            return "sequential"
        return "one" if len(self.steps[0].calls) == 1 else "parallel"


@dataclass(frozen=True)
class Conversation:
    """Turns under a system prompt (None: the template's default) and declared tools (in OpenAI's form)."""

    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...] = ()
    system: str | None = None
    # What the last turn is about, for the report: value types of its arguments, and how it was made.
    types: frozenset[str] = field(default_factory=frozenset)
    topic: str = ""

    @property
    def last(self) -> Turn:
        """The turn that is learnt or asked."""
        return self.turns[-1]


def tools_json(tools: tuple[dict[str, Any], ...]) -> str:
    """The declaration as the chat template writes it: keys sorted at every depth, compact."""
    return json.dumps(list(tools), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
