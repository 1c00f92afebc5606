"""The tools of OpenAI's chat requests, wherever and in whatever generation of the API they stand. Pure.

Tools of other types than `function` are dropped (`builtin_function`, `web_search`, …): the model cannot call
what runs elsewhere. Messages may declare tools too; those are added, the first of a name wins. `functions`
and `function_call` are how tools and the choice among them were spelled before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from k2hybrid.server.fields import Fields, wrong_type, wrong_value
from k2hybrid.types import ToolChoice

MAX_TOOLS = 1024
TOOL_NAME = r"[\w.\-]{1,256}"
_TOOL_NAME = re.compile(TOOL_NAME, re.ASCII)

Tools = tuple[Mapping[str, Any], ...]


def parse_tools(fields: Fields) -> Tools:
    """The functions that a request declares, each as it was sent: the template writes them out as JSON."""
    tools = _declared(fields)
    for function in fields.objects("functions"):
        _check_function(function)
        tools.append({"type": "function", "function": function.value})
    known = {tool["function"]["name"] for tool in tools}
    for message in fields.objects("messages"):
        for tool in _declared(message):
            if (name := tool["function"]["name"]) not in known:
                known.add(name)
                tools.append(tool)
    if len(tools) > MAX_TOOLS:
        raise wrong_value("tools", f"has {len(tools)} entries; at most {MAX_TOOLS}")
    return tuple(tools)


def _declared(fields: Fields) -> list[Mapping[str, Any]]:
    """The `function` tools under `tools`."""
    declared = []
    for tool in fields.objects("tools"):
        if tool.text("type", "function") == "function":
            _check_function(tool.child("function"))
            declared.append(tool.value)
    return declared


def _check_function(function: Fields) -> None:
    name = function.required_text("name")
    if not _TOOL_NAME.fullmatch(name):
        raise wrong_value(
            function.name("name"), "may hold letters, digits, '_', '.' and '-' only, at most 256"
        )
    function.text("description")
    parameters = function.value.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise wrong_type(function.name("parameters"), "an object (a JSON schema)", parameters)


def parse_tool_choice(fields: Fields, tools: Tools) -> tuple[ToolChoice, str | None]:
    """auto, none or required; and with it the name of the one function to call, if one is named."""
    value = fields.value.get("tool_choice")
    if value is not None:
        return _choice("tool_choice", value, tools)
    value = fields.value.get("function_call")
    if isinstance(value, dict):
        value = {"function": value}
    return _choice("function_call", value, tools)


def _choice(key: str, value: Any, tools: Tools) -> tuple[ToolChoice, str | None]:
    if value is None:
        return "auto", None
    if value == "auto" or value == "none":
        return value, None
    if value == "required":
        if not tools:
            raise wrong_value(key, "is 'required' but there are no tools")
        return "required", None
    if isinstance(value, str):
        raise wrong_value(key, f"{value[:40]!r} is unknown; one of auto, none, required, or an object")
    if not isinstance(value, dict):
        raise wrong_type(key, "a string or an object", value)
    name = Fields(value, key).child("function").required_text("name")
    if name not in {tool["function"]["name"] for tool in tools}:
        raise wrong_value(key, f"names {name[:40]!r}, which is not among the tools")
    return "required", name
