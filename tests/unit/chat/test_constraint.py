"""The constraint as a machine: phases, budgets, calls, ends in time, under tokens chosen by chance."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from k2hybrid.chat.constraint import Allowed, CallableTool, Constraint, Phase, Rules
from k2hybrid.chat.exchanges import Answer, gather
from k2hybrid.chat.grammar import Grammars
from k2hybrid.chat.markers import Markers
from k2hybrid.chat.stream import ChatStream
from k2hybrid.chat.tokenizer import Tokenizer
from k2hybrid.config import MINI_MODEL
from k2hybrid.types import Malformed, ToolCallStart

TEXT = {"type": "string"}
SCHEMAS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {"city": TEXT, "unit": {"enum": ["c", "f"]}},
        "required": ["city"],
    },
    "list-files": {"type": "object", "properties": {"path": TEXT, "depth": {"type": "integer"}}},
    "now": {"type": "object", "properties": {}},
    "deep.one": {
        "type": "object",
        "properties": {
            "rows": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "properties": {"q": TEXT, "w": {"type": "number"}},
                    "required": ["q", "w"],
                },
            },
            "tag": {"type": "string", "pattern": "^[a-z]{2,5}$"},
        },
        "required": ["rows"],
    },
}
ODD = {"type": "object", "properties": {"x": {"type": "array", "items": TEXT, "uniqueItems": True}}}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(Tokenizer.load(Path(MINI_MODEL)))


@pytest.fixture(scope="module")
def markers(grammars: Grammars) -> Markers:
    return Markers.from_specials(grammars.tokenizer.specials)


def callable_tools(grammars: Grammars, *names: str) -> tuple[CallableTool, ...]:
    return tuple(CallableTool(name, grammars.of_schema(SCHEMAS[name])) for name in names or SCHEMAS)


def constraint_of(grammars: Grammars, markers: Markers, rules: Rules) -> Constraint:
    return Constraint(rules, grammars, markers, grammars.tokenizer.stop_ids)


def candidates(allowed: Allowed, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """All allowed tokens, and how many of them, at the end, are specials."""
    plain: Sequence[int] = ()
    if allowed.bits is not None:
        bits = np.unpackbits(np.frombuffer(allowed.bits, np.uint8), bitorder="little")
        plain = np.flatnonzero(bits[: tokenizer.num_ranks]).tolist()
    elif allowed.text:
        plain = range(tokenizer.num_ranks)
    return [*plain, *allowed.specials], len(allowed.specials)


def play(constraint: Constraint, rules: Rules, tokenizer: Tokenizer, rng: random.Random) -> list[int]:
    """An answer of tokens chosen by chance, as the engine would have it."""
    out: list[int] = []
    while len(out) < rules.max_tokens:
        tokens, specials = candidates(constraint.allowed(), tokenizer)
        assert tokens
        marker = specials and rng.random() < 0.05
        token = rng.choice(tokens[-specials:] if marker else tokens)
        for taken in constraint.accept(token):
            out.append(taken)
            if len(out) == rules.max_tokens or taken in tokenizer.stop_ids:
                return out
        if constraint.paused:
            constraint.resume()
    return out


def read(grammars: Grammars, markers: Markers, ids: Sequence[int], rules: Rules) -> tuple[Answer, list[Any]]:
    stream = ChatStream(
        markers,
        grammars.tokenizer,
        tools=[{"function": {"name": name, "parameters": SCHEMAS[name]}} for name in SCHEMAS],
        first_call_index=rules.first_call_index,
        in_reasoning=rules.phase is Phase.REASONING,
    )
    events = [event for token in ids for event in stream.push(token)]
    events += stream.finish()
    return gather(events), events


def test_answers_by_chance_are_well_formed(grammars: Grammars, markers: Markers) -> None:
    ended = calls = 0
    runs = 300
    for seed in range(runs):
        rng = random.Random(seed)
        rules = Rules(
            max_tokens=rng.choice([64, 150, 400]),
            thinking_budget=rng.choice([0, 5, 20]),
            phase=rng.choice([Phase.START, Phase.REASONING, Phase.CONTENT]),
            tools=callable_tools(grammars),
            required=rng.random() < 0.7,
            parallel=rng.random() < 0.5,
            first_call_index=rng.choice([0, 9, 99]),
        )
        ids = play(constraint_of(grammars, markers, rules), rules, grammars.tokenizer, rng)
        answer, events = read(grammars, markers, ids, rules)
        assert not [event for event in events if isinstance(event, Malformed)], seed
        for name, arguments in answer.calls:
            jsonschema.validate(json.loads(arguments), SCHEMAS[name])
        starts = [event.id for event in events if isinstance(event, ToolCallStart)]
        expected = [
            f"functions.{name}:{rules.first_call_index + i}" for i, (name, _) in enumerate(answer.calls)
        ]
        assert starts == expected
        if not rules.parallel:
            assert len(answer.calls) <= 1
        if rules.required:
            assert answer.calls, seed
        if answer.calls:
            assert ids[-1] == markers.im_end  # whatever was begun was closed before the last token
        ended += ids[-1] in grammars.tokenizer.stop_ids
        calls += len(answer.calls)
    assert calls > runs // 2
    assert ended > runs // 2


def test_without_tools_no_call_can_begin(grammars: Grammars, markers: Markers) -> None:
    rules = Rules(max_tokens=100, thinking_budget=50)
    constraint = constraint_of(grammars, markers, rules)
    forbidden = {
        markers.section_begin, markers.section_end, markers.call_begin, markers.argument_begin,
        markers.call_end, markers.im_user, markers.im_system, markers.im_middle, markers.im_assistant,
    }  # fmt: skip
    for token in (None, markers.think_begin, 70, markers.think_end, 70):
        if token is not None:
            constraint.accept(token)
        assert not forbidden & set(constraint.allowed().specials)


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_reasoning_ends_at_its_budget(grammars: Grammars, markers: Markers, budget: int) -> None:
    rules = Rules(max_tokens=100, thinking_budget=budget)
    constraint = constraint_of(grammars, markers, rules)
    letter = grammars.tokenizer.encode("a")[0]
    taken = constraint.accept(markers.think_begin)
    for _ in range(budget):
        assert taken[-1] != markers.think_end
        taken = constraint.accept(letter)
    assert taken[-1] == markers.think_end
    assert constraint.allowed().text


def test_reasoning_does_not_end_within_a_character(grammars: Grammars, markers: Markers) -> None:
    tokenizer = grammars.tokenizer
    pieces = tokenizer.encode("\U0001f600")
    assert len(pieces) > 2
    constraint = constraint_of(grammars, markers, Rules(max_tokens=100, thinking_budget=1))
    constraint.accept(markers.think_begin)
    for piece in pieces[:-1]:
        assert constraint.accept(piece) == [piece]
    assert constraint.accept(pieces[-1]) == [pieces[-1], markers.think_end]
    stuck = constraint_of(grammars, markers, Rules(max_tokens=100, thinking_budget=0, phase=Phase.REASONING))
    lead = tokenizer.encode("\U0001f600")[0]
    taken: list[int] = []
    for _ in range(6):
        if markers.think_end in taken:
            break
        taken = stuck.accept(lead)
    assert markers.think_end in taken


def test_an_open_reasoning_does_not_stop(grammars: Grammars, markers: Markers) -> None:
    rules = Rules(max_tokens=100, thinking_budget=50, phase=Phase.REASONING)
    assert not set(constraint_of(grammars, markers, rules).allowed().specials) & grammars.tokenizer.stop_ids


def test_what_is_determined_is_appended_at_once(grammars: Grammars, markers: Markers) -> None:
    tokenizer = grammars.tokenizer
    rules = Rules(
        max_tokens=100, thinking_budget=10, required=True, parallel=False, first_call_index=4,
        tools=callable_tools(grammars, "now"),
    )  # fmt: skip
    constraint = constraint_of(grammars, markers, rules)
    constraint.accept(markers.think_begin)
    taken = constraint.accept(markers.think_end)
    header = [markers.section_begin, markers.call_begin, *tokenizer.encode("functions.now:4")]
    assert taken == [markers.think_end, *header, markers.argument_begin, *tokenizer.encode("{")]
    rest = constraint.accept(tokenizer.encode("}")[0])
    assert rest == [*tokenizer.encode("}"), markers.call_end, markers.section_end, markers.im_end]


def test_a_named_tool_is_the_only_one(grammars: Grammars, markers: Markers) -> None:
    rules = Rules(
        max_tokens=200, thinking_budget=0, required=True, tools=callable_tools(grammars, "get_weather")
    )
    for seed in range(10):
        ids = play(constraint_of(grammars, markers, rules), rules, grammars.tokenizer, random.Random(seed))
        assert {name for name, _ in read(grammars, markers, ids, rules)[0].calls} == {"get_weather"}


def test_no_call_begins_that_cannot_be_finished(grammars: Grammars, markers: Markers) -> None:
    tools = callable_tools(grammars)
    for room in range(1, 40):
        rules = Rules(max_tokens=room, thinking_budget=0, phase=Phase.CONTENT, tools=tools)
        for seed in range(5):
            rng = random.Random(seed)
            ids = play(constraint_of(grammars, markers, rules), rules, grammars.tokenizer, rng)
            if markers.section_begin in ids:
                assert ids[-1] == markers.im_end


def test_content_under_a_schema(grammars: Grammars, markers: Markers) -> None:
    schema = SCHEMAS["deep.one"]
    content = grammars.of_schema(schema)
    for seed in range(40):
        rng = random.Random(seed)
        rules = Rules(max_tokens=rng.choice([60, 300]), thinking_budget=5, content=content)
        ids = play(constraint_of(grammars, markers, rules), rules, grammars.tokenizer, rng)
        answer, events = read(grammars, markers, ids, rules)
        assert not any(isinstance(event, Malformed) for event in events)
        jsonschema.validate(json.loads(answer.content), schema)
        assert ids[-1] == markers.im_end


def test_content_under_a_schema_or_calls(grammars: Grammars, markers: Markers) -> None:
    content = grammars.of_schema({"type": "object"})
    rules = Rules(max_tokens=200, thinking_budget=5, content=content, tools=callable_tools(grammars))
    constraint = constraint_of(grammars, markers, rules)
    allowed = constraint.allowed()
    assert markers.section_begin in allowed.specials
    assert allowed.bits is not None
    brace = grammars.tokenizer.encode("{")[0]
    constraint.accept(brace)
    assert not constraint.allowed().specials  # it is JSON now
    called = 0
    for seed in range(30):
        ids = play(constraint_of(grammars, markers, rules), rules, grammars.tokenizer, random.Random(seed))
        answer, _ = read(grammars, markers, ids, rules)
        called += bool(answer.calls)
        if not answer.calls:
            assert isinstance(json.loads(answer.content), dict)
    assert 0 < called < 30


def test_an_inexact_call_pauses_and_can_be_rewound(grammars: Grammars, markers: Markers) -> None:
    tokenizer = grammars.tokenizer
    odd = CallableTool("odd", grammars.of_schema(ODD))
    assert not odd.arguments.exact
    rules = Rules(max_tokens=300, thinking_budget=0, phase=Phase.CONTENT, tools=(odd,), first_call_index=2)
    constraint = constraint_of(grammars, markers, rules)
    out = constraint.accept(markers.section_begin)
    at = out.index(markers.call_begin) + 1
    text = tokenizer.encode('{"x":["a","a"]}')
    while not constraint.paused:
        tokens, _ = candidates(constraint.allowed(), tokenizer)
        written = out[out.index(markers.argument_begin) + 1 :]
        token = text[len(written)] if len(written) < len(text) else markers.call_end
        assert token in tokens
        out += constraint.accept(token)
    assert out[-1] == markers.call_end
    constraint.rewind(at)
    assert not constraint.paused
    again = candidates(constraint.allowed(), tokenizer)[0]
    assert again == [tokenizer.encode("functions.odd:2")[0]]  # the same call once more
    out = out[:at]
    rng = random.Random(0)
    while not constraint.paused:
        out += constraint.accept(rng.choice(candidates(constraint.allowed(), tokenizer)[0]))
    constraint.resume()
    assert markers.section_end in constraint.allowed().specials
    answer, _ = read(grammars, markers, [*out, markers.section_end, markers.im_end], rules)
    assert [name for name, _ in answer.calls] == ["odd"]


def test_the_least_room_still_ends_calls_of_all_lengths(grammars: Grammars, markers: Markers) -> None:
    long = {
        "type": "object",
        "properties": {f"a_long_name_{i}": {"type": "string", "minLength": 10} for i in range(8)},
        "required": [f"a_long_name_{i}" for i in range(8)],
    }
    tools = (*callable_tools(grammars, "now"), CallableTool("long", grammars.of_schema(long)))
    base = Rules(max_tokens=0, thinking_budget=0, phase=Phase.CONTENT, tools=tools, required=True)
    for room in range(20, 400, 9):
        rules = replace(base, max_tokens=room)
        rng = random.Random(room)
        ids = play(constraint_of(grammars, markers, rules), rules, grammars.tokenizer, rng)
        if markers.section_begin in ids:
            assert ids[-1] == markers.im_end, room


def test_a_constant_longer_than_the_answer_is_cut_at_its_end(grammars: Grammars, markers: Markers) -> None:
    long = {"type": "object", "properties": {"x": {"const": "ab" * 4000}}, "required": ["x"]}
    tools = (CallableTool("long", grammars.of_schema(long)),)
    rules = Rules(max_tokens=60, thinking_budget=0, phase=Phase.CONTENT, tools=tools)
    constraint = constraint_of(grammars, markers, rules)
    assert len(constraint.accept(markers.section_begin)) <= 60


def test_required_calls_come_before_any_json(grammars: Grammars, markers: Markers) -> None:
    content = grammars.of_schema({"type": "object"})
    rules = Rules(
        max_tokens=300, thinking_budget=2, content=content, tools=callable_tools(grammars), required=True
    )
    for seed in range(10):
        ids = play(constraint_of(grammars, markers, rules), rules, grammars.tokenizer, random.Random(seed))
        answer, _ = read(grammars, markers, ids, rules)
        assert answer.calls
        assert not answer.content


def test_endings_that_take_long_to_find_do_not_hold_up_the_others(
    grammars: Grammars, markers: Markers
) -> None:
    costly = {
        "type": "object",
        "properties": {"x": {"type": "string", "minLength": 3000}},
        "required": ["x"],
    }
    tools = (CallableTool("costly", grammars.of_schema(costly)),)
    rules = Rules(max_tokens=400, thinking_budget=0, phase=Phase.CONTENT, tools=tools, required=True)
    searches = 0
    closer = grammars.closer
    original = closer.shortest_end

    def counted(*args: Any, **options: Any) -> list[int] | None:
        nonlocal searches
        searches += 1
        assert options.get("seconds", 0.0) <= 5e-3  # without: as a grammar is compiled
        return original(*args, **options)

    closer.shortest_end = counted  # type: ignore[method-assign]
    try:
        play(constraint_of(grammars, markers, rules), rules, grammars.tokenizer, random.Random(1))
    finally:
        closer.shortest_end = original  # type: ignore[method-assign]
    assert searches <= rules.max_tokens
