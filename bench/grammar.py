"""What constrained decoding costs a token, on the published vocabulary of 163,840 tokens.

    python -m bench.grammar [--vocabulary DIR] [--out FILE]

Agents' tools are compiled, and calls of them replayed token by token: what a mask takes to compute, what of
that a decode step has to wait for when it is computed while the model runs, and what else a token costs. Bar:
a mask costs ≤ 100 µs at the 99th percentile on a step's critical path.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from k2hybrid.bench.report import Row, conditions, print_report, write_json
from k2hybrid.chat.constraint import CallableTool, Constraint, Phase, Rules
from k2hybrid.chat.grammar import Grammars
from k2hybrid.chat.markers import Markers
from k2hybrid.chat.tokenizer import Tokenizer
from k2hybrid.config import RuntimeConfig
from k2hybrid.native.machine import Machine
from k2hybrid.runtime.mask import ConstraintMask

BAR_US = 100.0
VOCABULARY = Path(__file__).parents[1] / "tests" / "golden"
STEP_MS = 2.0  # of the model between two masks; a decode step of Kimi-K2-Thinking takes 50 times as long

TEXT = {"type": "string"}
NUMBER = {"type": "integer"}


def _tool(required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required.split()}


# In the manner of coding agents: what they declare, and how often.
TOOLS: dict[str, dict[str, Any]] = {
    "Bash": _tool("command", command=TEXT, timeout={"type": "number", "maximum": 600000}, description=TEXT,
                  run_in_background={"type": "boolean"}),
    "Read": _tool("file_path", file_path=TEXT, offset=NUMBER, limit={"type": "integer", "minimum": 1}),
    "Write": _tool("file_path content", file_path=TEXT, content=TEXT),
    "Edit": _tool("file_path old_string new_string", file_path=TEXT, old_string=TEXT, new_string=TEXT,
                  replace_all={"type": "boolean"}),
    "Grep": _tool("pattern", pattern=TEXT, path=TEXT, glob=TEXT, head_limit=NUMBER,
                  output_mode={"enum": ["content", "files_with_matches", "count"]},
                  multiline={"type": "boolean"}),
    "WebFetch": _tool("url prompt", url={"type": "string", "format": "uri"}, prompt=TEXT),
    "TodoWrite": _tool("todos", todos={"type": "array", "minItems": 1, "items": _tool(
        "content status activeForm", content={"type": "string", "minLength": 1}, activeForm=TEXT,
        status={"enum": ["pending", "in_progress", "completed"]})}),
    "Schedule": _tool("at", at={"type": "string", "format": "date-time"}, every={"type": "string",
                      "pattern": "^[0-9]{1,3}[smhd]$"}, tags={"type": "array", "items": TEXT, "maxItems": 5}),
}  # fmt: skip
CODE = 'def f(x):\n    """Twice, for ‘all’ kinds of x."""\n    return 2 * x  # \t\\n\n\n' * 8
CALLS: list[tuple[str, Any]] = [
    ("Bash", {"command": "cd /srv/app && git status --short | head; ls -la", "description": "Look"}),
    ("Read", {"file_path": "/srv/app/src/main/resources/application-production.yaml", "limit": 120}),
    ("Write", {"content": CODE, "file_path": "/srv/app/füßchen.py"}),
    ("Edit", {"file_path": "/a/b.c", "old_string": "for (;;) {", "new_string": "while (!done) {\n\tstep();"}),
    ("Grep", {"pattern": "\\bclass\\s+\\w+Engine", "output_mode": "content", "glob": "**/*.{ts,tsx}"}),
    ("WebFetch", {"url": "https://example.org/a/b?c=d", "prompt": "What does the page say about 城市?"}),
    ("TodoWrite", {"todos": [
        {"content": f"Step {i}", "status": "pending", "activeForm": "Doing"} for i in range(4)]}),
    ("Schedule", {"at": "2027-03-04T05:06:07Z", "every": "15m", "tags": ["a", "nightly build"]}),
]  # fmt: skip


class Replay:
    """Calls as tokens, over one vocabulary."""

    def __init__(self, tokenizer: Tokenizer, grammars: Grammars) -> None:
        self.tokenizer = tokenizer
        self.grammars = grammars
        self.markers = Markers.from_specials(tokenizer.specials)
        self.tools = tuple(CallableTool(name, grammars.of_schema(schema)) for name, schema in TOOLS.items())

    def constraint(self, index: int) -> Constraint:
        """Of an answer that begins with a call."""
        rules = Rules(
            max_tokens=100_000, thinking_budget=0, phase=Phase.CONTENT, tools=self.tools,
            first_call_index=index,
        )  # fmt: skip
        return Constraint(rules, self.grammars, self.markers, self.tokenizer.stop_ids)

    def answers(self, rounds: int) -> Iterator[tuple[int, list[int]]]:
        """(index of the call, tokens of an answer that makes it)."""
        order = random.Random(1)
        m = self.markers
        for index in range(rounds * len(CALLS)):
            name, arguments = CALLS[index % len(CALLS)]
            items = list(arguments.items())
            order.shuffle(items)
            text = json.dumps(dict(items), ensure_ascii=False, indent=order.choice([None, None, 2]))
            header = self.tokenizer.encode(f"functions.{name}:{index}")
            yield index, [
                m.section_begin, m.call_begin, *header, m.argument_begin, *self.tokenizer.encode(text),
                m.call_end, m.section_end, m.im_end,
            ]  # fmt: skip


def masked_steps(
    replay: Replay, rounds: int, executor: ThreadPoolExecutor | None, work: Callable[[], object]
) -> tuple[list[float], list[float], int, int]:
    """µs of `apply` and `accept` for every step that a grammar constrains; tokens in all, and forced."""
    applied, accepted = [], []
    tokens = forced = 0
    logits = torch.zeros(replay.tokenizer.vocab_size)
    for index, answer in replay.answers(rounds):
        constraint = replay.constraint(index)
        mask = ConstraintMask(constraint, replay.tokenizer.num_ranks, executor)
        at = 0
        while at < len(answer):
            work()
            logits.zero_()
            constrained = constraint.needs_grammar
            started = time.perf_counter()
            mask.apply(logits)
            between = time.perf_counter()
            if logits[answer[at]] != 0:
                raise SystemExit(f"token {answer[at]} of call {index} is forbidden")
            again = time.perf_counter()
            taken = mask.accept(answer[at])
            ended = time.perf_counter()
            if taken != answer[at : at + len(taken)]:
                raise SystemExit(f"call {index} is continued otherwise than it was written")
            if constrained:
                applied.append((between - started) * 1e6)
                accepted.append((ended - again) * 1e6)
            at += len(taken)
            tokens += len(taken)
            forced += len(taken) - 1
    return applied, accepted, tokens, forced


def model_step(ms: float) -> Callable[[], object]:
    """As much work as a decode step, outside Python as it is there."""
    matrix = torch.randn(512, 512)
    row = torch.randn(8, 512)
    started = time.perf_counter()
    for _ in range(50):
        torch.mm(row, matrix)
    times = max(1, round(ms * 1e-3 / ((time.perf_counter() - started) / 50)))

    def work() -> None:
        for _ in range(times):
            torch.mm(row, matrix)

    return work


def percentiles(values: Iterable[float]) -> dict[str, float]:
    p50, p99 = np.percentile(list(values), [50, 99])
    return {"p50_us": round(float(p50), 1), "p99_us": round(float(p99), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description="What constrained decoding costs a token.")
    parser.add_argument("--vocabulary", type=Path, default=VOCABULARY, help="folder with tiktoken.model")
    parser.add_argument("--rounds", type=int, default=6, help="times that every call is replayed")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = Tokenizer.load(options.vocabulary)
    started = time.perf_counter()
    grammars = Grammars(tokenizer)
    _ = grammars.vocabulary
    built = time.perf_counter()
    replay = Replay(tokenizer, grammars)
    compiled = time.perf_counter()
    rows: list[Row] = [
        {"case": "vocabulary, once", "ms": round((built - started) * 1e3, 1)},
        {"case": f"grammars of {len(TOOLS)} tools, once", "ms": round((compiled - built) * 1e3, 1)},
    ]
    work = model_step(STEP_MS)
    with ThreadPoolExecutor(1) as executor:
        for name, threads, step in (
            ("mask when it is needed", None, lambda: None),
            (f"mask while a step of {STEP_MS:g} ms runs", executor, work),
        ):
            applied, accepted, tokens, forced = masked_steps(replay, options.rounds, threads, step)
            found = percentiles(applied)
            rows.append(
                {"case": name, **found, "bar": round(found["p99_us"] / BAR_US, 2), "steps": len(applied),
                 "tokens": tokens, "forced": forced}
            )  # fmt: skip
            rows.append({"case": f"accept, {name}", **percentiles(accepted)})
    found = conditions(Machine(RuntimeConfig().threads), vocabulary=tokenizer.vocab_size, bar_us=BAR_US)
    print_report("constrained decoding", found, rows)
    if options.out is not None:
        write_json(options.out, found, rows)


if __name__ == "__main__":
    main()
