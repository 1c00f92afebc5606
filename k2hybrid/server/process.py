"""The server as a process: its socket, what it prints, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Generator, Sequence
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from k2hybrid.errors import ConfigError
from k2hybrid.server.guard import LOOPBACK_HOSTS
from k2hybrid.server.live import LiveRuns

_log = logging.getLogger("k2hybrid.server")

BACKLOG = 2048
# For cancelled answers to tell their clients: the engine first finishes the step it is in.
FAREWELL_S = 10
TICK_S = 0.05
# Clients keep connections between turns, while their tools run.
IDLE_CONNECTION_S = 120


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to `host`:`port` that does not listen yet. ConfigError says what is wrong with them."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ConfigError(f"cannot resolve --host {host}: {error.strerror}") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(_bind_problem(host, port, error)) from None
    return listener


def _bind_problem(host: str, port: int, error: OSError) -> str:
    return (
        f"cannot listen on {host}:{port}: {error.strerror}; choose another --port (0: any free one) or --host"
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def hosts_for(host: str) -> frozenset[str] | None:
    """The Host headers to answer when bound to `host`: on loopback its names, beyond it any."""
    if not is_loopback(host):
        return None
    return LOOPBACK_HOSTS | {f"[{host}]" if ":" in host else host}


def require_key(host: str, keys: Sequence[str], allow_none: bool) -> None:
    """ConfigError if others can reach `host`, no key is asked of them, and that was not said to be right."""
    if not (keys or allow_none or is_loopback(host)):
        raise ConfigError(
            f"anyone who reaches {host} could use this server; use --api-key-file, or --allow-no-key"
        )


def log_to_stderr() -> None:
    """What a server tells while it loads and runs."""
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("k2hybrid").setLevel(logging.INFO)


def print_table(rows: Sequence[tuple[str, str]]) -> None:
    """The resolved options, aligned."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


class _Server(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, live: LiveRuns, drain_s: float, on_stopped: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._live = live
        self._drain_s = drain_s
        self._on_stopped = on_stopped

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say where we are once connections are accepted; scripts wait for this line."""
        await super().startup(sockets)
        # What is loaded stays: a full collection that looks at it would hold up every answer for 0.1 s.
        gc.freeze()
        for listener in sockets or ():
            host, port = listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            print(f"Listening on http://{shown}:{port}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let those inside finish while newcomers are refused; end those that take too long; close.

        Idle connections count for nothing, and are closed.
        """
        self._live.drain()
        if self._live.requests:
            _log.info(
                "ending: waiting up to %g s for %d requests; a second signal ends at once",
                self._drain_s,
                self._live.requests,
            )
        until = time.monotonic() + self._drain_s
        while self._live.requests and time.monotonic() < until:
            await asyncio.sleep(TICK_S)
        self._live.end_all()
        await super().shutdown(sockets)
        # In a thread, so that a second signal finds the main one at leisure.
        await asyncio.to_thread(self._on_stopped)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + number)  # as shells have it; nothing that may block
        self._live.drain()
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """A signal ends the server, not the process, which then exits with 0; a second one ends both."""
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._on_signal) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run(
    app: ASGIApp,
    listener: socket.socket,
    live: LiveRuns,
    *,
    drain_s: float,
    on_stopped: Callable[[], None] = lambda: None,
) -> None:
    """Answer on `listener` until SIGINT or SIGTERM, and then in order to an end.

    Args:
        live: the one that `app` was created with.
        drain_s: seconds that answers under way may then go on; those that take longer are cancelled.
        on_stopped: called in a thread when nothing is answered any more; what it raises is raised here.

    Raises:
        ConfigError: it cannot listen.
    """
    try:
        listener.listen(BACKLOG)
    except OSError as error:  # taken meanwhile: two sockets may be bound to a port until one listens
        host, port = listener.getsockname()[:2]
        raise ConfigError(_bind_problem(host, port, error)) from None
    config = uvicorn.Config(
        app,
        http="h11",  # always there; what else is installed must not change how requests are read
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=IDLE_CONNECTION_S,
        timeout_graceful_shutdown=FAREWELL_S,
    )
    _Server(config, live, drain_s, on_stopped).run(sockets=[listener])
