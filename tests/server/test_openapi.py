"""The server's description of itself, held against the server by schemathesis.

Whatever the description allows and whatever it forbids is sent; no answer may be a server error, and each
must be one that the description has.
"""

from __future__ import annotations

import httpx
import pytest
from hypothesis import HealthCheck, settings
from starlette.routing import Route

from k2hybrid.server.app import Settings, create_app
from k2hybrid.server.openapi import description
from k2hybrid.server.page import STATIC_PATHS
from k2hybrid.types import Content, Reasoning
from tests.server.conftest import Served
from tests.server.scripted import Script, ScriptedModel, Step

schemathesis = pytest.importorskip("schemathesis")
specs = pytest.importorskip("schemathesis.specs.openapi.checks")

ANSWER = Script([Step((Reasoning("hm"),)), Step((Content("Hello"),)), Step((Content("."),))])
APP = create_app(ScriptedModel(ANSWER), Settings(hosts=None))
CHECKS = [
    schemathesis.checks.not_a_server_error,
    specs.status_code_conformance,
    specs.content_type_conformance,
    specs.response_schema_conformance,
    specs.unsupported_method,
]
schema = schemathesis.openapi.from_asgi("/openapi.json", APP)


@schema.parametrize()
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_a_described_one(case) -> None:  # type: ignore[no-untyped-def]
    case.call_and_validate(checks=CHECKS)


def test_every_route_is_described_and_nothing_else() -> None:
    routes = {
        (method.lower(), route.path.replace(":path", "").replace(":anything", ""))
        for route in APP._app.routes  # type: ignore[attr-defined]
        if isinstance(route, Route)
        for method in route.methods or ()
        if method != "HEAD"
    }
    described = {(method, path) for path, methods in description()["paths"].items() for method in methods}
    assert routes - {("get", path) for path in ("/", *STATIC_PATHS)} == described  # these are the page


@pytest.mark.parametrize("name", ["gpt-4o", "org/model", "%0A", "a%0Ab%0A", "%C2%AC%08%0E%20", ""])
def test_any_name_is_the_one_model(server: Served, name: str) -> None:
    found = httpx.get(f"{server.url}/v1/models/{name}")
    assert (found.status_code, found.json()["id"]) == (200, "k2")


def test_it_is_served_openly(server: Served) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    assert document == description()
    assert document["openapi"] == "3.1.0"
