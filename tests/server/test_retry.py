"""A client that gave up and asks again gets the whole answer, of which only the rest is generated."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import orjson
import pytest

from k2hybrid.server.app import Settings
from k2hybrid.server.live import LiveRuns
from k2hybrid.server.retry import choice_key, retry_key
from k2hybrid.types import Content
from tests.server.conftest import Served, serving
from tests.server.scripted import Script, ScriptedModel, ScriptedRun, Step
from tests.server.test_disconnect import send_chat, wait_for_run
from tests.server.test_openai_stream import events

READ_S = 1.0  # of a client, which is shorter than its answer
USER = {"role": "user", "content": "hi"}
KEYS = ("key-one", "key-two")


def words(*texts: str, delay_s: float = 0.0) -> list[Step]:
    return [Step((Content(text),), delay_s=delay_s) for text in texts]


class Halting:
    """An answer that halts in its middle until `go`."""

    def __init__(self, text: str = "abcdefgh") -> None:
        self.text = text
        self.steps = words(*text)
        self.half = len(text) // 2
        self.steps[self.half].delay_s = 3600

    def script(self) -> Script:
        return Script(self.steps)

    def go(self) -> None:
        self.steps[self.half].delay_s = 0


CHAT, TEXT = "chat/completions", "completions"


def ask(
    server: Served, key: str = "any", read_s: float = 30, *, path: str = CHAT, **fields: Any
) -> httpx.Response:
    asked = {"messages": [USER]} if path == CHAT else {"prompt": "hi"}
    return httpx.post(
        f"{server.url}/v1/{path}",
        json={**asked, **fields},
        headers={"authorization": f"Bearer {key}"},
        timeout=httpx.Timeout(30, read=read_s),
    )


def give_up(server: Served, key: str = "any", **fields: Any) -> None:
    """Ask, at `path` if one is given, and go when nothing more comes for a while."""
    before = len(server.model.runs)
    with pytest.raises(httpx.ReadTimeout):
        ask(server, key, READ_S, **fields)
    for run in server.model.runs[before:]:
        assert run.cancelled.wait(10)


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200
    return texts_of(response)[0]


def texts_of(response: httpx.Response) -> list[str]:
    """Of every choice, whichever endpoint answered, streamed or not."""
    assert response.status_code == 200
    if response.headers["content-type"] == "application/json":
        choices = response.json()["choices"]
        return [
            str(choice["text"] if "text" in choice else choice["message"]["content"]) for choice in choices
        ]
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    texts: dict[int, str] = {}
    for (choice,) in (chunk["choices"] for chunk in chunks):
        text = choice["text"] if "text" in choice else choice["delta"].get("content", "")
        texts[choice["index"]] = texts.get(choice["index"], "") + text
    return [texts[i] for i in sorted(texts)]


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("stream", [True, False])
def test_a_retry_gets_the_whole_answer_and_costs_the_rest(server: Served, stream: bool, path: str) -> None:
    answer = Halting()
    server.model.play(answer.script())
    give_up(server, stream=stream, path=path)
    answer.go()
    response = ask(server, stream=stream, path=path)
    assert text_of(response) == answer.text
    assert [run.generated for run in server.model.runs] == [answer.half, len(answer.text) - answer.half]
    if not stream:
        assert response.json()["usage"]["completion_tokens"] == len(answer.text)
    (request, _) = server.model.requests or server.model.completions
    assert not server.model.parked[request.retry_key]


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("stream", [True, False])
def test_a_retry_may_give_up_too(server: Served, stream: bool, path: str) -> None:
    answer = Halting()
    server.model.play(answer.script())
    give_up(server, stream=stream, path=path)
    give_up(server, stream=stream, path=path)
    answer.go()
    assert text_of(ask(server, stream=stream, path=path)) == answer.text
    assert [run.generated for run in server.model.runs] == [answer.half, 0, len(answer.text) - answer.half]


def test_the_sdk_retries_by_itself_until_it_has_the_answer(server: Served) -> None:
    text = "abcdefghij" * 4
    server.model.play(Script(words(*text, delay_s=0.05)))
    client = server.openai(timeout=READ_S, max_retries=20)
    answer = client.chat.completions.create(model="m", messages=[USER])  # type: ignore[list-item]
    assert answer.choices[0].message.content == text
    assert len(server.model.runs) > 1
    assert sum(run.generated for run in server.model.runs) == len(text)


def test_the_sdk_asks_again_after_a_broken_stream(server: Served) -> None:
    answer = Halting()
    server.model.play(answer.script())
    client = server.openai(timeout=READ_S)

    def read() -> Iterator[str]:
        with client.chat.completions.create(model="m", messages=[USER], stream=True) as chunks:  # type: ignore[list-item]
            for chunk in chunks:
                yield chunk.choices[0].delta.content or ""

    got: list[str] = []
    with pytest.raises((openai.APITimeoutError, httpx.ReadTimeout)):  # by its version
        got.extend(read())
    assert server.model.runs[0].cancelled.wait(10)
    answer.go()
    assert "".join(read()) == answer.text
    assert sum(run.generated for run in server.model.runs) == len(answer.text)


def test_every_choice_is_taken_up_as_itself_a_finished_one_too(server: Served) -> None:
    first, second = Halting("abcdefgh"), "xyz"
    server.model.play(first.script(), Script(words(*second)))
    give_up(server, n=2)
    first.go()
    answer = ask(server, n=2).json()
    assert [choice["message"]["content"] for choice in answer["choices"]] == [first.text, second]
    assert [run.generated for run in server.model.runs] == [4, 3, 4, 0]
    keys = [request.retry_key for request in server.model.requests]
    assert keys[:2] == keys[2:]
    assert keys[0] != keys[1]


@pytest.mark.parametrize("stream", [True, False])
def test_every_choice_of_every_prompt_is_taken_up_as_itself(server: Served, stream: bool) -> None:
    halting = Halting("abcdefgh")
    others = ("xyz", "uvw", "rst")
    asked = {"path": TEXT, "prompt": ["one", "two"], "n": 2, "stream": stream}
    server.model.play(Script(words(*"xyz")), halting.script(), Script(words(*"uvw")), Script(words(*"rst")))
    give_up(server, **asked)
    halting.go()
    response = ask(server, **asked)
    assert texts_of(response) == [others[0], halting.text, *others[1:]]
    assert [run.generated for run in server.model.runs] == [3, 4, 3, 3, 0, 4, 0, 0]
    keys = [request.retry_key for request in server.model.completions]
    assert keys[:4] == keys[4:]
    assert len(set(keys)) == 4


def test_equal_prompts_of_one_request_are_told_apart(server: Served) -> None:
    ask(server, path=TEXT, prompt=["hi", "hi"])
    one, other = server.model.completions
    assert one.retry_key != other.retry_key


def test_equal_requests_at_one_time_are_two_answers(server: Served) -> None:
    text = "abcdefgh"
    server.model.play(Script(words(*text, delay_s=0.05)))
    answers: list[str] = []
    threads = [threading.Thread(target=lambda: answers.append(text_of(ask(server)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [text, text]
    assert [run.generated for run in server.model.runs] == [len(text)] * 2


def test_equal_requests_one_after_the_other_are_two_answers(server: Served) -> None:
    for _ in range(2):
        assert text_of(ask(server)) == "Hello."
    assert [run.generated for run in server.model.runs] == [2, 2]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_another_key_or_another_body_is_another_request(path: str) -> None:
    answer = Halting()
    with serving(ScriptedModel(answer.script()), Settings(api_keys=KEYS)) as served:
        give_up(served, "key-one", path=path)
        served.model.play_next(Script(words("new")))
        assert text_of(ask(served, "key-two", path=path)) == "new"
        assert text_of(ask(served, "key-one", temperature=0.5, path=path)) == "new"
        assert text_of(ask(served, "key-one", stream=True, path=path)) == "new"
        answer.go()
        assert text_of(ask(served, "key-one", path=path)) == answer.text
        assert served.model.runs[-1].generated == len(answer.text) - answer.half
        scopes = [request.scope for request in served.model.requests or served.model.completions]
        assert scopes[0] == scopes[2] != scopes[1]
        assert not any(key in scope for key in KEYS for scope in scopes)


def test_the_same_body_to_another_endpoint_is_another_request(server: Served) -> None:
    body = {"messages": [USER], "input": "hi", "max_tokens": 50}
    answer = Halting()
    server.model.play(answer.script())
    give_up(server, **body)
    server.model.play_next(Script(words("new")))
    assert server.post("/v1/messages", json=body).json()["content"][0]["text"] == "new"
    assert server.post("/v1/responses", json=body).json()["output"][0]["content"][0]["text"] == "new"
    answer.go()
    assert text_of(ask(server, **body)) == answer.text


def test_nor_is_a_text_taken_up_as_an_answer(server: Served) -> None:
    body = {"messages": [USER], "prompt": "hi", "max_tokens": 50}
    answer = Halting()
    server.model.play(answer.script())
    give_up(server, path=TEXT, **body)
    server.model.play_next(Script(words("new")))
    assert text_of(ask(server, **body)) == "new"
    answer.go()
    assert text_of(ask(server, path=TEXT, **body)) == answer.text


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_what_is_to_be_computed_anew_is_not_parked(server: Served, path: str) -> None:
    answer = Halting()
    server.model.play(answer.script())
    give_up(server, cache_prompt=False, path=path)
    answer.go()
    assert text_of(ask(server, cache_prompt=False, path=path)) == answer.text
    assert [run.generated for run in server.model.runs] == [answer.half, len(answer.text)]
    assert not server.model.parked


def test_a_client_that_goes_before_the_first_token_is_a_retry_as_well(server: Served) -> None:
    server.model.play(Script([Step((Content("a"),), delay_s=3600)]))
    connection = send_chat(server.port)
    deadline = time.monotonic() + 10
    while not server.model.runs:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    connection.close()
    assert server.model.runs[0].cancelled.wait(10)
    server.model.play_next(Script(words("new")))
    assert sum(map(len, server.model.parked.values())) == 1


def test_nothing_is_parked_while_the_server_drains() -> None:
    live = LiveRuns()
    with serving(ScriptedModel(Halting().script()), live=live) as served:
        connection = send_chat(served.port)
        wait_for_run(served)
        live.drain()
        connection.close()
        assert served.model.runs[0].cancelled.wait(10)
        assert not served.model.parked


def test_a_run_that_begins_after_the_end_is_cancelled() -> None:
    live = LiveRuns()
    live.end_all()
    run = ScriptedRun(Script([]), 1, max_tokens=1)
    live.add([run])  # type: ignore[list-item]
    assert run.cancelled.is_set()
    assert len(live) == 0


def test_a_key_is_of_scope_and_value_not_of_spelling() -> None:
    one, other = orjson.loads(b'{"a": [1, {"b": null, "c": 2.5}], "d": "\\u00e9"}'), {"d": "é", "a": []}
    other["a"] = [1, {"c": 2.5, "b": None}]
    assert retry_key("s", "/a", one) == retry_key("s", "/a", other)
    keys = {retry_key(scope, path, one) for scope in ("", "s") for path in ("/a", "/b")}
    assert len(keys | {retry_key("", "/a", {**one, "a": []})}) == 5
    assert choice_key("k", 0) != choice_key("k", 1)
    assert choice_key("", 1) == ""
