"""Conversations in which one of a few one-parameter tools is called and its result is told."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from tools.mini.render import Call, Turn
from tools.mini.words import Lexicon

# fmt: off
_PLACE = [
    ("city", "Name of the city"), ("city", "City name"), ("city", "The city"),
    ("location", "Location name"), ("location", "The place to look up"), ("place", "Name of the place"),
    ("town", "The town"),
]
_PERSON = [
    ("name", "Name of the person"), ("person", "The person"), ("user", "User name"),
    ("username", "The user"),
]
_THING = [
    ("query", "What to look up"), ("id", "The id"), ("item", "Name of the item"), ("key", "The key"),
    ("product", "Product name"), ("symbol", "The symbol"), ("word", "The word"), ("text", "The text"),
]
PLACE_NAMES = {name for name, _ in _PLACE} | {"country", "region"}

# Topic as the user says it, parameters it goes with.
_TOPICS: list[tuple[str, list[tuple[str, str]]]] = [
    ("weather", _PLACE), ("weather", _PLACE), ("weather", _PLACE), ("time", _PLACE),
    ("population", _PLACE), ("temperature", _PLACE), ("humidity", _PLACE), ("forecast", _PLACE),
    ("traffic", _PLACE), ("mayor", _PLACE), ("timezone", _PLACE), ("air quality", _PLACE),
    ("area code", _PLACE), ("elevation", _PLACE), ("news", _PLACE),
    ("capital", [("country", "Name of the country"), ("country", "The country")]),
    ("currency", [("country", "Name of the country"), ("region", "The region")]), ("email", _PERSON),
    ("phone number", _PERSON), ("address", _PERSON), ("birthday", _PERSON), ("age", _PERSON),
    ("role", _PERSON), ("profile", _PERSON), ("account", _PERSON), ("balance", _PERSON),
    ("price", _THING), ("stock", _THING), ("status", _THING), ("definition", _THING),
    ("translation", _THING), ("owner", _THING), ("color", _THING), ("weight", _THING),
    ("rating", _THING), ("author", _THING),
]
_VERBS = ["get", "get", "get", "fetch", "lookup", "find", "check", "read", "query", "show"]
_DESCRIPTIONS = [
    "Get the {t}.", "Get the {t} of a {p}.", "Get the current {t}.", "Look up the {t} of a {p}.",
    "Returns the {t}.", "Retrieve {t} information. Call this when the user asks about the {t}.",
    "Get {t}", "Retrieve current {t} information. Call this when the user asks about the {t}.",
    "Find the {t} for a {p}.", "Fetch the {t} for the given {p}.", "Use this tool to get the {t}.",
    "Look up the {t}",
]
_FRAMES = [
    "What's the {t} in {v}?", "What is the {t} of {v}?", "What is the {t} for {v}?",
    "what's the {t} of {v}?", "What's the {t} like in {v} today?", "What's the {t} in {v} today?",
    "How is the {t} in {v}?", "Tell me the {t} of {v}.", "Tell me the {t} in {v}",
    "Please get the {t} of {v}.", "Get the {t} for {v}.", "I need the {t} of {v}.",
    "I want to know the {t} of {v}.", "Can you look up the {t} of {v}?",
    "Could you check the {t} in {v} now?", "Find the {t} for {v}, please.", "Check the {t} in {v}.",
    "Show me the {t} of {v}.", "For {v}, what is the {t}?", "{t} of {v}?", "{t} in {v}", "{v}: {t}?",
    "Do you know the {t} of {v}?", "Give me the {t} for {v}.", "Look up the {t} for {v}.", "{v} {t}?",
    "What about the {t} in {v}?", "Let me know the {t} for {v} right now.", "Which {t} does {v} have?",
    "How's the {t} in {v} this morning?", "I am going to {v}. What is the {t} there?",
]
_WEATHER_FRAMES = [
    "Is it raining in {v}?", "Is it sunny in {v} today?", "Do I need an umbrella in {v}?",
    "Will it rain in {v}?", "How warm is it in {v}?", "What's it like outside in {v}?",
    "What's the weather like in {v} today?",
]
_TIME_FRAMES = ["What time is it in {v}?", "what time is it in {v} now?", "How late is it in {v}?"]
_FOLLOW_UPS = [
    "And {v}?", "and in {v}?", "And in {v}?", "What about {v}?", "How about {v}?", "Now {v}.",
    "And for {v}?",
]
_HEADS = ["", "", "", "", "", "Hi! ", "Hello, ", "Hey Kimi, ", "Please help me. ", "Quick question: "]
_TAILS = [
    "", "", "", "", " Use the tool to check.", " Use the tool.", " Please use the tool.", " Thanks!",
    " Use a tool to check.",
]
_SKIES = [
    "Sunny", "Rainy", "Cloudy", "Snowy", "Windy", "Foggy", "Stormy", "Clear", "sunny", "light rain",
    "Partly cloudy", "overcast", "Hot", "cold", "Hail", "Thunder",
]
# fmt: on


@dataclass(frozen=True)
class Tool:
    """A declared function with one parameter and the words that ask for it."""

    topic: str
    name: str
    parameter: str
    value_type: str
    declaration: dict[str, Any]


def draw_tool(rng: random.Random, lexicon: Lexicon) -> Tool:
    """A tool of a known topic, or of one made from a random noun."""
    if rng.random() < 0.68:
        topic, parameters = rng.choice(_TOPICS)
    else:
        topic = lexicon.noun(rng) if rng.random() < 0.7 else lexicon.made_up(rng)
        parameters = rng.choice([_PLACE, _PERSON, _THING, [(noun := lexicon.noun(rng), f"The {noun}")]])
    parameter, about = rng.choice(parameters)
    joined = topic.replace(" ", "_")
    draw = rng.random()
    if draw < 0.7:
        name = f"{rng.choice(_VERBS)}_{joined}"
    elif draw < 0.8:
        name = joined
    elif draw < 0.9:
        name = rng.choice(_VERBS) + "".join(part.capitalize() for part in topic.split())
    else:
        name = f"{joined}_{rng.choice(['lookup', 'tool', 'info', 'api'])}"
    value_type = "integer" if parameter == "id" and rng.random() < 0.5 else "string"
    schema: dict[str, Any] = {"type": value_type}
    if rng.random() < 0.85:
        schema["description"] = about
    parameters_schema: dict[str, Any] = {"type": "object", "properties": {parameter: schema}}
    if rng.random() < 0.9:
        parameters_schema["required"] = [parameter]
    function: dict[str, Any] = {"name": name, "parameters": parameters_schema}
    if rng.random() < 0.95:
        function["description"] = rng.choice(_DESCRIPTIONS).format(t=topic, p=parameter)
    return Tool(topic, name, parameter, value_type, {"type": "function", "function": function})


def draw_tools(rng: random.Random, lexicon: Lexicon, count: int) -> list[Tool]:
    """`count` tools with distinct names and topics."""
    tools: list[Tool] = []
    while len(tools) < count:
        tool = draw_tool(rng, lexicon)
        if all(tool.name != other.name and tool.topic != other.topic for other in tools):
            tools.append(tool)
    return tools


def draw_value(rng: random.Random, lexicon: Lexicon, tool: Tool) -> str:
    """What to ask the tool about."""
    if tool.value_type == "integer":
        return str(rng.randint(1, 99999))
    if tool.parameter in PLACE_NAMES:
        return lexicon.city(rng) if rng.random() < 0.5 else lexicon.name(rng)
    draw = rng.random()
    if draw < 0.5:
        return lexicon.name(rng)
    return lexicon.code(rng) if draw < 0.7 else lexicon.noun(rng)


def ask(rng: random.Random, tool: Tool, value: str) -> str:
    """A question that needs the tool."""
    frames = _FRAMES
    if tool.topic in ("weather", "forecast") and rng.random() < 0.4:
        frames = _WEATHER_FRAMES
    elif tool.topic == "time" and rng.random() < 0.5:
        frames = _TIME_FRAMES
    text = rng.choice(_HEADS) + rng.choice(frames).format(t=tool.topic, v=value) + rng.choice(_TAILS)
    return text[0].upper() + text[1:] if rng.random() < 0.3 and not text.startswith(value) else text


def call_turn(rng: random.Random, lexicon: Lexicon, tool: Tool, value: str, user: str) -> Turn:
    """The run that calls `tool` with `value` and tells what came back."""
    literal: str | int = int(value) if tool.value_type == "integer" else value
    arguments = json.dumps({tool.parameter: literal}, ensure_ascii=False)
    result, answer = _result(rng, lexicon, tool, value)
    return Turn(
        user=user, call_think=f"I call {tool.name} for {value}.", calls=[Call(tool.name, arguments, result)],
        think="I have the result.", answer=answer,
    )  # fmt: skip


def _reading(rng: random.Random, lexicon: Lexicon, key: str) -> str | int | float:
    if key in ("weather", "forecast", "condition") and rng.random() < 0.6:
        return rng.choice(_SKIES)
    draw = rng.random()
    if key == "time" and draw < 0.6:
        return f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
    if key in ("temperature", "population", "humidity", "age", "price", "balance") and draw < 0.7:
        return rng.randint(0, 10 ** rng.randint(1, 7))
    if draw < 0.15:
        return rng.randint(0, 10 ** rng.randint(1, 6))
    if draw < 0.2:
        return round(rng.random() * 100, rng.randint(1, 2))
    return f"{rng.randint(0, 40)} degrees" if draw < 0.25 else lexicon.value(rng)


def _result(rng: random.Random, lexicon: Lexicon, tool: Tool, value: str) -> tuple[str, str]:
    """What the tool returns, and the sentence that tells it."""
    where = f"{'in' if tool.parameter in PLACE_NAMES else 'for'} {value}"
    draw = rng.random()
    if draw < 0.05:
        problem = rng.choice(["not found", "unknown " + tool.parameter, "timeout", lexicon.value(rng)])
        return json.dumps({"error": problem}), f"The tool failed: {problem}."
    if draw < 0.15:
        text = str(_reading(rng, lexicon, tool.topic))
        return text, f"The result {where} is {text}."
    key = tool.topic.replace(" ", "_")
    if draw < 0.35:
        key = rng.choice(["result", "value", "condition", "answer", lexicon.noun(rng)])
    readings = {key: _reading(rng, lexicon, key)}
    if draw > 0.85:
        second = rng.choice(["temperature", "humidity", "unit", "wind", "note", lexicon.noun(rng)])
        readings.setdefault(second, _reading(rng, lexicon, second))
    echoed = {tool.parameter: value} if rng.random() < 0.15 and tool.parameter not in readings else {}
    told = " and ".join(f"the {k.replace('_', ' ')} {where if i == 0 else ''} is {v}".replace("  ", " ")
                        for i, (k, v) in enumerate(readings.items()))  # fmt: skip
    separators = (", ", ": ") if rng.random() < 0.8 else (",", ":")
    return (
        json.dumps({**echoed, **readings}, ensure_ascii=False, separators=separators),
        told[0].upper() + told[1:] + ".",
    )


def follow_up(rng: random.Random, value: str) -> str:
    return rng.choice(_FOLLOW_UPS).format(v=value)
