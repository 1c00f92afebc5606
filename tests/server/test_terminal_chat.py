"""`k2hybrid chat`: what it shows of an answer, and what it remembers."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2hybrid.cli import main
from k2hybrid.cli.chat import Screen
from k2hybrid.types import Content, Malformed, Reasoning, ToolCallArguments, ToolCallEnd, ToolCallStart

EVENTS = (Reasoning("hm"), Reasoning("m"), Content("Yes"), Content("."))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(out: io.StringIO, *events: object, reasoning: bool = True) -> str:
    screen = Screen(out, reasoning=reasoning)
    for event in events:
        screen.show(event)  # type: ignore[arg-type]
    screen.finish("4 tokens")
    return out.getvalue()


def test_reasoning_is_dimmed_on_a_terminal() -> None:
    assert shown(Terminal(), *EVENTS) == ("\x1b[2mhmm\x1b[0m\n\nYes.\n\x1b[2m4 tokens\n\x1b[0m")


def test_without_a_terminal_there_are_no_colours_and_no_remarks() -> None:
    assert shown(io.StringIO(), *EVENTS) == "hmm\n\nYes.\n"
    assert shown(io.StringIO(), *EVENTS, reasoning=False) == "Yes.\n"


def test_calls_and_malformed_output_are_seen() -> None:
    text = shown(
        io.StringIO(),
        ToolCallStart(0, "functions.f:0", "f"),
        ToolCallArguments(0, '{"a":1}'),
        ToolCallEnd(0),
        Malformed("<junk>", "not a call"),
    )
    assert '[calls f {"a":1}]' in text
    assert "[not a call: <junk>]" in text


def test_one_shot_repeats_with_a_seed(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["chat", "--model", str(tiny_model), "--threads", "1", "--latent-gb", "0.05", "-p", "hi"]
    argv += ["--seed", "4", "--max-tokens", "12", "--reasoning", "show"]
    assert main(argv) == 0
    first = capsys.readouterr().out
    assert main(argv) == 0
    assert capsys.readouterr().out == first
    assert first.strip()


def test_a_conversation_goes_on_resets_and_ends(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: Iterator[str] = iter(["", "/help", "hello", "again", "/reset", "x" * 300_000, "hello", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _prompt: next(lines))
    argv = ["chat", "--model", str(tiny_model), "--threads", "1", "--latent-gb", "0.01", "--temperature", "0"]
    assert main([*argv, "--max-tokens", "6"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("/reset starts over") == 2
    assert "the prompt is too long" in printed.err  # and the conversation went on
    assert next(lines, None) is None


def test_an_empty_prompt_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("  \n"))
    assert main(["chat", "-p", "-"]) == 1
    assert "--prompt is empty" in capsys.readouterr().err
