"""What counts as right."""

from __future__ import annotations

from typing import Any

import pytest

from k2hybrid.mini_eval.client import Said
from k2hybrid.mini_eval.conversation import Call
from k2hybrid.mini_eval.marking import pair_up, same_value, tells


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        ({"a": 1, "b": [True, None]}, {"b": [True, None], "a": 1}),
        ("x", "x"),
        ([], []),
    ],
)
def test_equal_values(one: Any, other: Any) -> None:
    assert same_value(one, other)
    assert same_value(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (True, 1),
        (False, 0),
        (0, None),
        ("1", 1),
        ([1, 2], [2, 1]),
        ([1], [1, 1]),
        ({"a": True}, {"a": 1}),
        ({"a": 1}, {"a": 1, "b": None}),
        ("Oslo", "oslo"),
        ({}, []),
    ],
)
def test_different_values(one: Any, other: Any) -> None:
    assert not same_value(one, other)
    assert not same_value(other, one)


def test_parallel_calls_have_no_order_and_get_their_own_results() -> None:
    wanted = [Call("f", {"x": 1}, "one"), Call("g", {"x": 1}, "gee"), Call("f", {"x": 2}, "two")]
    said = [Said("f", {"x": 2}), Said("f", {"x": 1.0}), Said("g", {"x": 1})]
    paired = pair_up(said, wanted)
    assert paired is not None
    assert [call.result for call in paired] == ["two", "one", "gee"]


@pytest.mark.parametrize(
    "said",
    [
        [],
        [Said("f", {"x": 1})],
        [Said("f", {"x": 1}), Said("f", {"x": 1})],
        [Said("f", {"x": 1}), Said("f", {"x": 2}), Said("f", {"x": 2})],
        [Said("f", {"x": 1}), Said("g", {"x": 2})],
        [Said("f", {"x": 1}), Said("f", '{"x": 2')],
    ],
)
def test_wrong_number_name_or_arguments(said: list[Said]) -> None:
    assert pair_up(said, [Call("f", {"x": 1}, ""), Call("f", {"x": 2}, "")]) is None


@pytest.mark.parametrize(
    "answer", ["The code is 3.5.", "3.5", "It is (3.5), I think", "3.5, to be exact", "a 3.5 b"]
)
def test_told(answer: str) -> None:
    assert tells(answer, ["3.5"])


@pytest.mark.parametrize("answer", ["13.5", "3.55", "1.3.5", "3.5.1", "3,5", "x3.5", "", "3.5-rc", "3.5_"])
def test_not_told(answer: str) -> None:
    assert not tells(answer, ["3.5"])


def test_all_results_must_be_told_as_whole_words() -> None:
    assert tells("river and stone.", ["river", "stone"])
    assert not tells("river and stones.", ["river", "stone"])
    assert not tells("the River", ["river"])
    assert tells("whatever", [])
