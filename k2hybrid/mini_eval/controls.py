"""Controls of what a call depends on: not on the order of the tools, but on names and descriptions."""

from __future__ import annotations

import random
from copy import deepcopy
from dataclasses import replace
from typing import Any

from k2hybrid.mini_eval.author import Author
from k2hybrid.mini_eval.conversation import Call, Conversation, Step


def shuffle_cases(author: Author, seed: int, count: int) -> list[tuple[Conversation, Conversation]]:
    """One-call cases, each as drawn and with its tools in another order."""
    pairs = []
    for i in range(count):
        rng = random.Random(f"shuffle {seed} {i}")
        case = _one_call(author, rng)
        tools = list(case.tools)
        while tools == list(case.tools):
            rng.shuffle(tools)
        pairs.append((case, replace(case, tools=tuple(tools))))
    return pairs


def swap_cases(author: Author, seed: int, count: int) -> list[tuple[Conversation, Conversation]]:
    """One-call cases, each as drawn and with name and description of two tools exchanged."""
    pairs = []
    for i in range(count):
        rng = random.Random(f"swap {seed} {i}")
        swapped = None
        while swapped is None:
            case = _one_call(author, rng)
            swapped = swap(case)
        pairs.append((case, swapped))
    return pairs


def swap(case: Conversation) -> Conversation | None:
    """The called tool and another exchange name and description; parameters stay where they are.

    The call must follow: the same name and value, under the parameter that now stands with the name. None
    where that is not defined: the called tool and some other must each take one required text, under
    different names, and earlier turns may not show another use of them.
    """
    (call,) = case.last.calls
    functions = [tool["function"] for tool in case.tools]
    at = next(i for i, function in enumerate(functions) if function["name"] == call.name)
    mine = _only_text(functions[at])
    if mine is None or set(call.arguments) != {mine} or len(case.turns) > 1:
        return None
    texts = {i: _only_text(function) for i, function in enumerate(functions)}
    other = next((i for i, name in texts.items() if name not in (None, mine)), None)
    if other is None:
        return None
    tools = [deepcopy(tool) for tool in case.tools]
    for key in ("name", "description"):
        one, two = tools[at]["function"].pop(key, None), tools[other]["function"].pop(key, None)
        tools[at]["function"] |= {} if two is None else {key: two}
        tools[other]["function"] |= {} if one is None else {key: one}
    moved = Call(call.name, {str(texts[other]): call.arguments[mine]}, call.result)
    last = replace(case.last, steps=(Step(case.last.steps[0].think, (moved,)),))
    return replace(case, turns=(last,), tools=tuple(tools))


def _only_text(function: dict[str, Any]) -> str | None:
    """The one required parameter, if it takes any text; None otherwise."""
    schema = function["parameters"]
    required = schema.get("required", ())
    if len(required) != 1:
        return None
    (name,) = required
    free = schema["properties"][name]
    return name if free["type"] == "string" and not {"enum", "format"} & free.keys() else None


def _one_call(author: Author, rng: random.Random) -> Conversation:
    while True:
        case = author.with_tools(rng, author.toolset(rng, rng.randint(2, 8)), author.system(rng), "one")
        if case.last.kind == "one":
            return case
