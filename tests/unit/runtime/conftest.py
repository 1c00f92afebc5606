"""A small random checkpoint, loaded once for all tests here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from k2hybrid.checkpoint.synth import synthesize
from k2hybrid.runtime import Runtime, load

SIZES = {
    "layers": 2,
    "experts": 8,
    "top_k": 2,
    "hidden": 64,
    "intermediate": 64,
    "moe_intermediate": 32,
    "heads": 2,
    "q_lora": 32,
    "kv_lora": 32,
    "nope": 16,
    "rope": 16,
    "v_head": 16,
    "positions": 1024,
    "vocab_size": 1024,
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "tiny"
    synthesize(out, overrides=SIZES, seed=1)
    return out


@pytest.fixture(scope="module")
def runtime(checkpoint: Path) -> Iterator[Runtime]:
    with opened(checkpoint) as loaded:
        yield loaded


def opened(checkpoint: Path) -> Runtime:
    """Another one, with nothing cached."""
    return load(checkpoint, latent_bytes=4 << 20, max_step_tokens=64, threads=2)
