"""Engine and chat joined: the Python API. Layer 5.

with load(MODEL) as runtime:
    for delta in runtime.chat(ChatRequest((Message("user", "Hello"),))):
        print(delta.events)

What follows comes at its first use: devices are measured by parts of this room that need no chat.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from k2hybrid.runtime.chat import ChatRun, Delta
    from k2hybrid.runtime.generate import TokenRun
    from k2hybrid.runtime.loading import load
    from k2hybrid.runtime.runtime import Runtime

__all__ = ["ChatRun", "Delta", "Runtime", "TokenRun", "load"]

_PART_OF = {
    "ChatRun": "chat",
    "Delta": "chat",
    "Runtime": "runtime",
    "TokenRun": "generate",
    "load": "loading",
}


def __getattr__(name: str) -> Any:
    part = _PART_OF.get(name)
    if part is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{part}"), name)
    globals()[name] = value
    return value
