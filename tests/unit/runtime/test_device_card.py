"""What a card is to hold, and how fast card and CPU are: integers, and where experts begin to be streamed."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k2hybrid.cache.pages import LatentPages
from k2hybrid.cache.rows import Bf16Rows
from k2hybrid.checkpoint.presets import published_config
from k2hybrid.checkpoint.spec import ModelSpec, read_spec
from k2hybrid.config import MINI_MODEL, DenseWeights, RuntimeConfig
from k2hybrid.errors import ConfigError
from k2hybrid.experts.compute import plain_experts
from k2hybrid.experts.copies import InlineCopies
from k2hybrid.experts.device_experts import handed_rows
from k2hybrid.experts.split import HANDOFF_S, SplitRates, streams
from k2hybrid.hardware.streams import EmulatedStream
from k2hybrid.model.card_memory import CONTEXT_BYTES, CardWishes, taken
from k2hybrid.native.machine import Machine
from k2hybrid.runtime import load
from k2hybrid.runtime.card import CardFit, fit_card
from k2hybrid.runtime.device import emulated_rates
from k2hybrid.runtime.device_rates import Clock, measure_split_rates, measured_handoff, shared_expert
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
        (262_144, 24_564 * MIB, INT8, 16_384, 1),
        (131_072, 24_564 * MIB, INT8, 16_384, 213),
        (131_072, 48 * 10**9, {}, 16_384, 552),
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
    options = {"device": "emulated", "threads": 1, "vram": 1900 * MIB}
    with pytest.raises(ConfigError, match=r"what would fit: .*a context of [\d,]+ tokens in all") as refused:
        load(**options)
    tokens = re.findall(r"a context of ([\d,]+) tokens", str(refused.value))[0]
    with load(**options, context_tokens=int(tokens.replace(",", "")), hot_experts=0) as model:
        table = dict(model.config.table())
        assert table["vram"] == str(1900 * MIB)
        assert table["hot_experts"] == "0"
        assert table["max_step_tokens"] == "512"
        assert sum(model.status()["device"]["holds"].values()) <= 1900 * MIB
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


CPU = torch.device("cpu")


def by_the_wall(calls: Sequence[Callable[[], object]]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) / len(calls)


WALL = Clock(by_the_wall, lambda call: by_the_wall([call]))


def test_rates_are_measured() -> None:
    """On the CPU playing a card: finite, and of the model's own expert."""
    spec = MINI
    found = measure_split_rates(
        spec, "int8", Machine(1), plain_experts, InlineCopies(), CPU, clock=WALL, probe_bytes=4 << 20
    )
    figures = {name: getattr(found, name) for name in SplitRates.__dataclass_fields__}
    assert all(math.isfinite(value) and value > 0 for value in figures.values()), figures
    assert found.expert_bytes == 3 * spec.hidden_size * spec.moe_intermediate_size * 9 // 16
    assert 1e6 < found.bus < 1e13
    assert 1e3 < found.card < 1e13


class Told:
    """A clock that says what it is told, and keeps how many calls take turns."""

    def __init__(self, cache_bytes: int = 0) -> None:
        self.says = iter([60e-6, 160e-6, 1060e-6, 20e-6])  # no expert, all, one of many rows; the shared one
        self.turns: list[int] = []
        self.clock = Clock(self.captured, lambda call: 1e-3, cache_bytes)

    def captured(self, calls: Sequence[Callable[[], object]]) -> float:
        self.turns.append(len(calls))
        return next(self.says)


def test_rates_are_those_of_the_clock() -> None:
    """However long calls take on the host: what a launch takes is apart from what an expert's bytes do."""

    def slow(*args: object, **options: object) -> torch.Tensor:
        raise AssertionError("whoever has the clock calls")

    told = Told()
    found = measure_split_rates(
        MINI, "bf16", Machine(1), slow, InlineCopies(), CPU,
        clock=told.clock, handoff_s=7e-6, probe_bytes=4 << 20,
    )  # fmt: skip
    assert found.bus == pytest.approx(8 * EXPERT_BYTES / 1e-3)
    assert found.card_launch_s == 60e-6
    assert found.card == pytest.approx(8 * EXPERT_BYTES / 100e-6)
    assert found.card_row_s == pytest.approx(1000e-6 / 1024)
    assert (found.card_busy_s, found.handoff_s) == (20e-6, 7e-6)
    assert told.turns == [1] * 4


def test_what_fits_into_a_cache_takes_turns() -> None:
    told = Told(cache_bytes=8 * EXPERT_BYTES)
    measure_split_rates(
        MINI, "bf16", Machine(1), plain_experts, InlineCopies(), CPU, clock=told.clock, probe_bytes=4 << 20
    )
    shared = 2 * 3 * MINI.hidden_size * MINI.moe_intermediate_size * MINI.num_shared_experts
    assert told.turns == [5] * 3 + [32 * EXPERT_BYTES // shared + 1]


@pytest.mark.parametrize(("dense", "size"), [("bf16", 2), ("int8", 1), ("fp8", 1)])
def test_the_shared_expert_is_timed_as_it_is_stored(dense: DenseWeights, size: int) -> None:
    made = shared_expert(MINI, dense, CPU)
    inter = MINI.moe_intermediate_size * MINI.num_shared_experts
    scales = 0 if dense == "bf16" else 4
    for linear, outputs, inner in (
        (made.gate, inter, MINI.hidden_size),
        (made.up, inter, MINI.hidden_size),
        (made.down, MINI.hidden_size, inter),
    ):
        assert linear.weight.shape == (outputs, inner)
        assert linear.weight.nbytes == outputs * (inner * size + scales)
    x = torch.full((1, MINI.hidden_size), 0.5, dtype=torch.bfloat16)
    assert made(x, [slice(None)]).isfinite().all()


def test_a_hand_off_is_timed() -> None:
    records = []

    def recorder(work: Callable[[], None]) -> Callable[[], None]:
        records.append(work)
        return work

    assert 0 < measured_handoff(MINI, Machine(2), EmulatedStream(), recorder) < 0.1
    assert len(records) == 1


def test_a_hand_off_that_cannot_be_timed_is_assumed(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(work: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not supported")

    assert measured_handoff(MINI, Machine(1), EmulatedStream(), refuse) == HANDOFF_S
    assert "operation not supported" in caplog.text


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
