"""The model card's two examples, unchanged, with the `openai` package, on the built-in model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.server.process import started

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 600


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with started() as (_, url, _):
        yield url + "/v1"


def script(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


@pytest.mark.parametrize("name", ["chat_completion", "tool_calling"])
def test_an_example_runs_as_it_stands(url: str, name: str) -> None:
    done = script(f"examples/{name}.py", "--base-url", url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_they_end_right(url: str, tmp_path: Path) -> None:
    """Four of five seeds each; 95 of 100 is what `k2hybrid mini-eval` asks for."""
    report = tmp_path / "report.json"
    options = ("--url", url, "--only", "card", "--card-seeds", "5", "--show", "5", "--json", str(report))
    done = script("-m", "k2hybrid", "mini-eval", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(report.read_text())["rows"]
    assert [row["n"] for row in rows] == [5, 5]
    assert min(row["right"] for row in rows) >= 4, done.stdout


def test_a_seed_repeats_its_answer_whole_or_streamed(url: str) -> None:
    request = {
        "model": "m",
        "messages": [{"role": "user", "content": "which is bigger, 3.7 or 3.12?"}],
        "seed": 11,
    }
    with openai.OpenAI(base_url=url, api_key="none") as client:
        whole = client.chat.completions.create(**request).choices[0].message
        again = client.chat.completions.create(**request).choices[0].message
        assert (again.content, again.reasoning_content) == (whole.content, whole.reasoning_content)
        content, reasoning = "", ""
        for chunk in client.chat.completions.create(**request, stream=True):
            content += chunk.choices[0].delta.content or ""
            reasoning += getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
    assert (content, reasoning) == (whole.content, whole.reasoning_content or "")
