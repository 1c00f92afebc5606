"""Keys, hosts and the small endpoints."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from k2hybrid.errors import ConfigError
from k2hybrid.server.app import Settings
from k2hybrid.server.guard import host_name
from k2hybrid.server.live import LiveRuns
from k2hybrid.server.process import hosts_for, require_key
from k2hybrid.types import Content
from tests.server.conftest import Served, serving
from tests.server.scripted import Script, ScriptedModel, Step

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    model = ScriptedModel(Script([Step((Content("ok"),))]))
    with serving(model, Settings(name="org/served-name", api_keys=("key-one", "key-two"))) as served:
        yield served


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer key-one"},
        {"authorization": "bearer key-two"},
        {"x-api-key": "key-one"},
        {"authorization": "Bearer wrong", "x-api-key": "key-two"},
    ],
)
def test_a_right_key_opens(locked: Served, headers: dict[str, str]) -> None:
    assert locked.post("/v1/chat/completions", json=CHAT, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer wrong"},
        {"authorization": "key-one"},
        {"authorization": "Basic key-one"},
        {"x-api-key": "key-on"},
        {"x-api-key": "key-one2"},
        {"x-api-key": b"\xff\xfe"},
    ],
)
def test_anything_else_is_401(locked: Served, headers: dict[str, str]) -> None:
    for path in ("/v1/chat/completions", "/tokenize", "/detokenize", "/v1/other"):
        response = locked.post(path, json=CHAT, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"


def test_each_key_is_a_namespace_of_its_own(locked: Served) -> None:
    def scope(**headers: str) -> str:
        locked.post(
            "/v1/chat/completions", json=CHAT, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )
        return locked.model.requests[-1].scope

    one, two = scope(authorization="Bearer key-one"), scope(x_api_key="key-two")
    assert one != two
    assert scope(x_api_key="key-one") == one
    assert scope(authorization="Bearer key-two", x_api_key="key-one") == two
    assert all(len(found) == 16 and int(found, 16) >= 0 for found in (one, two))


def test_without_keys_there_is_one_namespace(server: Served) -> None:
    for headers in ({}, {"authorization": "Bearer anything"}):
        server.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert [request.scope for request in server.model.requests] == ["", ""]


def test_the_sdk_sees_an_authentication_error(locked: Served) -> None:
    with pytest.raises(openai.AuthenticationError):
        locked.openai().chat.completions.create(model="m", messages=CHAT["messages"])


def test_some_paths_are_open(locked: Served) -> None:
    assert httpx.head(f"{locked.url}/").status_code == 200
    for path in ("/", "/health", "/v1/models"):
        assert httpx.get(locked.url + path).status_code == 200


def test_the_served_name_is_what_clients_see(locked: Served) -> None:
    client = locked.openai(api_key="key-one")
    (model,) = client.models.list().data
    assert model.id == "org/served-name"
    assert model.max_model_len == 4096
    assert client.models.retrieve("org/served-name").id == "org/served-name"
    assert client.models.retrieve("gpt-4o-mini").id == "org/served-name"
    assert (
        client.chat.completions.create(model="gpt-4o-mini", messages=CHAT["messages"]).model
        == "org/served-name"
    )


def test_health_and_root(server: Served) -> None:
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "model": "k2"}
    assert httpx.get(f"{server.url}/").json()["name"] == "k2hybrid"
    head = httpx.head(f"{server.url}/")
    assert head.status_code == 200
    assert head.content == b""


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1234", "127.0.0.1", "127.0.0.1:9", "[::1]", "[::1]:8000"]
)
def test_loopback_names_are_answered(server: Served, host: str) -> None:
    assert server.post("/v1/chat/completions", json=CHAT, headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example:80", "127.0.0.1.nip.io", "[::2]", "[::1"]
)
def test_a_rebound_name_is_refused(server: Served, host: str) -> None:
    response = server.post("/v1/chat/completions", json=CHAT, headers={"host": host})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "host_not_allowed"
    assert httpx.get(f"{server.url}/health", headers={"host": host}).status_code == 403


def test_beyond_loopback_any_name_is_answered() -> None:
    assert hosts_for("0.0.0.0") is None
    assert hosts_for("192.168.1.5") is None
    assert "localhost" in (hosts_for("127.0.0.1") or ())
    assert "[::1]" in (hosts_for("::1") or ())
    assert "127.0.0.5" in (hosts_for("127.0.0.5") or ())
    with serving(ScriptedModel(Script([])), Settings(hosts=None)) as served:
        assert httpx.get(f"{served.url}/health", headers={"host": "my.lan"}).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "my.lan"])
def test_beyond_loopback_a_key_is_asked_for_or_its_lack_said_to_be_right(host: str) -> None:
    with pytest.raises(ConfigError, match=r"--api-key-file, or --allow-no-key"):
        require_key(host, (), allow_none=False)
    require_key(host, ("key",), allow_none=False)
    require_key(host, (), allow_none=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.5", "::1", "localhost"])
def test_on_loopback_no_key_is_needed(host: str) -> None:
    require_key(host, (), allow_none=False)


def test_a_server_that_drains_refuses_newcomers_and_says_so() -> None:
    live = LiveRuns()
    with serving(ScriptedModel(Script([])), live=live) as served:
        live.drain()
        health = httpx.get(f"{served.url}/health")
        assert health.status_code == 503
        assert health.json() == {"status": "draining", "model": "scripted"}
        assert int(health.headers["retry-after"]) > 0
        refused = served.chat()
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        assert "shutting down" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) > 0
        assert "x-should-retry" not in refused.headers
        assert httpx.get(f"{served.url}/v1/models").status_code == 503
        with pytest.raises(openai.InternalServerError):
            served.openai().chat.completions.create(model="m", messages=CHAT["messages"])
        assert not served.model.requests


def test_host_header_forms() -> None:
    assert host_name("A.b:80") == "a.b"
    assert host_name("[::1]:80") == "[::1]"
    assert host_name("[::1") == ""
