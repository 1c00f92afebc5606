"""A server on the emulated device as a process: SIGTERM with answers under way, a kill and a restart."""

from __future__ import annotations

import signal
import sys
import threading
import time
from pathlib import Path

import httpx

from tests.server.process import listening, started

OPTIONS = ("--device", "emulated", "--ctx", "640", "--hot-experts", "1MiB", "--max-step-tokens", "256")
QUESTION = "which one is bigger, 9.11 or 9.9? think carefully. " * 8


def ask(url: str, max_tokens: int = 8, **fields: object) -> dict:
    body = {
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": max_tokens,
        **fields,
    }
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_answers_under_way_finish_after_sigterm() -> None:
    with started(*OPTIONS, "--drain", 60) as (process, url, lines):
        table = dict(line.split(maxsplit=1) for line in lines if len(line.split(maxsplit=1)) == 2)
        assert table["device"] == "emulated"
        assert table["max_step_tokens"] == "256"
        assert int(table["hot_experts"]) <= 1 << 20
        answers: list[dict] = []
        threads = [threading.Thread(target=lambda: answers.append(ask(url, 60))) for _ in range(2)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while httpx.get(f"{url}/status").json()["engine"]["running"] < 2:
            assert time.monotonic() < deadline
            if answers:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        assert len(answers) == 2
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "Traceback" not in errors


def test_a_kill_loses_no_session(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "k2hybrid.server", "--threads", "1", "--port", "0", "--latent-gb", "0.1"]
    command += [*OPTIONS, "--journal", str(tmp_path / "journal")]
    with listening(command) as (process, url, _):
        first = ask(url)
        deadline = time.monotonic() + 30
        while not any(f.is_file() and "pages" in f.parts for f in tmp_path.rglob("*")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)  # the rest is written behind the scenes
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    with listening(command) as (_, url, _):
        again = ask(url)
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 64
        assert again["choices"][0]["message"] == first["choices"][0]["message"]
        assert httpx.get(f"{url}/status").json()["engine"]["cached_journal_tokens"] >= 64
