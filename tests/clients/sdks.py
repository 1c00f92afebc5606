"""Python packages: the loop that an agent would run, by hand, streamed and not."""

from __future__ import annotations

import importlib
import json
import subprocess
from collections.abc import Callable
from typing import Any

from tests.clients.packages import UnavailableError
from tests.clients.reader import TASK

_SCHEMA = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}
_TURNS = 4


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(f"the package {name} is not installed") from error


def _run(arguments: str | dict[str, Any]) -> str:
    given = json.loads(arguments) if isinstance(arguments, str) else arguments
    return subprocess.run(["bash", "-c", given["command"]], capture_output=True, text=True, timeout=60).stdout


def openai_chat(url: str, stream: bool) -> str:
    """Chat completions; what the model says in the end."""
    client = _module("openai").OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
    function = {"name": "bash", "description": "Run a command.", "parameters": _SCHEMA}
    options = {"model": "k2", "tools": [{"type": "function", "function": function}]}
    messages: list[Any] = [{"role": "user", "content": TASK}]
    for _ in range(_TURNS):
        if stream:
            with client.chat.completions.stream(messages=messages, **options) as events:
                for _event in events:
                    pass
                choice = events.get_final_completion().choices[0]
        else:
            choice = client.chat.completions.create(messages=messages, **options).choices[0]
        if choice.finish_reason != "tool_calls":
            return str(choice.message.content)
        messages.append(choice.message.model_dump(exclude_none=True, exclude={"parsed"}))
        for call in choice.message.tool_calls:
            result = _run(call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    raise AssertionError("it calls without an end")


def openai_responses(url: str, stream: bool) -> str:
    """Responses, continued by id; what the model says in the end."""
    client = _module("openai").OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
    tool = {"type": "function", "name": "bash", "description": "Run a command.", "parameters": _SCHEMA}
    options: dict[str, Any] = {"model": "k2", "tools": [{**tool, "strict": False}]}
    given: Any = TASK
    for _ in range(_TURNS):
        if stream:
            with client.responses.stream(input=given, **options) as events:
                for _event in events:
                    pass
                response = events.get_final_response()
        else:
            response = client.responses.create(input=given, **options)
        calls = [item for item in response.output if item.type == "function_call"]
        if not calls:
            return str(response.output_text)
        given = [
            {"type": "function_call_output", "call_id": call.call_id, "output": _run(call.arguments)}
            for call in calls
        ]
        options["previous_response_id"] = response.id
    raise AssertionError("it calls without an end")


def anthropic_messages(url: str, stream: bool) -> str:
    """Messages, with thinking sent back; what the model says in the end."""
    client = _module("anthropic").Anthropic(base_url=url, api_key="x", max_retries=0)
    tool = {"name": "bash", "description": "Run a command.", "input_schema": _SCHEMA}
    options = {
        "model": "k2", "max_tokens": 4096, "tools": [tool],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }  # fmt: skip
    messages: list[Any] = [{"role": "user", "content": TASK}]
    for _ in range(_TURNS):
        if stream:
            with client.messages.stream(messages=messages, **options) as events:
                for _event in events:
                    pass
                message = events.get_final_message()
        else:
            message = client.messages.create(messages=messages, **options)
        calls = [block for block in message.content if block.type == "tool_use"]
        if message.stop_reason != "tool_use":
            return "".join(block.text for block in message.content if block.type == "text")
        messages.append({"role": "assistant", "content": message.content})
        results = [
            {"type": "tool_result", "tool_use_id": call.id, "content": _run(call.input)} for call in calls
        ]
        messages.append({"role": "user", "content": results})
    raise AssertionError("it calls without an end")


SDKS: dict[str, Callable[[str, bool], str]] = {
    "openai-chat": openai_chat,
    "openai-responses": openai_responses,
    "anthropic-messages": anthropic_messages,
}
