"""What a card is to hold, and how fast card and CPU are: integers, and where experts begin to be streamed."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k2hybrid.cache.pages import LatentPages
from k2hybrid.cache.rows import Bf16Rows
from k2hybrid.checkpoint.presets import published_config
from k2hybrid.checkpoint.spec import ModelSpec, read_spec
from k2hybrid.config import MINI_MODEL, RuntimeConfig
from k2hybrid.errors import ConfigError
from k2hybrid.experts.compute import plain_experts
from k2hybrid.experts.copies import InlineCopies
from k2hybrid.experts.device_experts import handed_rows
from k2hybrid.experts.split import SplitRates, streams
from k2hybrid.model.card_memory import CONTEXT_BYTES, CardWishes, taken
from k2hybrid.native.machine import Machine
from k2hybrid.runtime import load
from k2hybrid.runtime.card import CardFit, fit_card
from k2hybrid.runtime.device import emulated_rates
from k2hybrid.runtime.device_rates import measure_split_rates
from k2hybrid.runtime.memory import start_needs
from tests.mini_sizes import EXPERT_BYTES, PAGE_BYTES

K2 = ModelSpec.from_config(published_config())
MINI = read_spec(MINI_MODEL)
EXPERT = 24_772_608
MIB = 1 << 20


def fit(spec: ModelSpec, context: int, free: int | None = 1 << 40, **options: object) -> CardFit:
    config = RuntimeConfig.from_mapping({"device": "cuda", "context_tokens": context, **options})
    return fit_card(spec, config, free, context)


# --- what fits ----------------------------------------------------------------------------------------

INT8 = {"dense_weights": "int8", "latent_rows": "fp8"}


@pytest.mark.parametrize(
    ("context", "vram", "options", "chunk", "hot"),
    [
        (262_144, 24_564 * MIB, INT8, 11_264, 2),
        (131_072, 24_564 * MIB, INT8, 16_384, 184),
        (131_072, 48 * 10**9, {}, 16_384, 524),
    ],
)
def test_the_presets_of_the_memory_page(
    context: int, vram: int, options: dict[str, str], chunk: int, hot: int
) -> None:
    for free in (1 << 40, vram - CONTEXT_BYTES):  # the context is there already when free memory is asked
        found = fit(K2, context, free, vram=vram, **options)
        assert (found.chunk, found.graph_rows, found.hot) == (chunk, 16, hot)
        assert sum(need.nbytes for need in found.needs) <= vram
    assert fit(K2, context, vram - CONTEXT_BYTES, **options) == found  # all of what is free


def test_options_are_kept() -> None:
    found = fit(K2, 131_072, vram=48 * 10**9, max_step_tokens=1024, max_running=4)
    assert (found.chunk, found.graph_rows) == (1024, 4)
    assert fit(K2, 131_072, vram=48 * 10**9, max_running=40).graph_rows == 16
    more = found.hot
    for wanted, hot in ((0, 0), (EXPERT - 1, 0), (EXPERT, 1), (10 * EXPERT + 5, 10), (1 << 42, more)):
        options = {"max_step_tokens": 1024, "max_running": 4, "hot_experts": wanted}
        assert fit(K2, 131_072, vram=48 * 10**9, **options).hot == hot


def test_more_than_the_card_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="--vram 2000000000 is more than this card has free"):
        fit(MINI, 512, 10**9, vram=2 * 10**9)


def test_latents_of_an_option_are_counted() -> None:
    """As many whole pages as `latent_bytes` holds, not what the context would take."""
    page = PAGE_BYTES
    few = fit(MINI, 4096, latent_bytes=3 * page + 100, vram=1 << 32)
    assert {need.name: need.nbytes for need in few.needs}["latents, 192 tokens"] == 3 * page


@given(share=st.floats(0.05, 1.1), spec=st.sampled_from([K2, MINI]), options=st.sampled_from([{}, INT8]))
@settings(max_examples=40, deadline=None)
def test_what_is_refused_says_what_would_fit(share: float, spec: ModelSpec, options: dict[str, str]) -> None:
    context = spec.max_positions
    wishes = CardWishes(
        "int8" if options else "bf16", "fp8" if options else "bf16", context, context, chunk=512
    )
    vram = int(share * taken(spec, wishes))
    try:
        assert sum(need.nbytes for need in fit(spec, context, vram=vram, **options).needs) <= vram
        return
    except ConfigError as error:
        advice = str(error).partition("what would fit: ")[2]
    assert advice
    if "use --device cpu" in advice:
        return
    for one in advice.split("; or "):
        follow, length = dict(options), context
        for option, value in re.findall(r"--(\S+) (\w+)", one):
            follow[option.replace("-", "_")] = value
        if chunk := re.search(r"a prefill chunk of ([\d,]+) rows", one):
            follow["max_step_tokens"] = int(chunk[1].replace(",", ""))
        if "one graph" in one:
            follow["max_running"] = 1
        if tokens := re.search(r"a context of ([\d,]+) tokens", one):
            length = int(tokens[1].replace(",", ""))
        assert sum(need.nbytes for need in fit(spec, length, vram=vram, **follow).needs) <= vram


def test_following_the_advice_loads() -> None:
    options = {"device": "emulated", "threads": 1, "vram": 2200 * MIB}
    with pytest.raises(ConfigError, match=r"what would fit: .*a context of [\d,]+ tokens in all") as refused:
        load(**options)
    tokens = re.findall(r"a context of ([\d,]+) tokens", str(refused.value))[0]
    with load(**options, context_tokens=int(tokens.replace(",", "")), hot_experts=0) as model:
        table = dict(model.config.table())
        assert table["vram"] == str(2200 * MIB)
        assert table["hot_experts"] == "0"
        assert table["max_step_tokens"] == "512"
        assert sum(model.status()["device"]["holds"].values()) <= 2200 * MIB
    with pytest.raises(ConfigError, match="use --device cpu"):
        load(**{**options, "vram": 1000 * MIB})


@pytest.mark.parametrize("dense", ["bf16", "int8"])
def test_what_lies_on_a_card_is_not_counted_in_ram(dense: str) -> None:
    pages = LatentPages(MINI.num_layers, 3, Bf16Rows(MINI.latent_dim))
    embedding = 2 * MINI.vocab_size * MINI.hidden_size
    rows = {}
    for device in ("cuda", "emulated"):
        config = RuntimeConfig.from_mapping({"device": device, "dense_weights": dense})
        rows[device] = {need.name: need.nbytes for need in start_needs(MINI, pages, None, config)}
    assert rows["cuda"].pop("embedding") == embedding
    assert rows["cuda"].pop("buffers of a streamed prefill") == 12 * EXPERT_BYTES
    assert set(rows["cuda"]) < set(rows["emulated"])
    assert any("latents" in name for name in set(rows["emulated"]) - set(rows["cuda"]))
    assert any("dense weights" in name for name in set(rows["emulated"]) - set(rows["cuda"]))


# --- rates --------------------------------------------------------------------------------------------


def test_rates_are_measured() -> None:
    """On the CPU playing a card: finite, and of the model's own expert."""
    spec, cpu = MINI, torch.device("cpu")
    found = measure_split_rates(
        spec,
        Machine(1),
        plain_experts,
        InlineCopies(),
        cpu,
        lambda: None,
        probe_bytes=4 << 20,
    )
    figures = {name: getattr(found, name) for name in SplitRates.__dataclass_fields__}
    assert all(math.isfinite(value) and value > 0 for value in figures.values()), figures
    assert found.expert_bytes == 3 * spec.hidden_size * spec.moe_intermediate_size * 9 // 16
    assert 1e6 < found.bus < 1e13
    assert 1e3 < found.card < 1e13


