"""/v1/models, in the dialect of whoever asks."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from k2hybrid.server.failures import is_anthropic, json_response
from k2hybrid.server.served import ServedModel


class Models:
    """The list with its one entry, and that entry: the one `model`, under `name`."""

    def __init__(self, model: ServedModel, name: str) -> None:
        self._model = model
        self._name = name
        self._created = int(time.time())

    async def every(self, request: Request) -> Response:
        """The list."""
        if not is_anthropic(request.scope):
            return json_response({"object": "list", "data": [self._openai()]})
        ends = {"first_id": self._name, "last_id": self._name}
        return json_response({"data": [self._anthropic()], "has_more": False, **ends})

    async def one(self, request: Request) -> Response:
        """The entry, whatever name was asked for: any of them is answered by it."""
        return json_response(self._anthropic() if is_anthropic(request.scope) else self._openai())

    def _openai(self) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": "model",
            "created": self._created,
            "owned_by": "k2hybrid",
            "max_model_len": self._model.context_tokens,
        }

    def _anthropic(self) -> dict[str, Any]:
        created = datetime.fromtimestamp(self._created, UTC).isoformat().replace("+00:00", "Z")
        return {
            "type": "model",
            "id": self._name,
            "display_name": self._name,
            "created_at": created,
            "lifecycle": "active",
            "max_input_tokens": self._model.context_tokens,
            "max_tokens": self._model.context_tokens,
        }
