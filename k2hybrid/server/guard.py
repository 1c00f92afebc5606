"""What stands before every request: id, host, origin and key, and the last exception handler."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import traceback
import uuid
from collections.abc import Collection, Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from k2hybrid.errors import K2Error
from k2hybrid.server.failures import HttpError, ShuttingDownError, classify, failure_response, is_anthropic
from k2hybrid.server.live import LiveRuns
from k2hybrid.server.origin import Origins, is_preflight
from k2hybrid.server.page import STATIC_PATHS

_log = logging.getLogger("k2hybrid.server")

# Needed before a client can show anything; they tell that a server is here, and the model's name.
OPEN_PATHS = frozenset({"/", "/health", "/v1/models", "/openapi.json", *STATIC_PATHS})
# Answered while the server ends: balancers, scripts and the page ask there whether it does.
DRAIN_PATHS = frozenset({"/health", "/status"})
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
SCOPE_CHARS = 16  # of hexadecimal digits: enough to tell the keys of one file apart


def request_id(scope: Scope) -> str:
    """The id under which the log knows this request; the client gets it as `x-request-id`."""
    return str(scope["state"]["request_id"])


def key_scope(scope: Scope) -> str:
    """The namespace of the API key that this request came with; "" where no key is asked for."""
    return str(scope["state"].get("key_scope", ""))


def log_unexpected(error: BaseException, scope: Scope) -> None:
    """Log, once, what nobody foresaw: its type and where. Not its message, which may quote a prompt."""
    state = scope["state"]
    if isinstance(error, K2Error) or state.get("logged") is error:
        return
    state["logged"] = error
    frames = "".join(traceback.format_tb(error.__traceback__))
    _log.error("%s: unexpected %s\n%s", request_id(scope), type(error).__name__, frames)


class ApiKeys:
    """The accepted keys; with none, everything is let in, into one namespace."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = {_digest(key): _scope_of(key) for key in keys}

    def scope(self, headers: Headers) -> str | None:
        """The namespace of the key that came as Bearer or as x-api-key; None if no right one did.

        Takes the same time whichever byte of a wrong key differs.
        """
        if not self._digests:
            return ""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        offered = [headers.get("x-api-key", "")]
        if scheme.lower() == "bearer":
            offered.append(bearer.strip())
        # No early exit: all pairs are compared.
        right = [
            scope
            for key in offered
            for known, scope in self._digests.items()
            if hmac.compare_digest(_digest(key), known)
        ]
        return right[-1] if right else None  # two right keys: the Bearer one


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _scope_of(key: str) -> str:
    """Another digest than the one compared: this one may come to lie on a disk."""
    return hashlib.sha256(b"scope\0" + key.encode()).hexdigest()[:SCOPE_CHARS]


class Guard:
    """ASGI middleware around the whole application.

    Args:
        hosts: the Host names answered, without port; None: any. A server on loopback must check, or a web
            page whose name is rebound to 127.0.0.1 could talk to it.
        origins: which pages may talk to it.
        live: counts who is inside; while it drains, newcomers are refused.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys,
        hosts: Collection[str] | None,
        origins: Origins,
        live: LiveRuns,
    ) -> None:
        self._app = app
        self._keys = keys
        self._hosts = hosts
        self._origins = origins
        self._live = live

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on; whatever comes up from below ends here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        identity = f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = identity
        ids = {"x-request-id": identity}
        if is_anthropic(scope):
            ids["request-id"] = identity  # their name for it
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                granted = self._origins.headers(headers)
                answered = MutableHeaders(scope=message)
                answered.update({**ids, **granted})
                if granted:  # to this page, not to the next
                    answered.add_vary_header("Origin")
            await send(message)

        try:
            self._check_place(headers)
            if is_preflight(scope["method"], headers):  # it brings no key
                granted = Response(status_code=204, headers=self._origins.preflight(headers))
                await granted(scope, receive, send_with_id)
                return
            self._check(scope, headers)
            with self._live.request():
                await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:
            return  # the process ends; there is nobody left to hear about it
        except Exception as error:
            log_unexpected(error, scope)
            if not started:  # else nothing more can be said; the connection closes unfinished
                await failure_response(classify(error, identity), scope)(scope, receive, send_with_id)

    def _check_place(self, headers: Headers) -> None:
        """Where the request believes to be, and what page it comes from."""
        offered = headers.get("host", "")
        host = host_name(offered)
        # Without a Host header it is no browser.
        if self._hosts is not None and offered and host not in self._hosts:
            raise HttpError(
                403,
                f"the host {offered!r} is not served here; use localhost, or bind to another address",
                kind="permission_error",
                code="host_not_allowed",
            )
        if not self._origins.admits(headers):
            raise HttpError(
                403,
                "web pages of other origins are not served; allow this one with --allow-origin ORIGIN",
                kind="permission_error",
                code="origin_not_allowed",
            )

    def _check(self, scope: Scope, headers: Headers) -> None:
        if self._live.draining and scope["path"] not in DRAIN_PATHS:
            raise ShuttingDownError("the server is shutting down and takes no more requests; try again later")
        if scope["path"] in OPEN_PATHS:
            return
        key_scope = self._keys.scope(headers)
        if key_scope is None:
            raise HttpError(
                401,
                "missing or wrong API key; send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
                kind="authentication_error",
                code="invalid_api_key",
            )
        scope["state"]["key_scope"] = key_scope


def host_name(header: str) -> str:
    """A Host header without its port, lower case; IPv6 keeps its brackets."""
    host = header.strip().lower()
    if host.startswith("["):
        return host[: host.find("]") + 1]
    return host.partition(":")[0]
