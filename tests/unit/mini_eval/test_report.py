"""Bars, verdicts, the exit status, and the command around them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from k2hybrid.cli import main
from k2hybrid.mini_eval import card
from k2hybrid.mini_eval.card import bigger_is_right
from k2hybrid.mini_eval.client import Client
from k2hybrid.mini_eval.report import Row, passed, print_report, write_json
from tests.unit.mini_eval.fake_server import Answer, answering, completion


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (Row("p", "c", 100, 90, 0.9), "met"),
        (Row("p", "c", 100, 89, 0.9), "MISSED"),
        (Row("p", "c", 30, 24, 0.8), "met"),
        (Row("p", "c", 29, 0, 0.8), "too few cases"),
        (Row("p", "c", 0, 0, 0.8), "too few cases"),
        (Row("p", "c", 100, 0), ""),
        (Row("p", "c", 50, 50, 1.0), "met"),
        (Row("p", "c", 50, 49, 1.0), "MISSED"),
    ],
)
def test_verdicts(row: Row, verdict: str) -> None:
    assert row.verdict == verdict
    assert passed([row]) is (verdict != "MISSED")


def test_the_report_in_text_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Row("greedy", "all", 100, 90, 0.9), Row("greedy", "one call", 40, 10, 0.8), Row("x", "y", 0, 0)]
    print_report({"seed": 3, "machine": {"cores": "2"}}, rows, ["transformers: NOT CHECKED"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["seed: 3", "machine: cores 2"]
    assert "greedy  all         100     90  90.0 %  >= 90 %  met" in lines
    assert "greedy  one call     40     10  25.0 %  >= 80 %  MISSED" in lines
    assert "transformers: NOT CHECKED" in lines
    assert lines[-1] == "MISSED: greedy: one call"
    write_json(tmp_path / "new" / "r.json", {"seed": 3}, rows, [])
    written = json.loads((tmp_path / "new" / "r.json").read_text())
    assert written["conditions"] == {"seed": 3}
    assert written["rows"][1] == {
        "part": "greedy", "cell": "one call", "n": 40, "right": 10, "share": 0.25, "bar": 0.8,
        "verdict": "MISSED",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("9.9 is bigger.", True),
        ("**9.9** is larger than 9.11.", True),
        ("The bigger one is 9.9.", True),
        ("9.11 is bigger.", False),
        ("9.9 is bigger. No: 9.11 is bigger.", False),
        ("9.9", False),
        ("", False),
    ],
)
def test_which_is_bigger(answer: str, right: bool) -> None:
    assert bigger_is_right(answer) is right


BEIJING = ("get_weather", {"city": "Beijing"})


@pytest.mark.parametrize(
    ("answers", "right"),
    [
        ([completion("", BEIJING), completion("It is Sunny.")], True),
        ([completion("", BEIJING), completion("I do not know.")], False),
        ([completion("", ("get_weather", {"city": "Paris"})), completion("It is Sunny.")], False),
        ([completion("It is Sunny.")], False),
        ([completion("", BEIJING)] * 5, False),
        ([completion("", BEIJING), (500, b"")], False),
    ],
)
def test_the_weather_example(answers: list[Answer], right: bool) -> None:
    asked: list[dict[str, Any]] = []

    def answer(_path: str, body: dict[str, Any]) -> Answer:
        asked.append(body)
        return answers[len(asked) - 1]

    with answering(answer) as url:
        assert card.weather(Client(url), seed=4)[0] is right
    assert all(body["seed"] == 4 and body["temperature"] == 1.0 for body in asked)


def model_of_few_words(_path: str, body: dict[str, Any]) -> Answer:
    """Right on the card's examples, and never calls another tool."""
    last = body["messages"][-1]
    if last["role"] == "tool":
        return completion("It is Sunny.")
    return completion("", BEIJING) if "Beijing" in str(last["content"]) else completion("9.9 is bigger.")


def test_the_command_asks_a_server_and_ends_by_its_bars(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.json"
    with answering(model_of_few_words) as url:
        asks = ["mini-eval", "--url", url, "--json", str(path)]
        assert main([*asks, "--only", "card", "--card-seeds", "30"]) == 0
        rows = json.loads(path.read_text())["rows"]
        assert [(row["n"], row["right"], row["verdict"]) for row in rows] == [(30, 30, "met")] * 2
        # 85 hand-written cases are enough to judge, and nearly all of them need a call.
        assert main([*asks, "--only", "handwritten,controls", "--n", "10", "--show", "1"]) == 1
        assert main([*asks, "--only", "cases,sampled,transformers", "--n", "20"]) == 0
    result = json.loads(path.read_text())
    shares = {(row["part"], row["cell"]): row["share"] for row in result["rows"]}
    assert shares["temperature 0", "no call"] == shares["temperature 1.0", "no call"] == 1
    assert shares["temperature 0", "one call"] == 0
    assert "NOT CHECKED" in result["notes"][0]
    assert "expected: " in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--n", "0"], ["--only", "all"], ["--sed", "1"], ["--n", "x"]])
def test_wrong_options(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["mini-eval", *argv])
    assert caught.value.code == 2


def test_no_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mini-eval", "--url", "nowhere"]) == 1
    assert capsys.readouterr().err.startswith("k2hybrid mini-eval: 'nowhere' is no address")
