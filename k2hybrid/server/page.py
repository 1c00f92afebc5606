"""GET /: a page that shows what the server is at, for browsers; whoever asks for no HTML gets a line of JSON.

The page is one file each of HTML, CSS and JavaScript. It knows nothing by itself: it asks GET /status, with a
key where one is needed, so it is served to anybody.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from k2hybrid.hardware.doctor import package_version
from k2hybrid.server.failures import json_response

_FOLDER = Path(__file__).parent / "static"
_PAGE = "page.html"
_TYPES = {
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
STATIC_PATHS = tuple(f"/static/{name}" for name in _TYPES)

# Only files of our own, no script or style within the page, no frame around it, and text that came from
# elsewhere can never become markup.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Cache-Control": "no-cache",  # ask whether it changed: after an update page and script belong together
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_HTML, _JSON = "text/html", "application/json"


class _File:
    """A file of the page, read once."""

    def __init__(self, name: str, media_type: str, headers: Mapping[str, str]) -> None:
        self._content = (_FOLDER / name).read_bytes()
        self._media_type = media_type
        self._tag = f'"{hashlib.sha256(self._content).hexdigest()[:16]}"'
        self._headers = {**_HEADERS, **headers, "ETag": self._tag}

    def answer(self, request: Request) -> Response:
        """The file, or 304 to who has it."""
        known = request.headers.get("if-none-match", "").split(",")
        if any(tag.strip().removeprefix("W/") in (self._tag, "*") for tag in known):
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, headers=self._headers, media_type=self._media_type)


class Page:
    """The page and what belongs to it; `name` is the model's, as clients see it."""

    def __init__(self, name: str) -> None:
        self._about = {"name": "k2hybrid", "version": package_version(), "model": name}
        self._page = _File(_PAGE, f"{_HTML}; charset=utf-8", {"Vary": "Accept"})
        self._files = {f"/static/{name}": _File(name, kind, {}) for name, kind in _TYPES.items()}

    async def root(self, request: Request) -> Response:
        """The page, or what an API client wants to know of a server."""
        if prefers_html(request.headers.get("accept", "")):
            return self._page.answer(request)
        return json_response(self._about, headers={"Vary": "Accept"})

    async def static(self, request: Request) -> Response:
        """A file of `STATIC_PATHS`."""
        return self._files[request.url.path].answer(request)


def prefers_html(accept: str) -> bool:
    """Whether an Accept header wants HTML rather than JSON, as those of browsers do; `*/*` does not."""
    weights = dict(_weight(part) for part in accept.lower().split(",") if part.strip())

    def weight(kind: str) -> float:
        ranges = (kind, f"{kind.partition('/')[0]}/*", "*/*")
        return next((weights[found] for found in ranges if found in weights), 0.0)

    return weight(_HTML) > weight(_JSON)


def _weight(part: str) -> tuple[str, float]:
    """A media range and its q; 0 for one that is no number."""
    kind, *parameters = (piece.strip() for piece in part.split(";"))
    quality = next((p.partition("=")[2] for p in parameters if p.startswith("q=")), "1")
    try:
        return kind, float(quality)
    except ValueError:
        return kind, 0.0
