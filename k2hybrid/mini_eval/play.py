"""Plays a case against the server: the history as a client would send it, then the last turn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from k2hybrid.errors import ReplyError
from k2hybrid.mini_eval.client import Client, Reply, Said
from k2hybrid.mini_eval.conversation import Call, Conversation, Step
from k2hybrid.mini_eval.marking import pair_up, tells

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """How a case went.

    `right`: all calls, and no other, were made. `used`: the answer tells the results; None where there were
    none to tell or the calls were wrong. `answered`: where no call was to be made, the answer is the one that
    was taught. `calls` are those of the first reply, `got` is what to show of a miss.
    """

    case: Conversation
    right: bool
    used: bool | None = None
    answered: bool | None = None
    calls: tuple[Said, ...] = ()
    got: str = ""


class Player:
    """Asks a server. At temperature 0 there is nothing to draw and the seed is not sent."""

    def __init__(self, client: Client, max_tokens: int, temperature: float = 0.0) -> None:
        self._client = client
        self._options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
        self._drawn = temperature > 0

    def play(self, case: Conversation, seed: int = 0) -> Outcome:
        """The whole last turn, results given where the calls were right, up to the answer."""
        messages = opening(case)
        calls: tuple[Said, ...] = ()
        told = False  # whether all results have been given
        try:
            for step in case.last.steps:
                reply = self._ask(messages, case, seed)
                calls = calls or tuple(reply.calls)
                paired = pair_up(reply.calls, step.calls)
                if paired is None:
                    return Outcome(case, False, calls=calls, got=_shown(reply))
                messages += [reply.message, *_results(reply, paired)]
            told = bool(case.last.steps)
            reply = self._ask(messages, case, seed)
        except ReplyError as error:
            return Outcome(case, told, used=False if told else None, calls=calls, got=str(error))
        return _judge(case, reply, calls or tuple(reply.calls))

    def first_calls(self, case: Conversation, seed: int = 0) -> Outcome:
        """Only the first reply's calls, against the first step's."""
        try:
            reply = self._ask(opening(case), case, seed)
        except ReplyError as error:
            return Outcome(case, False, got=str(error))
        wanted = case.last.steps[0].calls if case.last.steps else ()
        right = pair_up(reply.calls, wanted) is not None
        return Outcome(case, right, calls=tuple(reply.calls), got=_shown(reply))

    def _ask(self, messages: Messages, case: Conversation, seed: int) -> Reply:
        options = {**self._options, "seed": seed} if self._drawn else self._options
        return self._client.chat(messages, case.tools, **options)


def _judge(case: Conversation, reply: Reply, calls: tuple[Said, ...]) -> Outcome:
    """The last reply: a call in it is one too many."""
    turn, said = case.last, reply.content.strip()
    if reply.calls:
        return Outcome(case, False, calls=calls, got=_shown(reply))
    if turn.steps:
        return Outcome(case, True, used=tells(said, turn.told), calls=calls, got=_shown(reply))
    exact = tells(said, turn.told) if turn.told else said == turn.answer
    return Outcome(case, True, answered=exact, calls=calls, got=_shown(reply))


def opening(case: Conversation) -> Messages:
    """All messages before the first reply to the last turn."""
    messages: Messages = []
    if case.system is not None:
        messages.append({"role": "system", "content": case.system})
    made = 0
    for turn in case.turns[:-1]:
        messages.append({"role": "user", "content": turn.user})
        for step in turn.steps:
            messages += _made(step, made)
            made += len(step.calls)
        messages.append({"role": "assistant", "content": turn.answer, "reasoning_content": turn.think})
    messages.append({"role": "user", "content": case.last.user})
    return messages


def _made(step: Step, made: int) -> Messages:
    """A finished step of the history; ids count the calls of the conversation."""
    calls: Messages = []
    results: Messages = []
    for index, call in enumerate(step.calls, made):
        call_id = f"functions.{call.name}:{index}"
        function = {"name": call.name, "arguments": call.arguments_json}
        calls.append({"id": call_id, "type": "function", "function": function})
        results.append(_result(call_id, call))
    said = {"role": "assistant", "content": "", "reasoning_content": step.think, "tool_calls": calls}
    return [said, *results]


def _results(reply: Reply, paired: Sequence[Call]) -> Messages:
    return [_result(made["id"], call) for made, call in zip(reply.message["tool_calls"], paired, strict=True)]


def _result(call_id: str, call: Call) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "name": call.name, "content": call.result}


def _shown(reply: Reply) -> str:
    calls = " ".join(show_call(call) for call in reply.calls)
    return " ".join(filter(None, (reply.content, calls))) or f"(nothing; {reply.finish_reason})"


def show_call(call: Said | Call) -> str:
    """`name {"argument": …}`."""
    return f"{call.name} {json.dumps(call.arguments, ensure_ascii=False)}"


def wanted(case: Conversation) -> str:
    """What a right reply would have been, for people."""
    calls = ", then ".join(" and ".join(map(show_call, step.calls)) for step in case.last.steps)
    if not calls:
        return f"no call; {case.last.answer}" if case.last.answer else "no call"
    return f"{calls}; then the answer tells {', '.join(case.last.told)}" if case.last.told else calls
