"""What every chunk and completion of one OpenAI response starts with."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from k2hybrid.hardware.doctor import package_version


@dataclass(frozen=True, slots=True)
class Head:
    """The common fields."""

    id: str
    created: int  # seconds since 1970
    model: str
    kind: str  # of object, whole: a chunk's may have another name
    fingerprint: str

    @classmethod
    def new(cls, prefix: str, model: str, kind: str) -> Head:
        """The head of a response that begins now."""
        fingerprint = f"k2hybrid-{package_version()}".replace(" ", "-")
        return cls(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model, kind, fingerprint)

    def whole(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A whole completion."""
        return {**self._fields(self.kind), "choices": list(choices), **more}

    def chunk(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """One stream chunk."""
        kind = "chat.completion.chunk" if self.kind == "chat.completion" else self.kind
        return {**self._fields(kind), "choices": list(choices), **more}

    def _fields(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }
