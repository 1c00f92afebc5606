"""How the server ends: newcomers are refused, answers under way may finish, a second signal ends all."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.server.process import listening, scripted
from tests.server.test_openai_stream import events

BODY = {"messages": [{"role": "user", "content": "hi"}]}
LONG_S = 600  # a drain time that no test waits for
WITHIN_S = 120


@contextmanager
def answering(url: str) -> Iterator[Iterator[str]]:
    """A stream of which the first chunk has come."""
    with (
        httpx.Client(timeout=WITHIN_S) as client,
        client.stream("POST", f"{url}/v1/chat/completions", json={**BODY, "stream": True}) as response,
    ):
        text = response.iter_text()
        next(text)
        yield text


def health(url: str) -> httpx.Response:
    return httpx.get(f"{url}/health", timeout=WITHIN_S)


def wait_until_draining(url: str) -> None:
    deadline = time.monotonic() + WITHIN_S
    while health(url).status_code != 503:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ended(process: subprocess.Popen[str], within_s: float = WITHIN_S) -> tuple[int, list[str]]:
    """Its exit code, and what it printed since the test last read."""
    output, errors = process.communicate(timeout=within_s)
    assert "Traceback" not in errors
    return process.returncode, output.split()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_answers_under_way_finish_and_newcomers_are_told(number: int) -> None:
    with listening(scripted("--drain", LONG_S)) as (process, url, _):
        whole: list[httpx.Response] = []
        thread = threading.Thread(
            target=lambda: whole.append(httpx.post(f"{url}/v1/chat/completions", json=BODY, timeout=WITHIN_S))
        )
        thread.start()
        with answering(url) as text:
            assert process.stdout is not None
            assert [process.stdout.readline() for _ in range(2)] == ["asked\n"] * 2
            process.send_signal(number)
            wait_until_draining(url)
            assert health(url).json()["status"] == "draining"
            refused = httpx.post(f"{url}/v1/chat/completions", json=BODY, timeout=WITHIN_S)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) > 0
            assert refused.json()["error"]["code"] == "shutting_down"
            process.send_signal(signal.SIGUSR1)
            *_, last, done = events("".join(text))
        thread.join()
        assert done == "[DONE]"
        assert last["choices"][0]["finish_reason"] == "stop"
        assert whole[0].json()["choices"][0]["finish_reason"] == "stop"
        assert ended(process) == (0, ["stopping", "stopped"])


def test_answers_that_take_too_long_are_cut_off_and_say_so() -> None:
    with listening(scripted("--drain", "0.5s")) as (process, url, _):
        with answering(url) as text:
            process.send_signal(signal.SIGTERM)
            rest = "".join(text)
        assert '"code":"shutting_down"' in rest
        assert rest.endswith("data: [DONE]\n\n")
        assert ended(process) == (0, ["asked", "stopping", "stopped"])


def test_a_client_that_goes_is_not_waited_for() -> None:
    with listening(scripted("--drain", LONG_S)) as (process, url, _):
        with answering(url):
            process.send_signal(signal.SIGTERM)
            wait_until_draining(url)
        assert ended(process)[0] == 0


def test_idle_connections_are_not_waited_for() -> None:
    with listening(scripted("--drain", LONG_S)) as (process, url, _), httpx.Client(timeout=WITHIN_S) as idle:
        assert idle.get(f"{url}/health").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert ended(process)[0] == 0


@pytest.mark.parametrize(
    ("second", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_a_second_signal_ends_at_once_in_the_middle_of_an_answer(second: int, code: int) -> None:
    with listening(scripted("--drain", LONG_S)) as (process, url, _), answering(url):
        process.send_signal(signal.SIGTERM)
        wait_until_draining(url)
        process.send_signal(second)
        assert ended(process) == (code, ["asked"])


def test_a_second_signal_ends_at_once_while_the_model_is_closed() -> None:
    with listening(scripted("--stop-s", 3600)) as (process, _, _):
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == "stopping\n"
        process.send_signal(signal.SIGINT)
        assert ended(process) == (130, [])
