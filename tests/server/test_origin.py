"""Web pages: whose requests are answered, and what they may read."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from k2hybrid.cli import build_parser
from k2hybrid.server.app import Settings
from k2hybrid.types import Content
from tests.server.conftest import Served, serving
from tests.server.scripted import Script, ScriptedModel, Step

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def allowing() -> Iterator[Served]:
    settings = Settings(api_keys=("key",), origins=("https://app.example", "http://localhost:3000", "null"))
    with serving(ScriptedModel(Script([Step((Content("ok"),))])), settings) as served:
        yield served


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "https://localhost.evil.example",
        "http://localhost:3000",
        "chrome-extension://abcdef",
        "file://",
        "null",
        "nonsense",
    ],
)
def test_a_foreign_page_is_refused_before_anything_is_read(server: Served, origin: str) -> None:
    for headers in ({"content-type": "application/json"}, {"content-type": "text/plain"}, {}):
        response = server.post(PATH, content=b"{", headers={"origin": origin, **headers})
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "origin_not_allowed"
        assert "--allow-origin" in response.json()["error"]["message"]
        assert not [name for name in response.headers if name.startswith("access-control")]
    for path in ("/", "/health", "/v1/models"):
        assert httpx.get(server.url + path, headers={"origin": origin}).status_code == 403
    preflight = {"origin": origin, "access-control-request-method": "POST"}
    assert httpx.options(server.url + PATH, headers=preflight).status_code == 403
    assert not server.model.requests


def test_one_allowed_header_does_not_cover_another(allowing: Served) -> None:
    headers = [("origin", "https://app.example"), ("origin", "http://evil.example"), ("x-api-key", "key")]
    assert allowing.post(PATH, json=CHAT, headers=headers).status_code == 403


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("LOCALHOST:8000", "http://localhost:8000"),
        ("localhost", "http://localhost"),
        ("localhost", "http://localhost:80"),
        ("localhost:443", "https://localhost"),
        ("[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_the_servers_own_page_is_answered(server: Served, host: str, origin: str) -> None:
    response = server.post(PATH, json=CHAT, headers={"host": host, "origin": origin})
    assert response.status_code == 200
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("origin", ["http://localhost:8001", "https://localhost:80", "ftp://localhost:8000"])
def test_another_port_or_scheme_is_another_place(server: Served, origin: str) -> None:
    headers = {"host": "localhost:8000", "origin": origin}
    assert server.post(PATH, json=CHAT, headers=headers).status_code == 403


@pytest.mark.parametrize("origin", ["https://app.example", "http://localhost:3000", "null"])
def test_an_allowed_page_may_read_what_it_asked_for(allowing: Served, origin: str) -> None:
    for headers, status in (({"x-api-key": "key"}, 200), ({}, 401)):
        response = allowing.post(PATH, json=CHAT, headers={"origin": origin, **headers})
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == origin
        assert "x-request-id" in response.headers["access-control-expose-headers"]
        assert response.headers["vary"] == "Origin"


def test_a_preflight_needs_no_key_and_says_what_is_granted(allowing: Served) -> None:
    headers = {
        "origin": "https://app.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
        "access-control-request-private-network": "true",
    }
    response = httpx.options(allowing.url + PATH, headers=headers)
    assert response.status_code == 204
    assert response.content == b""
    assert response.headers["access-control-allow-origin"] == "https://app.example"
    assert response.headers["access-control-allow-headers"] == headers["access-control-request-headers"]
    assert "POST" in response.headers["access-control-allow-methods"]
    assert response.headers["access-control-allow-private-network"] == "true"
    assert httpx.options(allowing.url + PATH).status_code == 401  # no preflight
    rebound = httpx.options(allowing.url + PATH, headers={**headers, "host": "evil.example"})
    assert rebound.status_code == 403


def test_any_page_if_told_so() -> None:
    model = ScriptedModel(Script([Step((Content("ok"),))]))
    with serving(model, Settings(origins=("*",))) as served:
        for origin in ("http://any.example", "null"):
            response = served.post(PATH, json=CHAT, headers={"origin": origin})
            assert response.status_code == 200
            assert response.headers["access-control-allow-origin"] == origin
        assert "vary" not in served.chat().headers


def test_origins_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["serve", "--allow-origin", "HTTP://App.example:3000/", "--allow-origin", "null"]
    assert build_parser().parse_args(argv).allow_origin == ["http://app.example:3000", "null"]
    assert build_parser().parse_args(["serve", "--allow-origin", "*"]).allow_origin == ["*"]
    for wrong in ("app.example", "http://", "http://a/path", ""):
        with pytest.raises(SystemExit):
            build_parser().parse_args(["serve", "--allow-origin", wrong])
        assert "is no origin" in capsys.readouterr().err
