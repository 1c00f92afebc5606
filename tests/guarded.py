"""A mapped file that is guarded while a test may shrink it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from k2hybrid.native.files import FileMap


@contextmanager
def guarded(path: Path) -> Iterator[np.ndarray]:
    """All bytes of `path` where they are mapped."""
    content = np.memmap(path, mode="c")  # writable, or torch would warn
    with path.open("rb") as file:
        guard = FileMap(content.ctypes.data, content.nbytes, file.fileno())
    try:
        yield content
    finally:
        guard.close()
