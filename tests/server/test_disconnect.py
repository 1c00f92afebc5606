"""A client that has gone costs nothing more; one that waits long is told that we are here."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncGenerator

import httpx
import openai
import orjson
import pytest

from k2hybrid.errors import EngineError
from k2hybrid.server import sse
from k2hybrid.server.live import LiveRuns
from k2hybrid.server.sse import EventStream
from k2hybrid.types import Content
from tests.server.conftest import Served, serving
from tests.server.scripted import Script, ScriptedModel, Step

WITHIN_S = 1.0


def endless(delay_s: float) -> Script:
    return Script(Step((Content("x"),), delay_s=delay_s) for _ in range(100_000))


def send_chat(port: int, **fields: object) -> socket.socket:
    body = orjson.dumps({"messages": [{"role": "user", "content": "hi"}], **fields})
    connection = socket.create_connection(("127.0.0.1", port))
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    return connection


def wait_for_run(server: Served) -> None:
    deadline = time.monotonic() + 10
    while not (server.model.runs and server.model.runs[0].played):
        assert time.monotonic() < deadline, "the request never ran"
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_generation_stops_when_the_client_goes(server: Served, stream: bool) -> None:
    server.model.play(endless(0.01))
    connection = send_chat(server.port, stream=stream)
    wait_for_run(server)
    left = time.monotonic()
    connection.close()
    assert server.model.runs[0].cancelled.wait(10)
    assert server.model.runs[0].cancelled_at - left < WITHIN_S


@pytest.mark.parametrize("stream", [True, False])
def test_it_stops_in_the_middle_of_a_silent_prefill_too(server: Served, stream: bool) -> None:
    server.model.play(Script([Step((Content("x"),)), Step((Content("y"),), delay_s=3600)]))
    connection = send_chat(server.port, stream=stream)
    wait_for_run(server)
    left = time.monotonic()
    connection.close()
    assert server.model.runs[0].cancelled.wait(10)
    assert server.model.runs[0].cancelled_at - left < WITHIN_S


def test_the_sdk_closing_its_stream_counts_as_gone(server: Served) -> None:
    server.model.play(endless(0.01))
    stream = server.openai().chat.completions.create(
        model="m", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    next(iter(stream))
    stream.close()
    assert server.model.runs[0].cancelled.wait(10)


def test_all_choices_stop(server: Served) -> None:
    server.model.play(endless(0.01), endless(0.01), endless(0.01))
    connection = send_chat(server.port, stream=True, n=3)
    wait_for_run(server)
    connection.close()
    assert all(run.cancelled.wait(10) for run in server.model.runs)
    assert len(server.model.runs) == 3


def test_choices_already_queued_stop_when_a_later_one_is_refused(server: Served) -> None:
    server.model.play(endless(0.01), openai.OpenAIError("unexpected"))
    assert server.chat(n=2).status_code == 500
    assert server.model.runs[0].cancelled.is_set()


def test_a_finished_run_is_cancelled_only_after_its_end(server: Served) -> None:
    assert server.chat().json()["choices"][0]["finish_reason"] == "stop"
    assert server.model.runs[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [True, False])
def test_a_server_that_ends_tells_its_clients(stream: bool) -> None:
    live = LiveRuns()
    with serving(ScriptedModel(endless(0.01)), live=live) as served:
        answers: list[str] = []
        thread = threading.Thread(target=lambda: answers.append(served.chat(stream=stream).text))
        thread.start()
        wait_for_run(served)
        assert len(live) == 1
        live.end_all()
        thread.join(10)
        assert len(live) == 0
    assert "shutting down" in answers[0]
    assert '"code":"shutting_down"' in answers[0]
    assert answers[0].endswith("data: [DONE]\n\n") == stream


def test_a_stream_that_never_began_is_closed() -> None:
    closed: list[bool] = []

    async def events() -> AsyncGenerator[bytes, None]:
        yield b"never sent"

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(message: object) -> None:
        raise OSError("the connection is gone")

    response = EventStream(events(), closed.append)
    with pytest.raises(OSError, match="gone"):
        asyncio.run(response({"type": "http"}, receive, send))
    assert closed == [False]  # and is told that not everything was sent


def test_silence_is_filled_with_comments(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.05)
    server.model.play(Script([Step((Content("late"),), delay_s=0.4)]))
    text = server.chat(stream=True).text
    first, _, rest = text.partition("\n\n")
    assert '"role":"assistant"' in first  # at once, before the silence
    assert rest.startswith(": keep-alive\n\n")
    assert rest.count(": keep-alive\n\n") >= 3
    # The SDK reads through them.
    client = server.openai()
    chunks = list(
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}], stream=True)
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "late"


def test_a_whole_answer_keeps_its_connection_alive_too(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.05)
    server.model.play(Script([Step((Content("late"),), delay_s=0.4)]))
    response = server.chat()
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.text.startswith("   ")
    assert response.json()["choices"][0]["message"]["content"] == "late"
    client = server.openai()
    answer = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
    assert answer.choices[0].message.content == "late"


def test_a_failure_after_a_long_wait_is_in_the_body(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.05)
    server.model.play(Script([Step(delay_s=0.3), Step(error=EngineError("the step failed"))]))
    response = server.chat()
    assert response.status_code == 200
    assert response.json()["error"]["code"] == "engine_error"


def test_other_requests_are_answered_while_one_waits(server: Served) -> None:
    server.model.play(Script([Step((Content("x"),), delay_s=3600)]))
    connection = send_chat(server.port)
    answers: list[int] = []
    threads = [
        threading.Thread(
            target=lambda: answers.append(httpx.get(f"{server.url}/health", timeout=5).status_code)
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    connection.close()
    assert answers == [200] * 4
