"""An agent's run of hundreds of tool calls: what each turn prefills, and how long it takes.

    python -m bench.turns               300 calls, 100,000 tokens, nothing computed: all that is not the model
    python -m bench.turns --compute     the model runs as well, in the turns that are compared

Three clients run the same history: one echoes everything, one drops the reasoning, one renames tool-call ids
and writes arguments its own way. Bars: tokens prefilled ≤ 1.02 × tokens that were new; the last turns take
≤ 1.3 × as long as the tenth, apart from attention over the longer history, which is timed by itself. In turns
that compute nothing latents are left as they are: attention over them takes the same time.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.stub import Scripted
from k2hybrid.checkpoint.spec import read_spec
from k2hybrid.config import MINI_MODEL, RuntimeConfig
from k2hybrid.engine.step import StepModel
from k2hybrid.model import attention, fused
from k2hybrid.native.latent_step import NativeLatentStep
from k2hybrid.native.machine import Machine
from k2hybrid.runtime.loading import open_runtime
from k2hybrid.runtime.runtime import Runtime
from k2hybrid.types import ChatRequest, Message, SamplingParams, ToolCall

EARLY, LATE = range(5, 15), 10  # turns that are compared: around the tenth, and the last ones
Client = Callable[[Message, int], Message]
TOOLS = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{name} something",
            "parameters": {
                "type": "object",
                "properties": {"path": {"type": "string"}, "line": {"type": "integer"}},
            },
        },
    }
    for name in ("read", "search", "write", "run")
)


def _renamed(message: Message, turn: int) -> Message:
    calls = tuple(
        ToolCall(f"toolu_{turn}_{i}", call.name, json.dumps(json.loads(call.arguments), indent=1))
        for i, call in enumerate(message.tool_calls)
    )
    return replace(message, tool_calls=calls, reasoning=None)


CLIENTS: dict[str, Client] = {
    "echoes all": lambda message, _: message,
    "drops reasoning": lambda message, _: replace(message, reasoning=None),
    "renames ids": _renamed,
}


@dataclass(frozen=True)
class Turn:
    """One request."""

    prompt: int
    new: int  # tokens of the prompt that neither the last prompt nor the last answer held
    prefilled: int
    ms: float
    model_ms: float
    attention_ms: float  # of model_ms


class AttentionWatch:
    """Times what attends to contexts: the CPU's kernel for few queries, one of two forms for many."""

    def __init__(self) -> None:
        self.ms = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While it lasts."""
        with (
            mock.patch.object(Machine, "attend", self._timed(Machine.attend)),
            mock.patch.object(NativeLatentStep, "__call__", self._asked(NativeLatentStep.__call__)),
            mock.patch.object(attention, "expanded", self._timed(attention.expanded)),
            mock.patch.object(fused, "expanded", self._timed(fused.expanded)),
        ):
            yield

    def _asked(self, step: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """Of a step it counts what the machine says, since the rest is no attention."""

        def asked(self_: NativeLatentStep, *args: Any) -> torch.Tensor:
            before = self_.machine.attend_seconds
            try:
                return step(self_, *args)
            finally:
                self.ms += (self_.machine.attend_seconds - before) * 1e3

        return asked

    def _timed(self, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def timed(*args: Any, **options: Any) -> torch.Tensor:
            began = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.ms += (time.perf_counter() - began) * 1e3

        return timed


def run(
    runtime: Runtime,
    model: Scripted,
    watch: AttentionWatch,
    client: Client,
    calls: int,
    tokens: int,
    scope: str,
    *,
    compute: bool,
) -> list[Turn]:
    """The turns of one client."""
    rng = random.Random(7)
    encode = runtime.tokenizer.encode_with_specials
    words = [f"{a}{b}" for a in ("alpha", "beta", "gamma", "delta") for b in range(200)]
    messages = [Message("user", "Find the fault in this program and mend it.")]
    turns: list[Turn] = []
    known = 0
    for turn in range(calls):
        arguments = json.dumps({"path": f"src/{rng.choice(words)}.py", "line": rng.randrange(999)})
        thought = "I look at " + " ".join(rng.choices(words, k=8)) + "."
        name = rng.choice(("read", "search", "write", "run"))
        said = (
            f"<think>{thought}</think><|tool_calls_section_begin|><|tool_call_begin|>functions.{name}:{turn}"
            f"<|tool_call_argument_begin|>{arguments}<|tool_call_end|><|tool_calls_section_end|><|im_end|>"
        )
        request = ChatRequest(
            tuple(messages), TOOLS, sampling=SamplingParams(temperature=0.0), max_tokens=1024, scope=scope,
            response_id=f"{scope}-{turn}",
        )  # fmt: skip
        model.computes = compute and (turn in EARLY or turn >= calls - LATE)
        runtime.engine.metrics.recent.clear()
        began, attended = time.perf_counter(), watch.ms
        script = encode(said)
        model.play(script)
        answer = runtime.chat(request)
        for _ in answer:
            pass
        ms = (time.perf_counter() - began) * 1e3
        model_ms = sum(record.ms for record in runtime.engine.metrics.recent)
        if answer.finish_reason != "tool_calls" or answer.ids != script:
            raise SystemExit(
                f"turn {turn} did not say its script, but {runtime.tokenizer.decode(answer.ids)}"
            )
        usage = answer.usage
        turns.append(
            Turn(
                usage.prompt_tokens,
                usage.prompt_tokens - known,
                usage.prompt_tokens - usage.cached_tokens,
                ms,
                model_ms,
                watch.ms - attended,
            )
        )
        known = usage.prompt_tokens + usage.completion_tokens
        call = ToolCall(f"functions.{name}:{turn}", name, arguments)
        messages.append(client(Message("assistant", "", reasoning=thought, tool_calls=(call,)), turn))
        result = ""
        while len(encode(result)) < max(8, (tokens - known) // (calls - turn) - 60):
            result += " ".join(rng.choices(words, k=12)) + "\n"
        messages.append(Message("tool", result, tool_call_id=messages[-1].tool_calls[0].id))
    return turns


def report(name: str, turns: list[Turn], *, compute: bool) -> dict[str, object]:
    """The client's figures, and whether they are within the bars: of time only where the model computed."""
    prefilled, new = sum(t.prefilled for t in turns), sum(t.new for t in turns)
    early, late = [turns[at] for at in EARLY], turns[-LATE:]

    def both(ms: Callable[[Turn], float]) -> tuple[float, float]:
        return statistics.median(map(ms, early)), statistics.median(map(ms, late))

    whole, own = both(lambda t: t.ms), both(lambda t: t.ms - t.model_ms)
    attending, apart = both(lambda t: t.attention_ms), both(lambda t: t.ms - t.attention_ms)
    figures = {
        "client": name,
        "calls": len(turns),
        "history_tokens": turns[-1].prompt,
        "prefilled": prefilled,
        "new": new,
        "prefilled_over_new": prefilled / new,
        "turn_10_ms": whole[0],
        "last_turn_ms": whole[1],
        "turn_10_attention_ms": attending[0],
        "last_turn_attention_ms": attending[1],
        "turn_10_own_ms": own[0],
        "last_turn_own_ms": own[1],
        "last_over_10": apart[1] / apart[0],
        "holds": prefilled <= 1.02 * new and (not compute or apart[1] <= 1.3 * apart[0]),
    }
    print(
        f"{name:16} {len(turns)} calls, {turns[-1].prompt} tokens: prefilled {prefilled} of {new} new "
        f"({prefilled / new:.3f}; bar 1.02) · turn 10 {whole[0]:.1f} ms, last {whole[1]:.1f} ms, of it "
        f"attention {attending[0]:.1f} and {attending[1]:.1f} ms; apart from it "
        f"{figures['last_over_10']:.2f}× ({'bar 1.3' if compute else 'nothing computed'}) · "
        f"outside steps: {own[0]:.1f} and {own[1]:.1f} ms",
        flush=True,
    )
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MINI_MODEL)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=100_000, help="of the history at the end")
    parser.add_argument("--compute", action="store_true", help="run the model as well; it says the same")
    parser.add_argument("--client", choices=CLIENTS, default=None, help="this one alone")
    parser.add_argument("--json", type=Path, default=None, help="write the figures there")
    args = parser.parse_args()
    config = RuntimeConfig(model=args.model, context_tokens=max(args.tokens * 2, 8192), idle_prefill=False)
    vocab_size = read_spec(args.model).vocab_size
    made: list[Scripted] = []

    def wrapped(inner: StepModel) -> Scripted:
        made.append(Scripted(vocab_size, inner if args.compute else None))
        return made[-1]

    print(f"{args.model.name}, {'with' if args.compute else 'without'} the model's compute")
    watch = AttentionWatch()
    with watch.watching(), open_runtime(config, wrapped=wrapped) as runtime:
        results = [
            report(
                name,
                run(runtime, made[0], watch, client, args.calls, args.tokens, name, compute=args.compute),
                compute=args.compute,
            )
            for name, client in CLIENTS.items()
            if args.client in (None, name)
        ]
    if args.json:
        args.json.write_text(json.dumps({"compute": args.compute, "results": results}, indent=1) + "\n")
    return 0 if all(result["holds"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
