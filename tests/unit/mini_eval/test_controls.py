"""Baseline, shuffled tools, swapped names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from k2hybrid.mini_eval import baseline, controls
from k2hybrid.mini_eval.cases import author_of
from k2hybrid.mini_eval.client import Said
from k2hybrid.mini_eval.conversation import Conversation, Turn
from tests.unit.mini_eval.fake_server import TEXT, chain, no_call, one_call, tool, two_at_once

AUTHOR = author_of(None)


@pytest.mark.parametrize(
    ("user", "schema", "value"),
    [
        ("Look up “big river” in Oslo.", TEXT, "big river"),
        ("Is it cold in New Haven today?", TEXT, "New Haven"),
        ("Track order TX-4411, please.", TEXT, "TX-4411"),
        ("Mail anna.b@river.org.", TEXT, "anna.b@river.org"),
        ("Define stone", TEXT, "stone"),
        ("Wait 15 minutes.", {"type": "integer"}, 15),
        ("Add 2.5 to it", {"type": "number"}, 2.5),
        ("Turn it off.", {"type": "boolean"}, True),
        ("In fahrenheit.", {"type": "string", "enum": ["celsius", "fahrenheit"]}, "fahrenheit"),
        ("Whatever", {"type": "string", "enum": ["celsius", "fahrenheit"]}, "celsius"),
        ("Average of 3, 4 and 5", {"type": "array", "items": {"type": "integer"}}, [3, 4, 5]),
    ],
)
def test_the_baseline_takes_the_first_literal(user: str, schema: dict[str, Any], value: Any) -> None:
    case = Conversation((Turn(user, ""),), (tool("f", x=schema), tool("g", y=schema)))
    assert baseline.predict(case) == [Said("f", {"x": value})]


def test_the_baseline_is_marked_like_the_model() -> None:
    assert baseline.is_right(one_call())
    assert not baseline.is_right(replace(one_call(), tools=one_call().tools[::-1]))
    assert not any(baseline.is_right(case) for case in (chain(), no_call(), two_at_once()))


def test_names_and_descriptions_are_swapped_and_the_call_follows() -> None:
    case = one_call()
    swapped = controls.swap(case)
    assert swapped is not None
    first, second = (entry["function"] for entry in swapped.tools)
    assert (first["name"], first["description"]) == ("get_price", "get_price!")
    assert (second["name"], second["description"]) == ("get_code", "get_code!")
    assert [list(f["parameters"]["properties"]) for f in (first, second)] == [["city"], ["code"]]
    (call,) = swapped.last.calls
    assert (call.name, call.arguments) == ("get_code", {"code": "Oslo"})
    assert case == one_call()


@pytest.mark.parametrize(
    "other",
    [
        tool("get_price", city=TEXT),
        tool("get_price", code={"type": "integer"}),
        tool("get_price", code={"type": "string", "enum": ["a"]}),
        tool("get_price", code=TEXT, more=TEXT),
        tool("get_price"),
    ],
)
def test_where_the_swap_is_not_defined_there_is_none(other: dict[str, Any]) -> None:
    assert controls.swap(replace(one_call(), tools=(one_call().tools[0], other))) is None


def test_earlier_turns_may_not_show_the_old_parameters() -> None:
    case = one_call()
    assert controls.swap(replace(case, turns=(case.last, case.last))) is None


def test_drawn_pairs() -> None:
    for before, after in controls.shuffle_cases(AUTHOR, seed=3, count=20):
        assert before.tools != after.tools
        names = [sorted(t["function"]["name"] for t in case.tools) for case in (before, after)]
        assert names[0] == names[1]
        assert before.turns == after.turns
    for before, after in controls.swap_cases(AUTHOR, seed=3, count=20):
        (old,), (new,) = before.last.calls, after.last.calls
        assert (old.name, list(old.arguments.values())) == (new.name, list(new.arguments.values()))
        assert list(old.arguments) != list(new.arguments)
        entry = next(t["function"] for t in after.tools if t["function"]["name"] == new.name)
        assert entry["parameters"]["required"] == list(new.arguments)


def test_the_same_seed_draws_the_same_pairs() -> None:
    assert controls.swap_cases(AUTHOR, 5, 4) == controls.swap_cases(AUTHOR, 5, 4)
    assert controls.swap_cases(AUTHOR, 5, 4) != controls.swap_cases(AUTHOR, 6, 4)
