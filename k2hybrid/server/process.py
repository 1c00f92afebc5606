"""The server as a process: its socket, what it prints, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Callable, Generator, Sequence

import uvicorn
from starlette.types import ASGIApp

from k2hybrid.errors import ConfigError
from k2hybrid.server.guard import LOOPBACK_HOSTS

BACKLOG = 2048
# After a signal, answers under way get this long to finish; then they are cancelled, and their clients told.
# Ctrl-C a second time ends everything at once.
GRACE_S = 5
# For the cancelled ones to say so.
FAREWELL_S = 3
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


def print_table(rows: Sequence[tuple[str, str]]) -> None:
    """The resolved options, aligned."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, end_answers: Callable[[], None]) -> None:
        super().__init__(config)
        self._end_answers = end_answers

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say where we are once connections are accepted; scripts wait for this line."""
        await super().startup(sockets)
        for listener in sockets or ():
            host, port = listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            print(f"Listening on http://{shown}:{port}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, and end those that take too long."""
        timer = asyncio.get_running_loop().call_later(GRACE_S, self._end_answers)
        await super().shutdown(sockets)
        timer.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals end the server, not the process: the caller has a model to close, and exits with 0."""
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run(app: ASGIApp, listener: socket.socket, end_answers: Callable[[], None]) -> None:
    """Answer on `listener` until SIGINT or SIGTERM; `end_answers` cancels those that then take too long.

    Raises ConfigError if it cannot listen.
    """
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("k2hybrid").setLevel(logging.INFO)
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
        timeout_graceful_shutdown=GRACE_S + FAREWELL_S,
    )
    _Server(config, end_answers).run(sockets=[listener])
