"""What the assistant thinks before it calls: one small step after another, each a look at one place.

First the declared tools in their order, each with a verdict; a tool that serves is named once more:

    get_time:no
    get_weather:yes get_weather

Then a line for each call: the parameters in the order of the declaration, each with a verdict, and those that
are given with their type and value, and named once more. The call itself only copies them:

    call get_weather;city:yes string "Oslo" city;unit:no;
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from k2hybrid.mini_eval.toolbox import Tool


def walk(tools: Sequence[Tool], serving: Collection[Tool] = ()) -> str:
    """The declared tools in order, each with whether it serves."""
    names = {tool.name for tool in serving}
    return "\n".join(f"{t.name}:yes {t.name}" if t.name in names else f"{t.name}:no" for t in tools)


def call_line(tool: Tool, arguments: dict[str, Any]) -> str:
    """The parameters of one call, as the declaration has them: sorted by name."""
    properties = tool.declaration["function"]["parameters"]["properties"]
    line = f"call {tool.name};"
    for name in sorted(properties):
        if name in arguments:
            value = json.dumps(arguments[name], ensure_ascii=False)
            line += f"{name}:yes {properties[name]['type']} {value} {name};"
        else:
            line += f"{name}:no;"
    return line
