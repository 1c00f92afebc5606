"""A long session after a kill, and a turn after a final answer: seconds to the first token, over HTTP.

    python -m bench.sessions [--model DIR] [--tokens 32768] [--json FILE]

* In the middle of a turn of a long session the server is killed with SIGKILL, while its client still reads.
  It starts anew, and the client asks again. Bar: the first token comes within 2 s + page bytes / direct-read
  rate + the new tokens, and the greedy answer is that of an undisturbed run. What the start of the server
  takes is told beside it. The turn may say text alone and not end it: the built-in model has nothing to say
  to such a history, and would be done before the kill. The page cache forgets the journal between, so that
  pages come from the disk; the rate is that of the probe that `k2hybrid doctor` runs, on the same disk. New
  tokens are those that the turn adds to the history and its last answer, or what was prefilled, if that was
  less; their time is what an undisturbed server takes to prefill as many behind the same history, until the
  token that follows. If the answer is another, an undisturbed server is asked once more that prefills the
  prompt in the same two pieces: whether it is the pieces that decide between tokens nearly as likely, or the
  journal.
* After a final answer that followed a tool call, templates drop the run's reasoning; the idle machine
  prefills the history as the next turn renders it. The turn is timed with and without.

The exit status is 1 if the bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from k2hybrid.bench.report import conditions
from k2hybrid.chat.tokenizer import Tokenizer
from k2hybrid.config import MINI_MODEL
from k2hybrid.hardware.disk import direct_read_gb_s
from k2hybrid.native.machine import Machine

ALLOWED_S = 2.0  # beside pages and new tokens
PIECES = 8  # of the answer, before the kill
TURN_TOKENS = 48  # of an answer at most
ROUNDS = 5  # of the time of new tokens
TIMEOUT_S = 1200
SAME = {True: "the same", False: "another", None: "not to be had"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "read",
            "parameters": {"type": "object", "properties": {"path": {"type": "string"}}},
        },
    }
]
Messages = list[dict[str, Any]]


@dataclass
class Answer:
    """What came of an answer by now."""

    first_s: float = 0.0  # until its first piece
    pieces: int = 0
    reasoning: str = ""
    content: str = ""
    calls: list[dict[str, str]] = field(default_factory=list)  # id, name, arguments
    finish: str = ""
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return int(self.usage["prompt_tokens"])

    @property
    def cached(self) -> int:
        """Of these, tokens that were known."""
        return int(self.usage["prompt_tokens_details"]["cached_tokens"])

    def take(self, delta: dict[str, Any]) -> bool:
        """Add a chunk's delta; whether it says anything."""
        reasoning, content = delta.get("reasoning_content") or "", delta.get("content") or ""
        self.reasoning += reasoning
        self.content += content
        for part in delta.get("tool_calls", ()):
            function = part["function"]
            if "id" in part:
                self.calls.append({"id": part["id"], "name": function["name"], "arguments": ""})
            self.calls[-1]["arguments"] += function["arguments"]
        return bool(reasoning or content or delta.get("tool_calls"))

    def message(self) -> dict[str, Any]:
        """As a client sends it back."""
        calls = [
            {
                "id": call["id"],
                "type": "function",
                "function": {"name": call["name"], "arguments": call["arguments"]},
            }
            for call in self.calls
        ]
        said = {"role": "assistant", "content": self.content, "reasoning_content": self.reasoning}
        return {**said, "tool_calls": calls} if calls else said

    def same_as(self, other: Answer) -> bool:
        """Whether both say the same to the last letter."""
        return (self.message(), self.finish) == (other.message(), other.finish)


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


def ask(url: str, messages: Messages, tokens: int, into: Answer | None = None, **more: Any) -> Answer:
    """Stream a greedy answer; another thread may look at `into` meanwhile."""
    body = {
        "model": "k2", "messages": messages, "tools": TOOLS, "stream": True, "temperature": 0,
        "max_tokens": tokens, "stream_options": {"include_usage": True}, **more,
    }  # fmt: skip
    answer = into or Answer()
    began = time.perf_counter()
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=TIMEOUT_S) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            answer.usage = chunk.get("usage") or answer.usage
            for choice in chunk["choices"]:
                if answer.take(choice["delta"]):
                    answer.first_s = answer.first_s or time.perf_counter() - began
                    answer.pieces += 1
                answer.finish = choice["finish_reason"] or answer.finish
    return answer


def result(rng: random.Random) -> str:
    """What a tool gives: words that nobody knows."""
    return " ".join("".join(rng.choices("abcdefghijklmnop", k=5)) for _ in range(160))


