"""The server as a process: what it prints, how it refuses to start, how it ends. On a tiny random model."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from k2hybrid.native.extension import INSTRUCTION_SETS
from tests.server.process import command, started

START_S = 120


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_says_where_it_listens_answers_and_ends_on_a_signal(tiny_model: Path, number: int) -> None:
    with started("--model", tiny_model, "--served-model-name", "tiny") as (process, url, lines):
        table = dict(line.split(None, 1) for line in lines[:-1])
        assert table["model"] == str(tiny_model)
        assert table["device"] == "cpu"
        assert table["isa"] == INSTRUCTION_SETS[0]  # what runs, though nothing was asked for
        assert httpx.get(f"{url}/health").json()["model"] == "tiny"
        answer = httpx.post(
            f"{url}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
            timeout=60,
        )
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] <= 4
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "Traceback" not in errors


@contextmanager
def endless_answer(url: str) -> Iterator[Iterator[str]]:
    """A stream of which the first chunk has come."""
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "logit_bias": {str(token): -100 for token in range(344, 600)},  # no control token: it never ends
    }
    with (
        httpx.Client(timeout=60) as client,
        client.stream("POST", f"{url}/v1/chat/completions", json=body) as response,
    ):
        text = response.iter_text()
        next(text)
        yield text


def test_a_signal_in_the_middle_of_an_answer_ends_it_after_the_drain_time(tiny_model: Path) -> None:
    with (
        started("--model", tiny_model, "--drain", "1s") as (process, url, _),
        endless_answer(url) as text,
    ):
        process.send_signal(signal.SIGTERM)
        last = "".join(text)
        assert '"code":"shutting_down"' in last
        assert last.endswith("data: [DONE]\n\n")
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_a_second_signal_in_the_middle_of_an_answer_ends_the_process_at_once(tiny_model: Path) -> None:
    with started("--model", tiny_model, "--drain", "600") as (process, url, _), endless_answer(url):
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 60
        while httpx.get(f"{url}/health", timeout=60).status_code != 503:
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130


def refused(*argv: object) -> tuple[int, str]:
    done = subprocess.run(command(*argv), capture_output=True, text=True, timeout=START_S)
    assert "Traceback" not in done.stderr
    assert "Listening" not in done.stdout
    return done.returncode, done.stderr


def test_a_port_in_use_is_one_line(tiny_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, error = refused("--model", tiny_model, "--port", port)
    assert code == 1
    assert f"cannot listen on 127.0.0.1:{port}" in error
    assert "--port" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--model", "/nonexistent"], 1, "/nonexistent"),
        (
            ["--host", "no.such.host.invalid", "--allow-no-key"],
            1,
            "cannot resolve --host no.such.host.invalid",
        ),
        (["--host", "0.0.0.0"], 1, "--allow-no-key"),
        (["--device", "cuda:99"], 1, "cuda:99"),
        (["--isa", "mmx"], 1, "mmx"),
        (["--api-key-file", "/nonexistent"], 1, "/nonexistent"),
        (["--modle", "x"], 2, "--model"),
    ],
)
def test_what_cannot_work_is_one_line(tiny_model: Path, argv: list[str], code: int, said: str) -> None:
    got, error = refused("--port", 0, "--model", tiny_model, *argv)
    assert got == code
    assert said in error
    assert error.count("\n") == 1
