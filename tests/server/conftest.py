"""A real server (uvicorn on a free port, in a thread) around a scripted model."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn

from k2hybrid.checkpoint.synth import synthesize
from k2hybrid.server.app import Settings, create_app
from k2hybrid.server.live import LiveRuns
from k2hybrid.types import Content
from tests.server.scripted import Script, ScriptedModel, Step

TINY = {
    "layers": 2,
    "experts": 4,
    "top_k": 2,
    "hidden": 64,
    "heads": 2,
    "intermediate": 64,
    "moe_intermediate": 32,
    "vocab_size": 600,
    "q_lora": 32,
    "kv_lora": 32,
    "nope": 32,
    "rope": 16,
    "v_head": 32,
    "positions": 65536,
}


@dataclass
class Served:
    model: ScriptedModel
    url: str
    clients: ExitStack = field(default_factory=ExitStack)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def openai(self, **options: object) -> openai.OpenAI:
        """A client that the fixture closes: one left to the collector warns wherever it happens to run."""
        client = openai.OpenAI(
            **{"base_url": f"{self.url}/v1", "api_key": "any", "max_retries": 0, **options}
        )
        return self.clients.enter_context(client)

    def post(self, path: str, **options: object) -> httpx.Response:
        return httpx.post(self.url + path, timeout=20, **options)

    def chat(self, **fields: object) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": "hi"}], **fields}
        return self.post("/v1/chat/completions", json=body)


@contextmanager
def serving(
    model: ScriptedModel, settings: Settings | None = None, live: LiveRuns | None = None
) -> Iterator[Served]:
    """`model` behind a real server for as long as the block runs."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        create_app(model, settings, live),
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        served = Served(model, f"http://127.0.0.1:{listener.getsockname()[1]}")
        with served.clients:
            yield served
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def shared_server() -> Iterator[Served]:
    with serving(ScriptedModel(name="k2")) as served:
        yield served


@pytest.fixture
def server(shared_server: Served) -> Iterator[Served]:
    """One server for all tests; each starts with a model that answers "Hello."."""
    shared_server.model.play(Script([Step((Content("Hello"),)), Step((Content("."),))]))
    with shared_server.clients:  # of this test; the stack is empty again for the next
        yield shared_server


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "model"
    synthesize(out, overrides=TINY)
    return out