def history(tokenizer: Tokenizer, tokens: int) -> Messages:
    """A run of tool calls whose results have so many tokens, as a client without reasoning keeps it."""
    rng = random.Random(3)
    messages: Messages = [{"role": "user", "content": "Find the fault."}]
    counted, n = 0, 0
    while counted < tokens:
        function = {"name": "read", "arguments": json.dumps({"path": str(n)})}
        call = {"id": f"c{n}", "type": "function", "function": function}
        said = {"role": "assistant", "content": "", "reasoning_content": "I read.", "tool_calls": [call]}
        messages += [said, {"role": "tool", "tool_call_id": f"c{n}", "content": result(rng)}]
        counted += len(tokenizer.encode(messages[-1]["content"]))
        n += 1
    return messages


def ask_for_text(url: str, tokenizer: Tokenizer, messages: Messages, into: Answer | None = None) -> Answer:
    """An answer that neither thinks nor calls nor ends before its last token."""
    bias = {str(token): -100 for token in tokenizer.specials.values()}
    return ask(url, messages, TURN_TOKENS, into, logit_bias=bias)


def begun(url: str, tokenizer: Tokenizer, tokens: int) -> tuple[Answer, Messages]:
    """The session's first turn, which ends in a tool call, and the history of the next one."""
    messages = history(tokenizer, tokens)
    answer = ask(url, messages, TURN_TOKENS, tool_choice="required")
    if not answer.calls:
        raise SystemExit(f"the first turn called no tool: {answer.message()}")
    given = [
        {"role": "tool", "tool_call_id": call["id"], "content": result(random.Random(call["id"]))}
        for call in answer.calls
    ]
    return answer, [*messages, answer.message(), *given]


def ask_and_kill(process: subprocess.Popen[str], url: str, tokenizer: Tokenizer, messages: Messages) -> int:
    """Kill the server while a thread reads its answer; pieces that came of it."""
    answer, failed = Answer(), threading.Event()

    def read() -> None:
        try:
            ask_for_text(url, tokenizer, messages, answer)
        except httpx.TransportError:
            failed.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    while reader.is_alive() and answer.pieces < PIECES:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reader.join()
    if answer.finish or not failed.is_set():
        raise SystemExit("the answer was over before the kill")
    return answer.pieces