def rate(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(math.log10(low), math.log10(high)).map(lambda power: 10**power)


def time_of(low: float, high: float) -> st.SearchStrategy[float]:
    return st.just(0.0) | rate(low, high)


RATES = st.builds(
    SplitRates,
    rate(1e3, 3e7),
    card=rate(1e10, 3e12),
    ram=rate(1e10, 5e11),
    bus=rate(3e9, 1e11),
    card_row_s=time_of(1e-9, 1e-5),
    cpu_row_s=time_of(1e-8, 1e-4),
    card_busy_s=time_of(1e-6, 1e-3),
    card_launch_s=time_of(1e-6, 1e-4),
    handoff_s=time_of(1e-6, 1e-4),
    handoff_row_s=time_of(1e-8, 1e-5),
    bus_traffic=st.floats(0.0, 4.0),
    plan_s=time_of(1e-5, 1e-2),
)


@given(RATES, st.integers(1, 60), st.integers(1, 20), st.integers(1, 8), st.sampled_from([8, 16, 48]))
@settings(max_examples=150, deadline=None)
def test_the_border_of_streaming(rates: SplitRates, chunk: int, least: int, top_k: int, experts: int) -> None:
    found = handed_rows(rates, chunk, least, top_k, experts)
    decided = {rows: streams(rates, rows, top_k, experts) for rows in range(1, chunk + 1)}
    floor = min(least, chunk)
    assert floor <= found <= chunk
    assert found == floor or not decided[found]
    assert found == chunk or decided[found + 1]
    above = [decided[rows] for rows in range(floor, chunk + 1)]
    if above == sorted(above):  # one border: by brute force
        assert found == max([floor, *(rows for rows in range(floor, chunk + 1) if not decided[rows])])


def test_the_emulated_device_streams_some_chunks_and_hands_off_others() -> None:
    rows = handed_rows(emulated_rates(MINI), 512, 4, MINI.top_k, MINI.num_experts)
    assert 4 <= rows < 256
