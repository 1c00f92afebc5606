"""The model card's two examples, as the card has them, with many seeds at temperature 1.0."""

from __future__ import annotations

import json
import re
from typing import Any

from k2hybrid.errors import ReplyError
from k2hybrid.mini_eval.client import Client, Said
from k2hybrid.mini_eval.conversation import DEFAULT_SYSTEM
from k2hybrid.mini_eval.marking import same_value

_SYSTEM: dict[str, Any] = {"role": "system", "content": DEFAULT_SYSTEM}
_DECIMALS = "which one is bigger, 9.11 or 9.9? think carefully."
_WEATHER = "What's the weather like in Beijing today? Use the tool to check."
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Retrieve current weather information. "
        "Call this when the user asks about the weather.",
        "parameters": {
            "type": "object",
            "required": ["city"],
            "properties": {"city": {"type": "string", "description": "Name of the city"}},
        },
    },
}
_MAX_TOKENS = 4096  # the card's; its second example has no limit, which a program that counts must have
_MAX_ROUNDS = 5

# The ways of calling one of the two the bigger one.
_CLAIMS = (
    r"(9\.\d+) is (?:the )?(?:bigger|larger|greater)",
    r"(?:bigger|larger|greater)(?: \w+)? is (9\.\d+)",
    r"(9\.\d+) ?> ?9",
)


def decimals(client: Client, seed: int) -> tuple[bool, str]:
    """(right, what was said) for one seed of the first example."""
    question: dict[str, Any] = {"role": "user", "content": [{"type": "text", "text": _DECIMALS}]}
    try:
        said = client.chat(
            [_SYSTEM, question], (), temperature=1.0, max_tokens=_MAX_TOKENS, seed=seed
        ).content
    except ReplyError as error:
        return False, str(error)
    return bigger_is_right(said), said


def weather(client: Client, seed: int) -> tuple[bool, str]:
    """(right, what was called and said) for one seed of the second example, a tool loop."""
    messages: list[dict[str, Any]] = [_SYSTEM, {"role": "user", "content": _WEATHER}]
    calls: list[Said] = []
    options = {"temperature": 1.0, "tool_choice": "auto", "max_tokens": _MAX_TOKENS, "seed": seed}
    said = "(calls without end)"
    try:
        for _ in range(_MAX_ROUNDS):
            reply = client.chat(messages, (_TOOL,), **options)
            calls += reply.calls
            if reply.finish_reason != "tool_calls":
                said = reply.content
                break
            messages.append(reply.message)
            for call in reply.message["tool_calls"]:
                result = {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"]}
                messages.append({**result, "content": json.dumps({"weather": "Sunny"})})
    except ReplyError as error:
        return False, str(error)
    asked = [call.name == "get_weather" and same_value(call.arguments, {"city": "Beijing"}) for call in calls]
    return bool(asked) and all(asked) and "sunny" in said.lower(), f"{calls} {said}"


def bigger_is_right(answer: str) -> bool:
    """Whether `answer` calls 9.9 the bigger one, and nothing else."""
    plain = answer.replace("*", "")
    claimed = {number for claim in _CLAIMS for number in re.findall(claim, plain, re.IGNORECASE)}
    return bool(claimed) and claimed <= {"9.9", "9.90"}
