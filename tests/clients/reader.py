"""What the played model says: a function of its prompt's text, as it stands in the checkpoint's own format.

It answers an agent's first request with a call that runs `COMMAND` in the shell, and quotes what came of it
once a result is there. Without a shell among the tools it says `TITLE`: side requests ask for one.
"""

from __future__ import annotations

import json
import re
from typing import Any

TASK = "Run this in the shell, and tell me what it prints: echo k2hybrid-$((6 * 7))-marker"
COMMAND = "echo k2hybrid-$((6 * 7))-marker"
RESULT = "k2hybrid-42-marker"  # stands in no request: only a shell makes it of the command
FINAL = f"It printed {RESULT}."
TITLE = "A marker from the shell"
FAILED = "The shell did not print what it should."

_SHELLS = ("bash", "shell", "shell_command", "exec_command", "local_shell", "run_shell_command", "terminal")
_COMMAND_PROPERTIES = ("command", "cmd", "script", "input")
_DECLARED = re.compile(r"<\|im_system\|>tool_declare<\|im_middle\|>(.*?)<\|im_end\|>", re.DOTALL)
_CALL = re.compile(r"<\|tool_call_begin\|>")


def answer(prompt: str) -> str:
    """The answer to `prompt`, control tokens by their spelling, the end token included."""
    tool = _shell(prompt)
    results = prompt.split("## Return of ")[1:]
    if results:
        said = FINAL if RESULT in results[-1] else FAILED
        return _text("The shell has answered.", said)
    if tool is None:
        return _text("A title is asked for.", TITLE)
    name, arguments = tool
    header = f"functions.{name}:{len(_CALL.findall(prompt))}"
    call = f"<|tool_call_begin|>{header}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"
    section = f"<|tool_calls_section_begin|>{call}<|tool_calls_section_end|>"
    return f"<think>The shell can do that.</think>I run it.{section}<|im_end|>"


def _text(reasoning: str, content: str) -> str:
    return f"<think>{reasoning}</think>{content}<|im_end|>"


def _shell(prompt: str) -> tuple[str, str] | None:
    """Name of the declared shell, and the arguments that run the command in it."""
    declared = _DECLARED.search(prompt)
    for tool in json.loads(declared[1]) if declared else ():
        function = tool.get("function") or {}
        if str(function.get("name", "")).lower() in _SHELLS:
            schema = function.get("parameters") or {}
            return function["name"], json.dumps(_arguments(schema), separators=(",", ":"))
    return None


def _arguments(schema: dict[str, Any]) -> dict[str, Any]:
    """The required properties, in sorted order, and the one that holds the command."""
    properties = schema.get("properties") or {}
    command = next(name for name in _COMMAND_PROPERTIES if name in properties)
    wanted = sorted({*(schema.get("required") or ()), command})
    return {
        name: _command(properties[name]) if name == command else _any(properties[name]) for name in wanted
    }


def _command(schema: dict[str, Any]) -> str | list[str]:
    return ["bash", "-lc", COMMAND] if schema.get("type") == "array" else COMMAND


def _any(schema: dict[str, Any]) -> Any:
    """A value that fits a simple schema."""
    if "enum" in schema:
        return schema["enum"][0]
    if "anyOf" in schema:
        return _any(schema["anyOf"][0])
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind in ("integer", "number"):
        return schema.get("minimum", 10)
    return {"boolean": False, "array": [], "object": {}, "null": None}.get(str(kind), "Prints a marker")
