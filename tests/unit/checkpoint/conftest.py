"""A small synthetic checkpoint, and a sink that remembers what it was given."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from k2hybrid.checkpoint.synth import synthesize
from k2hybrid.types import ExpertRef
from tests.hub_server import Hub, content_of, serving
from tests.unit.checkpoint.pulls import PUBLISHED_BESIDE, REPO

SMALL: dict[str, Any] = {
    "layers": 3,
    "hidden": 64,
    "intermediate": 96,
    "moe_intermediate": 32,
    "heads": 2,
    "q_lora": 24,
    "kv_lora": 16,
    "nope": 8,
    "rope": 4,
    "v_head": 8,
    "experts": 8,
    "top_k": 2,
    "vocab_size": 600,
}


class RecordingSink:
    """An ExpertSink that keeps the refs."""

    def __init__(self) -> None:
        self.refs: dict[tuple[int, int], ExpertRef] = {}

    def add_expert(self, layer: int, expert: int, ref: ExpertRef) -> None:
        assert (layer, expert) not in self.refs
        self.refs[layer, expert] = ref


@pytest.fixture
def sink() -> RecordingSink:
    return RecordingSink()


@pytest.fixture(scope="session")
def sizes() -> dict[str, Any]:
    return dict(SMALL)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers in several shards; read-only by agreement."""
    out = tmp_path_factory.mktemp("small") / "model"
    synthesize(out, overrides=SMALL, seed=7, shard_bytes=60_000)
    return out


@pytest.fixture
def hub(small: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    # What comes is written in pieces of this size (10 MB else); less than one is lost with its connection.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)
    with serving(Hub(REPO, content_of(small) | PUBLISHED_BESIDE)) as hub:
        yield hub


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"
