"""Engine and chat joined: the Python API. Layer 5.

with load(MODEL) as runtime:
    for delta in runtime.chat(ChatRequest((Message("user", "Hello"),))):
        print(delta.events)
"""

from k2hybrid.runtime.chat import ChatRun, Delta
from k2hybrid.runtime.generate import TokenRun
from k2hybrid.runtime.loading import load
from k2hybrid.runtime.runtime import Runtime

__all__ = ["ChatRun", "Delta", "Runtime", "TokenRun", "load"]
