"""`k2hybrid chat`: a conversation in the terminal, straight through the runtime."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, TextIO

from k2hybrid.checkpoint.hub import model_name
from k2hybrid.errors import ConfigError, K2Error
from k2hybrid.server.options import fail, model_path, runtime_options
from k2hybrid.types import (
    ChatRequest,
    Content,
    Event,
    Malformed,
    Message,
    Reasoning,
    SamplingParams,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)

if TYPE_CHECKING:
    from k2hybrid.runtime import Runtime

_DIM, _RED, _PLAIN = "\x1b[2m", "\x1b[31m", "\x1b[0m"
_HELP = "/reset starts over, /exit or Ctrl-D ends, Ctrl-C stops an answer"


class Screen:
    """Writes events as they come: reasoning dimmed, or left out; other things than text marked."""

    def __init__(self, out: TextIO, *, reasoning: bool) -> None:
        self._out = out
        self._colours = out.isatty()
        self._reasoning = reasoning
        self._dimmed = False

    def show(self, event: Event) -> None:
        """One event."""
        match event:
            case Reasoning(text):
                if self._reasoning:
                    self._write(text, dim=True)
            case Content(text):
                if self._dimmed:
                    self._write("\n\n")
                self._write(text)
            case ToolCallStart(_, _, name):
                self._write(f"\n[calls {name} ")
            case ToolCallArguments(_, text):
                self._write(text)
            case ToolCallEnd():
                self._write("]\n")
            case Malformed(text, reason):
                colour, plain = (_RED, _PLAIN) if self._colours else ("", "")
                self._write(f"{colour}[{reason}: {text}]{plain}")

    def finish(self, note: str = "") -> None:
        """End the answer on a line of its own, with a remark where it is a terminal."""
        self._write("\n")
        if note and self._colours:
            self._write(f"{note}\n", dim=True)
            self._write("")
        self._out.flush()

    def _write(self, text: str, *, dim: bool = False) -> None:
        if self._colours and dim != self._dimmed:
            self._out.write(_DIM if dim else _PLAIN)
        self._dimmed = dim
        self._out.write(text)
        self._out.flush()


class Conversation:
    """What was said so far, and how to go on."""

    def __init__(self, runtime: Runtime, args: argparse.Namespace) -> None:
        self._runtime = runtime
        self._sampling = SamplingParams(temperature=args.temperature, top_p=args.top_p, seed=args.seed)
        self._max_tokens: int | None = args.max_tokens
        self._first = (Message("system", args.system),) if args.system is not None else ()
        self._messages: list[Message] = [*self._first]

    def reset(self) -> None:
        """Forget everything but the system message."""
        self._messages = [*self._first]

    def say(self, text: str, screen: Screen) -> None:
        """Put `text` to the model and show its answer; Ctrl-C keeps what came until then."""
        question = Message("user", text)
        started = time.monotonic()
        run = self._runtime.chat(
            ChatRequest((*self._messages, question), sampling=self._sampling, max_tokens=self._max_tokens)
        )
        content, reasoning, tokens = "", "", 0
        try:
            for delta in run:
                tokens += 1
                for event in delta.events:
                    screen.show(event)
                    content += event.text if isinstance(event, Content) else ""
                    reasoning += event.text if isinstance(event, Reasoning) else ""
        except KeyboardInterrupt:
            screen.finish("stopped")
        else:
            seconds = time.monotonic() - started
            why = "" if run.finish_reason == "stop" else f", ended by {run.finish_reason}"
            screen.finish(f"{tokens} tokens in {seconds:.1f} s{why}")
        finally:
            run.cancel()
        self._messages += [question, Message("assistant", content, reasoning=reasoning or None)]


def chat(args: argparse.Namespace) -> int:
    """One answer with `--prompt`, else a conversation until the user ends it; the exit code."""
    from k2hybrid.runtime import load

    reasoning = args.reasoning == "show" or (args.reasoning == "auto" and sys.stdout.isatty())
    screen = Screen(sys.stdout, reasoning=reasoning)
    prompt = _prompt(args)
    model = model_path(args)
    with load(model, **runtime_options(args)) as runtime:
        conversation = Conversation(runtime, args)
        if prompt is not None:
            conversation.say(prompt, screen)
            return 0
        return _converse(conversation, screen, model_name(model))


def _prompt(args: argparse.Namespace) -> str | None:
    text: str | None = args.prompt
    if text == "-":
        text = sys.stdin.read()
    if text is not None and not text.strip():
        raise ConfigError("--prompt is empty")
    return text


def _converse(conversation: Conversation, screen: Screen, name: str) -> int:
    import readline  # noqa: F401 - gives input() its history and line editing

    print(f"{name}: {_HELP}")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()
            continue
        if line in ("/exit", "/quit"):
            return 0
        if line == "/reset":
            conversation.reset()
        elif line.startswith("/"):
            print(_HELP)
        elif line:
            try:
                conversation.say(line, screen)
            except K2Error as error:  # this turn failed; the conversation goes on
                fail("k2hybrid chat", error)
