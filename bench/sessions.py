"""A long session after a kill, and a turn after a final answer: seconds to the first token, over HTTP.

    python -m bench.sessions [--model DIR] [--tokens 8000]

* After `kill -9` in the middle of a turn the server starts anew, and the client asks again. Bar: the first
  token comes within 2 s + page bytes / direct-read rate + the new tokens, and the greedy answer is that of an
  undisturbed run.
* After a final answer that followed a tool call, templates drop the run's reasoning; the idle machine
  prefills the history as the next turn renders it. The turn is timed with and without.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from k2hybrid.config import MINI_MODEL

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "read",
            "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
        },
    }
]


@contextmanager
def server(model: Path, *options: object) -> Iterator[tuple[subprocess.Popen[str], str, float]]:
    """The process, its address, and the seconds until it could answer."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "k2hybrid.server", "--port", "0", "--model", model, *options]
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.fullmatch(r"Listening on (http://\S+)", line.rstrip()):
                yield process, match[1], time.perf_counter() - began
                return
        raise SystemExit(f"the server ended with {process.wait()}")
    finally:
        process.kill()
        process.communicate()


def ask(
    url: str, messages: list[dict[str, Any]], tokens: int = 48, stop_after: int | None = None
) -> dict[str, Any]:
    """Stream an answer: seconds to its first token, its text, and its usage."""
    body = {
        "model": "k2", "messages": messages, "tools": TOOLS, "stream": True, "temperature": 0,
        "max_tokens": tokens, "stream_options": {"include_usage": True},
    }  # fmt: skip
    began = time.perf_counter()
    first, said, usage, chunks = 0.0, "", None, 0
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=600) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                delta = choice["delta"]
                piece = (delta.get("reasoning_content") or "") + (delta.get("content") or "")
                if piece:
                    first = first or time.perf_counter() - began
                    said += piece
                    chunks += 1
            if stop_after is not None and chunks >= stop_after:
                break
    return {"first_s": first, "said": said, "usage": usage}


def history(tokens: int) -> list[dict[str, Any]]:
    """A run of tool calls of about so many tokens, as a client without reasoning keeps it."""
    rng = random.Random(3)
    words = ["".join(rng.choices("abcdefghijklmnop", k=5)) for _ in range(300)]
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Find the fault."}]
    for n in range(max(1, tokens // 500)):
        function = {"name": "read", "arguments": json.dumps({"path": str(n)})}
        call = {"id": f"c{n}", "type": "function", "function": function}
        said = {"role": "assistant", "content": "", "reasoning_content": "I read.", "tool_calls": [call]}
        result = " ".join(rng.choices(words, k=160))
        messages += [said, {"role": "tool", "tool_call_id": f"c{n}", "content": result}]
    return messages


def after_a_kill(model: Path, tokens: int) -> dict[str, Any]:
    """A turn, killed on its way and asked again of a new server."""
    messages = history(tokens)
    with server(model, "--no-journal", "--no-idle-prefill") as (_, url, _started):
        undisturbed = ask(url, messages)
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "journal"
        options = ("--journal", journal, "--no-idle-prefill")
        with server(model, *options) as (process, url, _):
            ask(url, messages, stop_after=8)
            time.sleep(1.0)  # what waits is written behind the scenes; a kill loses what is not
            process.send_signal(signal.SIGKILL)
            process.wait()
        pages = [path.stat().st_size for path in journal.glob("*/pages/**/*") if path.is_file()]
        with server(model, *options) as (_, url, started):
            again = ask(url, messages)
    prompt = again["usage"]["prompt_tokens"]
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    figures = {
        "prompt": prompt, "cached_after_kill": cached, "page_mb": sum(pages) / 1e6,
        "first_token_undisturbed_s": undisturbed["first_s"], "start_s": started,
        "first_token_after_kill_s": again["first_s"], "same_answer": again["said"] == undisturbed["said"],
    }  # fmt: skip
    print(
        f"after a kill: start {started:.1f} s, then first token {again['first_s']:.2f} s with {cached} of "
        f"{prompt} tokens from {figures['page_mb']:.0f} MB of pages (cold: {undisturbed['first_s']:.2f} s); "
        f"same answer: {figures['same_answer']}"
    )
    return figures


def after_an_answer(model: Path, tokens: int) -> dict[str, Any]:
    """The turn after a final answer, with and without prefilling ahead."""
    figures: dict[str, Any] = {}
    for name, options in (("ahead", ()), ("not ahead", ("--no-idle-prefill",))):
        with server(model, "--no-journal", *options) as (_, url, _started):
            messages = history(tokens)
            answer = ask(url, messages, tokens=200)
            time.sleep(2.0 + answer["first_s"] * 2)
            messages.append({"role": "assistant", "content": answer["said"]})
            messages.append({"role": "user", "content": "Sure?"})
            following = ask(url, messages, tokens=8)
            usage = following["usage"]
            figures[name] = {
                "first_s": following["first_s"],
                "prefilled": usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"],
            }
    parts = [f"{name} {v['first_s']:.2f} s ({v['prefilled']} prefilled)" for name, v in figures.items()]
    print(f"the turn after an answer, first token: {', '.join(parts)}")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MINI_MODEL)
    parser.add_argument("--tokens", type=int, default=8000, help="of the session's history")
    parser.add_argument("--json", type=Path, default=None, help="write the figures there")
    args = parser.parse_args()
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    figures = {
        "model": args.model.name,
        "kill": after_a_kill(args.model, args.tokens),
        "answer": after_an_answer(args.model, args.tokens),
    }
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
