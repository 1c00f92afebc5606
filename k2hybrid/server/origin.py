"""Which web pages may talk to this server: its own, and those of the origins that were allowed.

A browser sends some requests of any page to any address, without asking. Whether the page may read the answer
is its affair; by then hours may have been computed. So a foreign page's request is refused before it is read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from starlette.datastructures import Headers

ANY = "*"
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_EXPOSED = "x-request-id, x-should-retry, retry-after"
_METHODS = "GET, POST, DELETE"
_PREFLIGHT_S = 600


class Origins:
    """What is said to requests that a web page makes.

    Args:
        allowed: as browsers spell them, "null" (a page without a place) and "*" (any) among them.
    """

    def __init__(self, allowed: Collection[str]) -> None:
        self._allowed = frozenset(map(str.lower, allowed))

    def admits(self, headers: Headers) -> bool:
        """Whether this request comes from no page, from this server's own, or from an allowed one."""
        origins = headers.getlist("origin")
        return all(
            not origin or self._allows(origin) or _is_own(origin, headers.get("host", ""))
            for origin in origins
        )

    def _allows(self, origin: str) -> bool:
        return ANY in self._allowed or origin.lower() in self._allowed

    def headers(self, headers: Headers) -> Mapping[str, str]:
        """What lets an allowed page of another origin read the answer; nothing for any other."""
        origin = headers.get("origin", "")
        if not origin or not self._allows(origin):
            return {}
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Expose-Headers": _EXPOSED,
        }

    def preflight(self, headers: Headers) -> Mapping[str, str]:
        """What an allowed page may do; `headers` are those of an OPTIONS request that asks."""
        granted = {
            "Access-Control-Allow-Methods": _METHODS,
            "Access-Control-Allow-Headers": headers.get("access-control-request-headers", "content-type"),
            "Access-Control-Max-Age": str(_PREFLIGHT_S),
        }
        if headers.get("access-control-request-private-network") == "true":
            granted["Access-Control-Allow-Private-Network"] = "true"
        return granted


def is_preflight(method: str, headers: Headers) -> bool:
    """Whether a browser asks what a page may do, before it does it."""
    return method == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers


def _is_own(origin: str, host: str) -> bool:
    """Whether `origin` is where `host`, as the browser was told it, is served from."""
    scheme, _, place = origin.lower().partition("://")
    port = _DEFAULT_PORTS.get(scheme)
    return port is not None and place.removesuffix(port) == host.strip().lower().removesuffix(port)
