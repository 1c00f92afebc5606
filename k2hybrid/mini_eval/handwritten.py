"""The hand-written set: tools and prompts in other people's style, never used for training."""

from __future__ import annotations

import json
from importlib import resources

from k2hybrid.mini_eval.conversation import Call, Conversation, Step, Turn


def load() -> list[Conversation]:
    """Its cases: one question each, whose calls (if any) are one step."""
    text = resources.files(__package__).joinpath("handwritten.json").read_text(encoding="utf-8")
    cases = []
    for entry in json.loads(text):
        calls = tuple(Call(call["name"], call["arguments"], "") for call in entry["calls"])
        turn = Turn(entry["user"], "", steps=(Step("", calls),) if calls else ())
        cases.append(Conversation((turn,), tuple(entry["tools"]), entry["system"], topic=entry["style"]))
    return cases
