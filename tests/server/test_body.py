"""Bodies on the wire: late, never, announced, cut off; and other methods than the right one."""

from __future__ import annotations

import http.client
import json
import socket

import httpx
import pytest

from k2hybrid.server import body
from tests.server.conftest import Served

CHAT = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()


def request_head(length: int | str, *more: str) -> bytes:
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {length}",
        *more,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def connected(server: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def read_to_end(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("begun", [b"", CHAT[:10]])
def test_a_body_that_does_not_come_is_408_and_the_connection_ends(
    server: Served, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    monkeypatch.setattr(body, "IDLE_S", 0.2)
    with connected(server) as stalled:
        stalled.sendall(request_head(len(CHAT)) + begun)
        assert server.chat().status_code == 200  # meanwhile
        head, _, content = read_to_end(stalled).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"x-should-retry: false" in head
    assert json.loads(content)["error"]["code"] == "body_timeout"


def test_a_slow_body_is_waited_for(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "IDLE_S", 5.0)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    pieces = (bytes([byte]) for byte in CHAT)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", body=pieces, headers=headers, encode_chunked=True)
    assert connection.getresponse().status == 200
    connection.close()


def test_a_body_is_asked_for_before_it_is_sent(server: Served) -> None:
    with connected(server) as connection:
        connection.sendall(request_head(len(CHAT), "Expect: 100-continue", "Connection: close"))
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 100 ")
        connection.sendall(CHAT)
        assert read_to_end(connection).startswith(b"HTTP/1.1 200 ")


def test_a_body_that_is_too_large_is_not_asked_for(server: Served) -> None:
    with connected(server) as connection:
        connection.sendall(request_head(body.MAX_BODY_BYTES + 1, "Expect: 100-continue"))
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_goes_while_it_sends_is_forgotten(server: Served) -> None:
    with connected(server) as connection:
        connection.sendall(request_head(len(CHAT)) + CHAT[:10])
    assert server.chat().status_code == 200
    assert len(server.model.requests) == 1


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS"])
@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/v1/messages", "/tokenize", "/detokenize"]
)
def test_only_post_generates(server: Served, method: str, path: str) -> None:
    response = httpx.request(method, server.url + path)
    assert response.status_code == 405
    assert "POST" in response.headers["allow"]
