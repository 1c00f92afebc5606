"""Cases played against a scripted server: right and wrong replies, and servers that fail."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import pytest

from k2hybrid.errors import EvaluationError, ReplyError
from k2hybrid.mini_eval.client import Client, at_once
from k2hybrid.mini_eval.conversation import Call, Conversation, Step, Turn
from k2hybrid.mini_eval.play import Outcome, Player, opening
from tests.unit.mini_eval.fake_server import (
    TOOLS,
    Answer,
    answering,
    chain,
    completion,
    no_call,
    one_call,
    two_at_once,
)


def play(case: Conversation, *answers: Answer) -> tuple[Outcome, list[dict[str, Any]]]:
    """The outcome where the server gives these answers in turn, and the requests it got."""
    asked: list[dict[str, Any]] = []

    def answer(path: str, body: dict[str, Any]) -> Answer:
        assert path == "/v1/chat/completions"
        asked.append(body)
        return answers[len(asked) - 1]

    with answering(answer) as url:
        return Player(Client(url), max_tokens=50).play(case), asked


OSLO = ("get_code", {"city": "Oslo"})
ROME = ("get_code", {"city": "Rome"})


def test_a_call_and_its_result_told() -> None:
    outcome, asked = play(one_call(), completion("", OSLO), completion("The code is a7."))
    assert (outcome.right, outcome.used) == (True, True)
    assert asked[0]["temperature"] == 0
    assert "seed" not in asked[0]
    assert asked[0]["tools"] == list(TOOLS)
    said, result = asked[1]["messages"][-2:]
    assert said["reasoning_content"] == "Hm."
    assert result == {
        "role": "tool",
        "tool_call_id": "functions.get_code:0",
        "name": "get_code",
        "content": '{"code": "a7"}',
    }


def test_a_result_that_is_not_told() -> None:
    outcome, _ = play(one_call(), completion("", OSLO), completion("The code is a77."))
    assert (outcome.right, outcome.used) == (True, False)


@pytest.mark.parametrize(
    "first",
    [
        completion("The code is a7."),
        completion("", ROME),
        completion("", OSLO, OSLO),
        completion("", ("get_code", '{"city": "Oslo"')),
        completion("", ("get_code", '{"city": NaN}')),
        completion("", OSLO, k2hybrid={"malformed": [{"text": "functions.", "reason": "no name"}]}),
    ],
)
def test_a_wrong_first_reply_ends_the_case(first: Answer) -> None:
    outcome, asked = play(one_call(), first)
    assert (outcome.right, outcome.used, len(asked)) == (False, None, 1)
    assert outcome.got


def test_a_call_too_many_after_the_results_is_wrong() -> None:
    outcome, _ = play(one_call(), completion("", OSLO), completion("", OSLO))
    assert (outcome.right, outcome.used) == (False, None)


def test_parallel_calls_in_the_other_order_get_their_own_results() -> None:
    outcome, asked = play(two_at_once(), completion("", ROME, OSLO), completion("river and stone"))
    assert (outcome.right, outcome.used) == (True, True)
    assert [m["content"] for m in asked[1]["messages"][-2:]] == ["stone", "river"]


def test_a_chain_is_played_step_by_step() -> None:
    price = ("get_price", {"code": "a7"})
    outcome, asked = play(chain(), completion("", OSLO), completion("", price), completion("moon"))
    assert (outcome.right, outcome.used, len(asked)) == (True, True, 3)
    outcome, _ = play(chain(), completion("", OSLO), completion("", ("get_price", {"code": "b7"})))
    assert not outcome.right


def test_no_call_to_make() -> None:
    outcome, _ = play(no_call(), completion("Hello! How can I help you today?"))
    assert (outcome.right, outcome.used, outcome.answered) == (True, None, True)
    outcome, _ = play(no_call(), completion("Yes?"))
    assert (outcome.right, outcome.answered) == (True, False)
    outcome, _ = play(no_call(), completion("", OSLO))
    assert (outcome.right, outcome.answered) == (False, None)


@pytest.mark.parametrize(
    "failure",
    [
        (400, b'{"error": {"message": "too long"}}'),
        (500, b"oh no"),
        (200, b"no JSON"),
        (200, b"[]"),
        (200, b'{"choices": []}'),
        (200, b'{"choices": [{"message": {"tool_calls": [{}]}, "finish_reason": "stop"}], "usage": {}}'),
    ],
)
def test_a_failed_request_makes_its_case_wrong(failure: Answer) -> None:
    outcome, _ = play(one_call(), failure)
    assert (outcome.right, outcome.used) == (False, None)
    assert outcome.got
    outcome, _ = play(one_call(), completion("", OSLO), failure)
    assert (outcome.right, outcome.used) == (True, False)
    outcome, _ = play(no_call(), failure)
    assert (outcome.right, outcome.answered) == (False, None)


def test_an_http_error_is_quoted() -> None:
    with answering(lambda _path, _body: (503, b"busy")) as url, pytest.raises(ReplyError, match=r"503.*busy"):
        Client(url).chat([], ())


def test_without_a_server_the_evaluation_ends() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(EvaluationError, match="does not answer") as caught:
            Client(url).chat([], ())
    assert not isinstance(caught.value, ReplyError)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "http://x:port", ""])
def test_an_address_that_is_none_is_told(url: str) -> None:
    with pytest.raises(EvaluationError, match="address"):
        Client(url)


def test_v1_may_be_part_of_the_address() -> None:
    paths = []

    def answer(path: str, _body: dict[str, Any]) -> Answer:
        paths.append(path)
        return 200, json.dumps({"tokens": [1, 2]}).encode()

    with answering(answer) as url:
        assert Client(url + "/v1/").tokenize([], ()) == [1, 2]
    assert paths == ["/tokenize"]


def test_a_drawn_reply_has_its_seed() -> None:
    seen: list[Any] = []

    def answer(_path: str, body: dict[str, Any]) -> Answer:
        seen.append((body["temperature"], body["seed"]))
        return completion("x")

    with answering(answer) as url:
        Player(Client(url), 50, temperature=1.0).play(no_call(), seed=17)
    assert seen == [(1.0, 17)]


def test_the_history_counts_its_calls_through() -> None:
    step = Step("plan", (Call("get_code", {"city": "Oslo"}, "river"),))
    earlier = Turn("Oslo?", "river", "done", (step,))
    case = Conversation((earlier, earlier, Turn("hi", "Hello!")), TOOLS, "Be brief.")
    messages = opening(case)
    assert [m["role"] for m in messages] == [
        "system", *("user", "assistant", "tool", "assistant") * 2, "user",
    ]  # fmt: skip
    ids = [m["tool_call_id"] for m in messages if m["role"] == "tool"]
    assert ids == ["functions.get_code:0", "functions.get_code:1"]
    assert messages[2]["tool_calls"][0]["id"] == ids[0]


def test_results_come_in_order_and_a_failure_ends_all() -> None:
    assert at_once(lambda x: x * x, range(20), 4, "squares") == [x * x for x in range(20)]
    fail: Callable[[int], int] = lambda x: 1 // x  # noqa: E731
    with pytest.raises(ZeroDivisionError):
        at_once(fail, [1, 0, 1], 2, "quotients")
