"""The tools of the Responses dialect → chat functions, and back from the names the model calls. Pure.

Three kinds can be offered: functions; `custom` tools, whose input is free text, as functions of one string;
and the functions inside a `namespace`, under their own names where no other tool has them. Whatever else is
there (web search, MCP, …) runs on its vendor's machines and is left out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from k2hybrid.server.chat_tools import MAX_TOOLS, TOOL_NAME
from k2hybrid.server.fields import Fields, wrong_type, wrong_value
from k2hybrid.types import ToolChoice

OFFERED = frozenset({"function", "custom", "namespace"})
_NAME = re.compile(TOOL_NAME, re.ASCII)
_NOT_NAME = re.compile(r"[^\w.\-]", re.ASCII)
_INPUT = {"type": "string", "description": "The whole input, as plain text."}


@dataclass(frozen=True, slots=True)
class Origin:
    """What a function that the model calls is to the client."""

    name: str
    namespace: str | None = None
    custom: bool = False  # called with a text, not with JSON


@dataclass(frozen=True, slots=True)
class Toolbox:
    """`functions` as the model reads them; `origins` by the names it calls; `hosted`: some were left out."""

    functions: tuple[Mapping[str, Any], ...] = ()
    origins: Mapping[str, Origin] = field(default_factory=dict)
    hosted: bool = False
    _called: Mapping[tuple[str, str | None], str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_called", _names(self.origins))

    def origin(self, called: str) -> Origin:
        """What the client knows `called` as."""
        return self.origins.get(called) or Origin(called)

    def find(self, name: str, namespace: str | None) -> str | None:
        """What the model calls the client's tool; without a namespace, whichever has that name."""
        return self._called.get((name, namespace))

    def only(self, called: Collection[str]) -> Toolbox:
        """Those alone."""
        kept = tuple(tool for tool in self.functions if tool["function"]["name"] in called)
        return replace(self, functions=kept)


def _names(origins: Mapping[str, Origin]) -> dict[tuple[str, str | None], str]:
    """What the model calls tools, by their names with and without namespace; its own name comes first."""
    names: dict[tuple[str, str | None], str] = {}
    for called, origin in origins.items():
        for key in ((origin.name, origin.namespace), (origin.name, None)):
            if called == origin.name:
                names[key] = called
            else:
                names.setdefault(key, called)
    return names


def parse_toolbox(entries: Sequence[Fields]) -> Toolbox:
    """The tools of a request."""
    usable = list(_usable(entries))
    if len(usable) > MAX_TOOLS:
        raise wrong_value("tools", f"has {len(usable)} entries; at most {MAX_TOOLS}")
    plain = {_name(tool) for tool, namespace in usable if namespace is None}
    functions: list[Mapping[str, Any]] = []
    origins: dict[str, Origin] = {}
    seen: set[Origin] = set()
    for tool, namespace in usable:
        origin = Origin(_name(tool), namespace, tool.text("type") == "custom")
        if origin in seen:
            continue  # declared twice, as when an item of the history declares it again
        seen.add(origin)
        called = origin.name
        if namespace is not None and (called in plain or called in origins):
            called = _apart(namespace, called, plain | origins.keys())
        if called not in origins:
            origins[called] = origin
            functions.append(_function(tool, called, custom=origin.custom))
    hosted = any(tool.value.get("type") not in OFFERED for tool in entries)
    return Toolbox(tuple(functions), origins, hosted)


def _usable(entries: Sequence[Fields]) -> Iterator[tuple[Fields, str | None]]:
    """Functions and custom tools, each with the namespace it lies in."""
    for tool in entries:
        kind = tool.required_text("type")
        if kind in ("function", "custom"):
            yield tool, None
        elif kind == "namespace":
            namespace = tool.required_text("name")
            for inner in tool.objects("tools"):
                if inner.required_text("type") in ("function", "custom"):
                    yield inner, namespace


