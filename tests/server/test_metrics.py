"""GET /metrics, read with the library that scrapers use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from k2hybrid.runtime import load
from k2hybrid.server.app import Settings
from k2hybrid.types import Content
from tests.server.conftest import Served, serving
from tests.server.scripted import Script, ScriptedModel, Step


@pytest.fixture(scope="module")
def real(tiny_model: Path) -> Iterator[Served]:
    with load(tiny_model, threads=1, latent_bytes=1 << 26) as runtime, serving(runtime) as served:
        yield served


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    model = ScriptedModel(Script([Step((Content("ok"),))]))
    with serving(model, Settings(api_keys=("key-one",))) as served:
        yield served


def figures(text: str) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_figures_of_a_model(real: Served) -> None:
    before = figures(httpx.get(f"{real.url}/metrics").text)
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
    usage = httpx.post(f"{real.url}/v1/chat/completions", json=body, timeout=60).json()["usage"]
    reply = httpx.get(f"{real.url}/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    after = figures(reply.text)
    for name, key in (("completion", "completion_tokens"), ("prompt", "prompt_tokens")):
        series = (f"k2hybrid_{name}_tokens_total",)
        assert after[series] - before[series] == usage[key]
    assert after["k2hybrid_experts_place", "mapped"] == 1
    assert after["k2hybrid_latent_rows", "bf16"] == 1
    assert after["k2hybrid_running",] == 0
    for name in ("cached_ram_tokens_total", "cached_journal_tokens_total", "pages_to_ram_total", "ram_pages"):
        assert after[f"k2hybrid_{name}",] == 0


def test_it_needs_the_key(locked: Served) -> None:
    assert httpx.get(f"{locked.url}/metrics").status_code == 401
    headers = {"authorization": "Bearer key-one"}
    assert httpx.get(f"{locked.url}/metrics", headers=headers).status_code == 200
