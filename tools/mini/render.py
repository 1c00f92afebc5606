"""Conversations to token ids, with what the model must learn to say and where it can be looked up.

The rendering is that of the chat template in the checkpoint folder; a test holds the two together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from k2hybrid.mini_eval.conversation import Call, Conversation, Step, Turn
from tools.mini.declared import NOTHING, Declared, head_text
from tools.mini.pieces import Example, Piece, Place, assemble
from tools.mini.thoughts import call_line, walk_line

ASSISTANT = "<|im_assistant|>assistant<|im_middle|>"


def prompt_text(conversation: Conversation, *, steps: int = 0) -> str:
    """The prompt of the last turn, with its first `steps` steps of calls made and answered."""
    pieces = Speaker(None, conversation).pieces(steps=steps)
    return head_text(conversation) + "".join(piece.text for piece in pieces)


def encode(conversation: Conversation, declared: Declared) -> Example:
    """What follows the head. Of the last turn all that the assistant says is learnt; history is read only."""
    return assemble(Speaker(declared, conversation).pieces(steps=None), declared)


class Speaker:
    """A conversation in pieces. Without a `declared` head the pieces say nothing of their sources."""

    def __init__(self, declared: Declared | None, conversation: Conversation) -> None:
        self.declared = declared
        self.conversation = conversation
        self.made = 0

    def pieces(self, steps: int | None) -> list[Piece]:
        """All after the head; `steps` None renders the last turn's answer too."""
        pieces: list[Piece] = []
        for turn in self.conversation.turns[:-1]:
            pieces += self._turn(turn, last=False, steps=None)
        pieces += self._turn(self.conversation.last, last=True, steps=steps)
        return pieces

    def _turn(self, turn: Turn, *, last: bool, steps: int | None) -> Iterator[Piece]:
        yield Piece("<|im_user|>user<|im_middle|>")
        yield Piece(turn.user, opens="user")
        yield Piece("<|im_end|>")
        for step in turn.steps[:steps]:
            yield Piece(ASSISTANT)
            yield Piece("<think>", last, opens="think")
            if last:
                yield from self._think(step.think, turn.user, step.calls)
            yield Piece("</think>", last)
            yield from self._calls(step, last)
        yield Piece(ASSISTANT)
        if steps is None:
            yield Piece("<think>", last, opens="think")
            if last:
                yield from self._think(turn.think, turn.user, ())
            yield Piece("</think>", last)
            yield from self._answer(turn, last)
            yield Piece("<|im_end|>", last)

    # ---- calls ---------------------------------------------------------------------------------------------

    def _calls(self, step: Step, last: bool) -> Iterator[Piece]:
        results = ""
        yield Piece("<|tool_calls_section_begin|>", last)
        for index, call in enumerate(step.calls):
            line = (f"line {index}",)
            call_id = f"functions.{call.name}:{self.made}"
            self.made += 1
            yield Piece("<|tool_call_begin|>functions.", last)
            yield Piece(call.name, last, Place(line, "call ") if last else None)
            yield Piece(f":{self.made - 1}<|tool_call_argument_begin|>", last)
            yield from self._arguments(call, last, line)
            yield Piece("<|tool_call_end|>", last)
            results += f"<|im_system|>{call.name}<|im_middle|>## Return of {call_id}\n{call.result}<|im_end|>"
        yield Piece("<|tool_calls_section_end|><|im_end|>", last)
        yield Piece(results, opens="results")

    def _arguments(self, call: Call, last: bool, line: tuple[str, ...]) -> Iterator[Piece]:
        if not last:
            yield Piece(call.arguments_json)
            return
        yield Piece("{", True)
        for at, (name, value) in enumerate(call.arguments.items()):
            yield Piece(', "' if at else '"', True)
            yield Piece(name, True, Place(line, "", ":yes "))
            yield Piece('": ', True)
            yield Piece(json.dumps(value, ensure_ascii=False), True, Place(line, " "))
        yield Piece("}", True)

    def _answer(self, turn: Turn, last: bool) -> Iterator[Piece]:
        if not last or not turn.told:
            yield from self._untold(turn.answer, turn.user) if last else (Piece(turn.answer),)
            return
        at = 0
        for told in turn.told:
            whole = re.compile(rf"(?<!\w){re.escape(told)}(?!\w)").search(turn.answer, at)
            if whole is None:
                continue
            found = whole.start()
            yield from _leading(turn.answer[at:found])
            yield Piece(told, True, Place(("results", "user")))
            at = found + len(told)
        yield Piece(turn.answer[at:], True)

    @staticmethod
    def _untold(answer: str, user: str) -> Iterator[Piece]:
        """An answer that repeats the user, or numbers of theirs, or nothing."""
        if answer in user:
            yield Piece(answer, True, Place(("user",)))
            return
        for text in re.split(r"(\d+)", answer):
            known = text.isdigit() and re.search(rf"\b{text}\b", user)
            yield Piece(text, True, Place(("user",)) if known else None)

    # ---- thinking ------------------------------------------------------------------------------------------

    def _think(self, text: str, user: str, calls: tuple[Call, ...]) -> Iterator[Piece]:
        if self.declared is None:
            yield Piece(text, True)
            return
        current: int | None = NOTHING
        lines = 0
        for at, line in enumerate(text.split("\n")):
            if at:
                yield Piece("\n", True)
            current, before = None, current
            walked = re.fullmatch(r"(\S+):(no|yes \1)", line)
            if walked and walked[1] in self.declared.names:
                yield from walk_line(self.declared, walked[1], walked[2] != "no", user, before)
                current = self.declared.ends[walked[1], None]
            elif line.startswith("call "):
                name = line.split(";")[0].removeprefix("call ")
                arguments = calls[lines].arguments if lines < len(calls) else {}
                yield from call_line(self.declared, name, arguments, lines, user, before)
                lines += 1
            elif line.startswith("then "):
                yield Piece("then ", True)
                yield Piece(line[5:], True, Place(("think",), ":yes "))
            else:
                yield Piece(line, True, current=before)


def _leading(text: str) -> Iterator[Piece]:
    """What leads to a told value, as `The color for Oslo is `: a key of the result, a word of the user."""
    split = re.fullmatch(r"(.*\b[Tt]he )([\w ]+?)(?:( for )(.+))?( is )", text)
    if split is None:
        yield Piece(text, True)
        return
    opening, key, of, about, end = split.groups()
    yield Piece(opening, True)
    for at, word in enumerate(key.split(" ")):
        if at:
            yield Piece(" ", True)
        yield Piece(word, True, Place(("results",)))
    if of:
        yield Piece(of, True)
        yield Piece(about, True, Place(("user",)))
    yield Piece(end, True)
