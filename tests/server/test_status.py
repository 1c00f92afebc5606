"""GET /status: as it is described, of a scripted and of a real model, and for whom."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from prometheus_client.parser import text_string_to_metric_families

from k2hybrid.runtime import load
from k2hybrid.server.app import Settings
from k2hybrid.server.live import LiveRuns
from k2hybrid.server.openapi import description
from k2hybrid.types import Content
from tests.server.conftest import Served, serving
from tests.server.scripted import Script, ScriptedModel, Step

DOCUMENT = description()
KEY = {"x-api-key": "key-one"}


@pytest.fixture(scope="module", params=["mapped", "resident"])
def real(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[Served]:
    options = {"threads": 1, "latent_bytes": 1 << 26, "expert_place": request.param}
    with load(tiny_model, **options) as runtime, serving(runtime) as served:
        yield served


def figures(served: Served, **headers: str) -> dict[str, Any]:
    """The answer, once it is found to be as described."""
    answer = httpx.get(f"{served.url}/status", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    schema = {"$ref": "#/components/schemas/Status", "components": DOCUMENT["components"]}
    jsonschema.Draft202012Validator(schema).validate(answer.json())
    return answer.json()


def test_a_scripted_models(server: Served) -> None:
    found = figures(server)
    assert found["server"] == {
        "name": "k2hybrid",
        "version": DOCUMENT["info"]["version"],
        "model": "k2",
        "context_tokens": 4096,
        "key_required": False,
        "uptime_s": found["server"]["uptime_s"],
        "draining": False,
        "answers": 0,
    }
    time.sleep(0.01)
    assert figures(server)["server"]["uptime_s"] >= found["server"]["uptime_s"] + 0.01
    assert httpx.head(f"{server.url}/status").status_code == 200
    assert server.post("/status").status_code == 405


def test_a_real_models(real: Served) -> None:
    before = figures(real)
    usage = real.chat(max_tokens=5).json()["usage"]
    after = figures(real)
    engine = after["engine"]
    for key in ("prompt_tokens", "completion_tokens"):
        assert engine[key] - before["engine"][key] == usage[key]
    assert engine["decode_tokens_per_s"] > 0
    assert engine["prefill_tokens_per_s"] > 0
    assert engine["busy"] > 0
    assert engine["read_gb_s"] > 0
    latents = after["latents"]
    assert latents["used"] + latents["kept"] + latents["free"] == latents["pages"]
    assert latents["kept"] > 0
    assert after["weights"] == {"lost_files": []}
    assert after["journal"] == {"enabled": False}
    assert after["device"] == {"name": "cpu"}
    memory = after["memory"]
    assert 0 < memory["private_bytes"] < memory["total_bytes"]
    assert 0 < memory["available_bytes"] <= memory["total_bytes"]
    experts = after["experts"]
    # One MoE layer of 4, three matrices of 32·64 values: a nibble each and a bf16 scale per 32.
    assert (experts["experts"], experts["expert_bytes"]) == (4, 3 * 32 * 64 * 9 // 16)
    if experts["place"] == "resident":
        deadline = time.monotonic() + 20
        while (experts := figures(real)["experts"])["filling"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert experts["to_fill"] == experts["fill_done"] == experts["filled"] == experts["slots"] == 4
        assert experts["fill_failed"] == 0
    else:
        assert set(experts) == {"place", "experts", "expert_bytes"}


def test_a_journal_that_cannot_be_written(tiny_model: Path, tmp_path: Path) -> None:
    with (
        load(tiny_model, threads=1, latent_bytes=1 << 26, journal=tmp_path / "j") as runtime,
        serving(runtime) as served,
    ):
        well = {"enabled": True, "writing": True, "last_error": "", "bytes": 0}
        assert figures(served)["journal"] == well
        journal = runtime._sessions._journal
        assert journal is not None
        journal._health.fail(OSError(28, "No space left on device"))
        failed = {"writing": False, "last_error": "No space left on device"}
        assert figures(served)["journal"] == {**well, **failed}


@pytest.fixture(scope="module")
def emulated(tiny_model: Path) -> Iterator[Served]:
    options = {"context_tokens": 512, "latent_bytes": 1 << 26, "max_step_tokens": 64}
    with (
        load(tiny_model, threads=1, device="emulated", hot_experts=1 << 20, **options) as runtime,
        serving(runtime) as served,
    ):
        yield served


def test_a_devices(emulated: Served) -> None:
    before = figures(emulated)["device"]
    assert (before["name"], before["signal"]) == ("emulated", "emulated")
    assert (before["chunk"], before["hot_found"]) == (64, None)
    assert before["hot_experts"] == 0
    for _ in range(30):  # experts come and uses are counted every few steps
        assert emulated.chat(max_tokens=40).status_code == 200
        after = figures(emulated)["device"]
        if after["hot_experts"] == 4 and after["hot_found"]:
            break
    assert after["recorded"] == [*range(1, 9)]
    assert after["hot_experts"] == after["hot_slots"] == 4  # all there are
    assert 0 < after["hot_found"] <= 1
    assert 1 <= after["handed_rows"] <= 64

    assert after["holds"]["decode graphs"] > 0
    assert after["holds"] == before["holds"]
    text = httpx.get(f"{emulated.url}/metrics").text
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["k2hybrid_device", "emulated"] == 1
    assert samples["k2hybrid_device_hot_experts",] == samples["k2hybrid_device_hot_slots",] == 4
    assert samples["k2hybrid_device_recorded_steps",] == 8
    assert samples["k2hybrid_device_hot_found",] > 0
    for what, nbytes in after["holds"].items():
        assert samples["k2hybrid_device_bytes", what] == nbytes


def test_answers_under_way_are_counted_while_the_server_drains() -> None:
    live = LiveRuns()
    model = ScriptedModel(Script([Step((Content("a"),)), Step((Content("b"),), delay_s=20)]))
    with serving(model, live=live) as served:
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
        with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body) as answer:
            texts = answer.iter_text()  # kept: whoever drops it hangs up
            while '"content":"a"' not in next(texts):
                pass
            assert figures(served)["server"]["answers"] == 1
            live.drain()
            told = figures(served)["server"]
            assert (told["answers"], told["draining"]) == (1, True)
            live.end_all()


def test_it_needs_the_key_draining_or_not() -> None:
    live = LiveRuns()
    with serving(ScriptedModel(Script([])), Settings(api_keys=("key-one",)), live) as served:
        for _ in range(2):
            for headers in ({}, {"x-api-key": "key-two"}):
                refused = httpx.get(f"{served.url}/status", headers=headers)
                assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            assert figures(served, **KEY)["server"]["key_required"] is True
            live.drain()
