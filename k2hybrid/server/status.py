"""GET /status: what the server and its model are at, for the page and for scripts."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from k2hybrid.hardware.doctor import package_version
from k2hybrid.server.failures import json_response
from k2hybrid.server.live import LiveRuns
from k2hybrid.server.served import ServedModel

_HEADERS = {"Cache-Control": "no-store"}


class Status:
    """Answers with the figures of this moment; its uptime begins with it.

    Args:
        name: of the model, as clients see it.
        key_required: whether requests need an API key.
    """

    def __init__(self, model: ServedModel, name: str, live: LiveRuns, *, key_required: bool) -> None:
        self._model = model
        self._live = live
        self._started_s = time.monotonic()
        self._facts = {
            "name": "k2hybrid",
            "version": package_version(),
            "model": name,
            "context_tokens": model.context_tokens,
            "key_required": key_required,
        }

    def figures(self) -> dict[str, Any]:
        """Those of the server, beside what `ServedModel.status` tells."""
        server = {
            **self._facts,
            "uptime_s": time.monotonic() - self._started_s,
            "draining": self._live.draining,
            "answers": len(self._live),
        }
        return {"server": server, **self._model.status()}

    async def answer(self, _request: Request) -> Response:
        """All of it as JSON."""
        return json_response(self.figures(), headers=_HEADERS)
