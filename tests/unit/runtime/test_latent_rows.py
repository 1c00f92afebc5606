"""A model whose latents are stored in FP8: what holds for bf16 rows holds, and a journal keeps both apart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from k2hybrid.cache.pages import LatentPages
from k2hybrid.cache.rows import Bf16Rows, Fp8Rows, Fp32Rows, RowFormat
from k2hybrid.config import RuntimeConfig
from k2hybrid.errors import ConfigError
from k2hybrid.runtime import Runtime, load
from k2hybrid.runtime.fingerprint import fingerprint
from k2hybrid.types import ChatRequest, Message, SamplingParams

GREEDY = SamplingParams(temperature=0.0)
ROW_BYTES = 32 + 4 + 2 * 16  # of the random checkpoint's latents


@pytest.fixture(scope="module")
def fp8(checkpoint: Path) -> Iterator[Runtime]:
    with load(checkpoint, latent_rows="fp8", latent_bytes=4 << 20, max_step_tokens=64, threads=2) as loaded:
        yield loaded


def tokens(runtime: Runtime, ids: list[int], count: int = 12) -> list[int]:
    return [event.token for event in runtime.generate(ids, GREEDY, count, stop_ids=())]


def test_the_table_and_the_status_say_how_latents_are_stored(fp8: Runtime, runtime: Runtime) -> None:
    assert dict(fp8.config.table())["latent_rows"] == fp8.status()["latents"]["rows"] == "fp8"
    assert dict(runtime.config.table())["latent_rows"] == runtime.status()["latents"]["rows"] == "bf16"


def test_the_same_memory_holds_more_tokens(checkpoint: Path) -> None:
    page = 64 * 2 * ROW_BYTES
    with load(checkpoint, latent_rows="fp8", latent_bytes=5 * page + page // 2, threads=1) as small:
        assert small.context_tokens == 5 * 64


def test_unknown_formats_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="one of bf16, fp8"):
        load(checkpoint, latent_rows="fp4")


def test_together_as_alone(fp8: Runtime) -> None:
    prompts = [[n, 5, *range(300, 300 + 11 * n)] for n in range(1, 7)]
    runs = [fp8.generate(prompt, GREEDY, 12, stop_ids=()) for prompt in prompts]
    together = [[event.token for event in run] for run in runs]
    assert together == [tokens(fp8, prompt) for prompt in prompts]


@pytest.mark.parametrize("length", [63, 64, 65, 200])
def test_a_cached_prefix_gives_the_same_tokens(fp8: Runtime, length: int) -> None:
    prompt = [(7 * n + length) % 700 for n in range(length)]
    first = fp8.generate(prompt, GREEDY, 8, stop_ids=())
    fresh = [event.token for event in first]
    again = fp8.generate(prompt, GREEDY, 8, stop_ids=())
    assert [event.token for event in again] == fresh
    assert (first.usage.cached_tokens, again.usage.cached_tokens) == (0, length - 1)


def test_a_journal_gives_back_pages_of_its_own_format_alone(checkpoint: Path, tmp_path: Path) -> None:
    request = ChatRequest((Message("user", "How is the weather? " * 20),), sampling=GREEDY, max_tokens=8)
    cached, answers = [], []
    for rows in ("bf16", "fp8", "fp8", "bf16"):
        with load(
            checkpoint, latent_rows=rows, journal=tmp_path / "journal", idle_prefill=False, threads=1
        ) as model:
            run = model.chat(request)
            for _ in run:
                pass
            cached.append(run.usage.cached_tokens)
            answers.append(run.ids)
    assert cached[:2] == [0, 0]
    assert cached[2] >= 64
    assert cached[3] >= 64
    assert answers[1] == answers[2]
    assert answers[0] == answers[3]


def test_the_fingerprint_knows_the_format_even_where_sizes_agree(checkpoint: Path) -> None:
    config = RuntimeConfig(model=checkpoint)
    # 16 latent values and a scale, 10 rotary values: 40 bytes, as 20 values in bf16 and 10 in fp32.
    formats: list[RowFormat] = [Fp8Rows(16, 10), Bf16Rows(20), Fp32Rows(10)]
    assert len({one.row_bytes for one in formats}) == 1
    found = {fingerprint(config, LatentPages(1, 1, one), "template") for one in formats}
    assert len(found) == len(formats)
