"""k2hybrid runs Kimi-K2-Thinking on one workstation.

    import k2hybrid
    with k2hybrid.load("path/to/checkpoint") as runtime: ...

Importing the package costs nothing: `load` and the classes below come with their rooms at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from k2hybrid.config import RuntimeConfig
    from k2hybrid.runtime import ChatRun, Delta, Runtime, TokenRun, load
    from k2hybrid.types import ChatRequest, Message, SamplingParams, ToolCall

__version__ = "0.1.0"

_ROOMS = {
    "k2hybrid.config": ("RuntimeConfig",),
    "k2hybrid.runtime": ("ChatRun", "Delta", "Runtime", "TokenRun", "load"),
    "k2hybrid.types": ("ChatRequest", "Message", "SamplingParams", "ToolCall"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "ChatRequest",
    "ChatRun",
    "Delta",
    "Message",
    "Runtime",
    "RuntimeConfig",
    "SamplingParams",
    "TokenRun",
    "ToolCall",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    room = _ROOM_OF.get(name)
    if room is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(room), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
