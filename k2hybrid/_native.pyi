# The extension is typed where it is wrapped: k2hybrid/native/.
from typing import Any

def __getattr__(name: str) -> Any: ...
