"""One thing that `doctor` found, why it matters, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "bad"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`warn`: slower than it could be, or a risk; `bad`: something will not work. Both have a `fix`."""

    topic: str
    level: Level
    found: str
    why: str = ""
    fix: str = ""  # commands or BIOS settings; on an "ok" finding, what could still be better

    def __post_init__(self) -> None:
        if self.level != "ok" and not (self.why and self.fix):
            raise ValueError(f"the finding {self.topic!r} lacks its reason or its fix")


def gib(size: float) -> str:
    """Bytes for people: in GiB, a decimal below 100."""
    value = size / (1 << 30)
    return f"{value:.0f} GiB" if value >= 100 else f"{value:.1f} GiB"