def forget(folder: Path) -> None:
    """Let the page cache forget all files below a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)  # what is not written yet would stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def complete(url: str, ids: list[int]) -> dict[str, Any]:
    """Prefill `ids`, for one token; the usage."""
    body = {"model": "k2", "prompt": ids, "max_tokens": 1, "temperature": 0}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=TIMEOUT_S).raise_for_status()
    usage: dict[str, Any] = response.json()["usage"]
    return usage


def tokens_of(url: str, messages: Messages) -> list[int]:
    """The prompt as it is rendered."""
    body = {"messages": messages, "tools": TOOLS}
    response = httpx.post(f"{url}/tokenize", json=body, timeout=TIMEOUT_S).raise_for_status()
    ids: list[int] = response.json()["tokens"]
    return ids


def seconds_of_new(url: str, messages: Messages, known: int, count: int) -> float:
    """Until the token behind `count` new ones, which follow the first `known` of the history."""
    ids = tokens_of(url, messages)
    rng, taken = random.Random(5), []
    for _ in range(ROUNDS):
        prompt = ids[:known] + [rng.choice(ids) for _ in range(count)]
        began = time.perf_counter()
        usage = complete(url, prompt)
        taken.append(time.perf_counter() - began)
        prefilled = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
        if abs(prefilled - count) > 1:  # the first of the new ones may be that of another round
            raise SystemExit(f"{prefilled} tokens were prefilled to time {count}")
    return statistics.median(taken)


def in_two_pieces(
    model: Path, tokenizer: Tokenizer, tokens: int, first_piece: int, *options: object
) -> Answer | None:
    """The turn of an undisturbed server that has its first so many tokens prefilled before; None: it has not.

    It may not be had, since the prompt is not known by its ids here.
    """
    with server(model, "--no-journal", *options) as (_, url, _started):
        _answer, messages = begun(url, tokenizer, tokens)
        complete(url, tokens_of(url, messages)[:first_piece])
        answer = ask_for_text(url, tokenizer, messages)
        return answer if answer.cached == first_piece else None


def after_a_kill(model: Path, tokens: int) -> dict[str, Any]:
    """A turn, killed on its way and asked again of a new server."""
    tokenizer = Tokenizer.load(model)
    context = ("--ctx", max(2 * tokens, 8192), "--no-idle-prefill")
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "journal"
        with server(model, "--journal", journal, *context) as (process, url, _):
            first, messages = begun(url, tokenizer, tokens)
            pieces = ask_and_kill(process, url, tokenizer, messages)
        forget(journal)
        page_bytes = sum(path.stat().st_size for path in journal.glob("*/pages/**/*.page"))
        with server(model, "--journal", journal, *context) as (_, url, started):
            again = ask_for_text(url, tokenizer, messages)
        rate = direct_read_gb_s(Path(folder))
    new = min(again.prompt - first.prompt - first.usage["completion_tokens"], again.prompt - again.cached)
    with server(model, "--no-journal", *context) as (_, url, _started):
        undisturbed_first, undisturbed_messages = begun(url, tokenizer, tokens)
        undisturbed = ask_for_text(url, tokenizer, undisturbed_messages)
        new_s = seconds_of_new(url, undisturbed_messages, undisturbed_first.prompt, new)
    same_history = undisturbed_messages == messages  # with the first turn's answer
    same = same_history and again.same_as(undisturbed)
    control = None if same else in_two_pieces(model, tokenizer, tokens, again.cached, *context)
    pieces_same = None if control is None else again.same_as(control)
    pages_s = page_bytes / (rate.gb_s * 1e9)
    bound_s = ALLOWED_S + pages_s + new_s
    in_time = again.first_s <= bound_s
    figures = {
        "prompt": again.prompt,
        "cached_after_kill": again.cached,
        "new": new,
        "pieces_before_kill": pieces,
        "page_mb": page_bytes / 1e6,
        "direct_read_gb_s": rate.gb_s,
        "direct_read_how": rate.how,
        "direct_read_note": rate.note,
        "pages_s": pages_s,
        "new_s": new_s,
        "bound_s": bound_s,
        "start_s": started,
        "first_token_after_kill_s": again.first_s,
        "first_token_cold_s": undisturbed_first.first_s,
        "first_token_undisturbed_s": undisturbed.first_s,
        "same_history": same_history,
        "same_answer": same,
        "same_answer_in_the_same_pieces": pieces_same,  # null: not asked, or not to be had
        "in_time": in_time,
        "holds": same and in_time,
    }
    print(
        f"after a kill: start {started:.1f} s, then first token {again.first_s:.2f} s with {again.cached} of "
        f"{again.prompt} tokens known; bound {bound_s:.2f} s = {ALLOWED_S:.0f} + {pages_s:.3f} "
        f"({page_bytes / 1e6:.0f} MB at {rate.gb_s:.2f} GB/s, {rate.how}) + {new_s:.3f} ({new} new tokens): "
        f"{'holds' if in_time else 'MISSED'}; undisturbed {undisturbed.first_s:.2f} s, the history anew "
        f"{undisturbed_first.first_s:.1f} s; same answer: {'holds' if same else 'MISSED'}"
        + ("" if same else f" (prefilled in the same pieces, but undisturbed: {SAME[pieces_same]})"),
        flush=True,
    )
    return figures


def after_an_answer(model: Path, tokens: int) -> dict[str, Any]:
    """The turn after a final answer, with and without prefilling ahead."""
    tokenizer = Tokenizer.load(model)
    figures: dict[str, Any] = {}
    for name, options in (("ahead", ()), ("not ahead", ("--no-idle-prefill",))):
        with server(model, "--no-journal", *options) as (_, url, _started):
            messages = history(tokenizer, tokens)
            answer = ask(url, messages, 200)
            time.sleep(2.0 + answer.first_s * 2)
            following = ask(url, [*messages, answer.message(), {"role": "user", "content": "Sure?"}], 8)
            figures[name] = {
                "finish": answer.finish,
                "first_s": following.first_s,
                "prefilled": following.prompt - following.cached,
            }
    parts = [f"{name} {v['first_s']:.2f} s ({v['prefilled']} prefilled)" for name, v in figures.items()]
    print(f"the turn after an answer, first token: {', '.join(parts)}", flush=True)
    return figures


def main() -> int:
    """Run both; exit status 1 if the bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MINI_MODEL)
    parser.add_argument("--tokens", type=int, default=32_768, help="of the history before the kill, at least")
    parser.add_argument("--answer-tokens", type=int, default=4096, help="of that before a final answer")
    parser.add_argument("--json", type=Path, default=None, help="write conditions and figures there")
    args = parser.parse_args()
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    found = conditions(
        Machine(), model=args.model.resolve().name, tokens=args.tokens, answer_tokens=args.answer_tokens,
        turn_tokens=TURN_TOKENS, page_cache="forgot the journal", new_tokens_rounds=ROUNDS,
    )  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in found.items()), flush=True)
    figures = {
        "kill": after_a_kill(args.model, args.tokens),
        "answer": after_an_answer(args.model, args.answer_tokens),
    }
    found["load_average_after"] = float(Path("/proc/loadavg").read_text().split()[0])
    if args.json:
        args.json.write_text(json.dumps({"conditions": found, **figures}, indent=1) + "\n")
    return 0 if figures["kill"]["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