def _name(tool: Fields) -> str:
    name = tool.required_text("name")
    if not _NAME.fullmatch(name):
        raise wrong_value(tool.name("name"), "may hold letters, digits, '_', '.' and '-' only, at most 256")
    return name


def _apart(namespace: str, name: str, taken: Collection[str]) -> str:
    """A name for a function whose own another tool has."""
    stem = f"{_NOT_NAME.sub('_', namespace).rstrip('_')}__{name}"[-240:]
    called, n = stem, 1
    while called in taken:
        n += 1
        called = f"{stem}_{n}"
    return called


def _function(tool: Fields, called: str, *, custom: bool) -> Mapping[str, Any]:
    description = tool.text("description")
    if custom:
        description = "\n\n".join(filter(None, (description, _grammar(tool))))
        parameters: Any = {"type": "object", "properties": {"input": _INPUT}, "required": ["input"]}
    else:
        parameters = tool.value.get("parameters")
        if parameters is not None and not isinstance(parameters, dict):
            raise wrong_type(tool.name("parameters"), "an object (a JSON schema)", parameters)
    function: dict[str, Any] = {"name": called}
    if description:
        function["description"] = description
    if parameters is not None:
        function["parameters"] = parameters
    return {"type": "function", "function": function}


def _grammar(tool: Fields) -> str | None:
    """What a custom tool's input must look like, in words: the model can only be told."""
    shape = tool.child("format")
    definition = shape.text("definition")
    if not definition:
        return None
    return f"The input follows this grammar ({shape.text('syntax', 'lark')}):\n{definition}"


def custom_arguments(text: str) -> str:
    """The arguments of a custom tool's function, called with `text`."""
    return orjson.dumps({"input": text}).decode()


def custom_input(arguments: str) -> str:
    """The text that a custom tool was called with; whatever is no such call is passed on as it stands."""
    try:
        value = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return arguments
    text = value.get("input") if isinstance(value, dict) else None
    return text if isinstance(text, str) else arguments


def parse_choice(value: Any, box: Toolbox) -> tuple[Toolbox, ToolChoice, str | None]:
    """What may be called, whether it must be, and the one function that must, if one is named."""
    if value is None:
        return box, "auto", None
    if isinstance(value, str):
        if value not in ("auto", "none", "required"):
            raise wrong_value(
                "tool_choice", f"{value[:40]!r} is unknown; one of auto, none, required, or an object"
            )
        return box, "none" if value == "none" else _mode(value, box), None
    if not isinstance(value, dict):
        raise wrong_type("tool_choice", "a string or an object", value)
    choice = Fields(value, "tool_choice")
    kind = choice.required_text("type")
    if kind in ("function", "custom"):
        name = choice.required_text("name")
        called = box.find(name, choice.text("namespace"))
        if called is None:
            raise wrong_value("tool_choice", f"names {name[:40]!r}, which is not among the tools")
        return box, "required", called
    if kind != "allowed_tools":
        return box, "auto", None  # a hosted tool, which is not offered
    mode = choice.text("mode") or "auto"
    if mode not in ("auto", "required"):
        raise wrong_value("tool_choice.mode", f"{mode[:40]!r} is unknown; one of auto, required")
    allowed = box.only(_allowed(choice.objects("tools"), box))
    return allowed, _mode(mode, allowed), None


def _mode(mode: str, box: Toolbox) -> ToolChoice:
    if mode == "auto":
        return "auto"
    if box.functions:
        return "required"
    if box.hosted:  # the client has tools, but none that could be called here
        return "auto"
    raise wrong_value("tool_choice", "is 'required' but there are no tools")


def _allowed(tools: Sequence[Fields], box: Toolbox) -> set[str]:
    allowed = set()
    namespaces = set()
    for tool in tools:
        name = tool.text("name") or ""
        if tool.value.get("type") == "namespace":
            namespaces.add(name)
        elif called := box.find(name, tool.text("namespace")):
            allowed.add(called)
    return allowed | {called for called, origin in box.origins.items() if origin.namespace in namespaces}
