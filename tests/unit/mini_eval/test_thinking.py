"""What is thought before a call: enough for the call to be a copy of it."""

from __future__ import annotations

import json
import random
import re

from k2hybrid.mini_eval import thinking
from k2hybrid.mini_eval.author import Author
from k2hybrid.mini_eval.conversation import Call, Conversation
from k2hybrid.mini_eval.toolbox import Parameter, Tool
from k2hybrid.mini_eval.words import Lexicon, kept_words


def tool(name: str, **properties: str) -> Tool:
    """A tool whose properties have these types."""
    parameters = tuple(Parameter(p, "", "word", p) for p in properties)
    schema = {"type": "object", "properties": {p: {"type": t} for p, t in properties.items()}}
    return Tool(
        name, name, parameters, (), {"type": "function", "function": {"name": name, "parameters": schema}}
    )


def conversations(count: int) -> list[Conversation]:
    author, rng = Author(Lexicon(kept_words(), "test")), random.Random(5)
    return [author.with_tools(rng, author.toolset(rng), author.system(rng)) for _ in range(count)]


def test_the_walk_names_every_tool_and_those_that_serve_twice() -> None:
    time, weather = tool("get_time"), tool("get_weather")
    assert thinking.walk([time, weather], [weather]) == "get_time:no\nget_weather:yes get_weather"


def test_a_call_line_has_the_parameters_in_the_order_of_the_declaration() -> None:
    weather = tool("get_weather", unit="string", city="string", days="integer")
    line = thinking.call_line(weather, {"unit": "C", "days": 3})
    assert line == 'call get_weather;city:no;days:yes integer 3 days;unit:yes string "C" unit;'


def test_what_is_thought_holds_every_call() -> None:
    for conversation in conversations(200):
        names = [declared["function"]["name"] for declared in conversation.tools]
        for at, step in enumerate(conversation.last.steps):
            lines = step.think.split("\n")
            if at == 0:
                assert [line.partition(":")[0] for line in lines[: len(names)]] == names
            called = [line for line in lines if line.startswith("call ")]
            assert len(called) == len(step.calls)
            for line, call in zip(called, step.calls, strict=True):
                assert line.startswith(f"call {call.name};")
                assert all(told_in(line, call, name) for name in call.arguments), line


def told_in(line: str, call: Call, name: str) -> bool:
    value = json.dumps(call.arguments[name], ensure_ascii=False)
    return re.search(rf";{name}:yes [a-z]+ {re.escape(value)} {name};", line) is not None


def test_without_a_call_no_tool_serves_unless_a_value_is_missing() -> None:
    idle = [c for c in conversations(200) if c.last.kind == "none"]
    assert idle
    for conversation in idle:
        serving = conversation.last.think.count(":yes ")
        assert serving == conversation.last.answer.startswith("Please tell me the ")
