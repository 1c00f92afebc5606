"""--cache-ram through the built-in model: a pool too small answers as a large one, and computes as little."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import pytest

import k2hybrid
from k2hybrid.cache.pages import LatentPages
from k2hybrid.cache.rows import Bf16Rows
from k2hybrid.checkpoint.spec import read_spec
from k2hybrid.config import MINI_MODEL, RuntimeConfig
from k2hybrid.errors import ConfigError
from k2hybrid.runtime.memory import start_needs
from k2hybrid.server.options import add_model_options, runtime_options
from k2hybrid.types import SamplingParams, TokenEvent
from tests.mini_sizes import PAGE_BYTES

GREEDY = SamplingParams(temperature=0)
SESSIONS, TURNS = 3, 3


def converse(**options: Any) -> tuple[list[list[int]], list[int], dict[str, Any]]:
    """Sessions that take turns: what is said, tokens prefilled for each turn, and the engine's figures."""
    draw = random.Random(5)
    with k2hybrid.load(threads=1, idle_prefill=False, max_step_tokens=64, **options) as model:
        vocab = model.spec.vocab_size
        histories = [[draw.randrange(vocab) for _ in range(250 + 7 * n)] for n in range(SESSIONS)]
        said, prefilled = [], []
        for _ in range(TURNS):
            for history in histories:
                run = model.generate(history, GREEDY, max_tokens=6, stop_ids=())
                tokens = [event.token for event in run if isinstance(event, TokenEvent)]
                said.append(tokens)
                prefilled.append(len(history) - run.usage.cached_tokens)
                history += [*tokens, *(draw.randrange(vocab) for _ in range(11))]
        return said, prefilled, model.status()["engine"]


@pytest.fixture(scope="module")
def large() -> tuple[list[list[int]], list[int], dict[str, Any]]:
    return converse(latent_bytes=64 * PAGE_BYTES)


def test_a_small_pool_with_ram_is_as_good_as_a_large_one(
    large: tuple[list[list[int]], list[int], dict[str, Any]],
) -> None:
    said, prefilled, figures = converse(latent_bytes=7 * PAGE_BYTES, cache_ram=40 * PAGE_BYTES)
    assert (said, prefilled) == large[:2]
    assert prefilled[SESSIONS:] == [12] * SESSIONS * (TURNS - 1)  # the last token said, and what is new
    assert figures["cached_ram_tokens"] > 1000
    assert figures["bytes_from_ram"] == figures["pages_from_ram"] * PAGE_BYTES > 0
    assert figures["bytes_to_ram"] == figures["pages_to_ram"] * PAGE_BYTES > 0
    assert figures["page_copy_errors"] == figures["integrity_errors"] == 0
    assert large[2]["cached_ram_tokens"] == large[2]["pages_to_ram"] == 0


def test_with_a_journal_beside_it(
    large: tuple[list[list[int]], list[int], dict[str, Any]], tmp_path: Path
) -> None:
    """RAM holds one session; what it loses is read from disk."""
    said, prefilled, figures = converse(
        latent_bytes=7 * PAGE_BYTES, cache_ram=6 * PAGE_BYTES, journal=tmp_path / "journal"
    )
    assert (said, prefilled) == large[:2]
    assert figures["cached_journal_tokens"] > 0
    assert figures["cached_ram_tokens"] > 0
    assert figures["integrity_errors"] == 0


def test_without_ram_the_small_pool_computes_again() -> None:
    _, prefilled, _ = converse(latent_bytes=7 * PAGE_BYTES)
    assert min(prefilled[SESSIONS:]) > 200


def test_it_is_printed() -> None:
    with k2hybrid.load(threads=1, latent_bytes=7 * PAGE_BYTES, cache_ram=3 * PAGE_BYTES) as model:
        assert dict(model.config.table())["cache_ram"] == str(3 * PAGE_BYTES)
    assert dict(RuntimeConfig().table())["cache_ram"] == "none"


def test_it_is_given_as_a_size() -> None:
    parser = argparse.ArgumentParser()
    add_model_options(parser)
    assert runtime_options(parser.parse_args(["--cache-ram", "1.5GiB"])) == {"cache_ram": 3 << 29}
    assert runtime_options(parser.parse_args([])) == {}


def test_it_is_a_row_of_the_memory_table() -> None:
    spec = read_spec(MINI_MODEL)
    pages = LatentPages(spec.num_layers, 2, Bf16Rows(spec.latent_dim))
    *_, row = start_needs(spec, pages, None, RuntimeConfig(cache_ram=3 * PAGE_BYTES + 5))
    assert (row.name, row.nbytes) == ("latents that left, 192 tokens", 3 * PAGE_BYTES)
    without = start_needs(spec, pages, None, RuntimeConfig())
    assert len(without) == len(start_needs(spec, pages, None, RuntimeConfig(cache_ram=PAGE_BYTES))) - 1


@pytest.mark.parametrize(
    ("size", "message"), [(PAGE_BYTES - 1, "holds no page"), (0, "at least 1"), ("1GiB", "a number of bytes")]
)
def test_sizes_that_cannot_be(size: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        k2hybrid.load(threads=1, latent_bytes=7 * PAGE_BYTES, cache_ram=size)
