"""The benches of a slice on a card, with the CPU as the card: they run, and count as they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_decode, gpu_prefill
from bench.device_rates import report
from bench.device_slice import Slice, expert_memory, in_turn, published_spec
from bench.gpu_decode import AtOnce, Decode
from bench.gpu_prefill import Prefill
from k2hybrid.checkpoint.spec import ModelSpec, read_spec
from k2hybrid.config import MINI_MODEL, DenseWeights, LatentRows
from k2hybrid.experts.device_slots import DeviceSlots
from k2hybrid.experts.hybrid import HybridExperts
from k2hybrid.experts.prediction import ModelSizes
from k2hybrid.model.decode_step import DecodeStep
from k2hybrid.native.machine import Machine
from k2hybrid.runtime.card import CardFit
from k2hybrid.runtime.device import emulated_rates, open_device
from k2hybrid.runtime.hollow import few_layers
from k2hybrid.runtime.on_device import device_experts
from k2hybrid.runtime.random_bytes import arena_bytes
from k2hybrid.types import Weight8
from tests.no_waiting import NoWaiting, WaitsError

LAYERS, CHUNK = 2, 128


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return few_layers(read_spec(MINI_MODEL), LAYERS)


def slice_of(spec: ModelSpec, dense: DenseWeights = "bf16", rows: LatentRows = "bf16") -> Slice:
    device = open_device("emulated")
    assert device is not None
    memory = arena_bytes(4 << 20)
    return Slice(
        device, spec, memory, sequences=2, context=2 * CHUNK, dense=dense, rows=rows, machine=Machine(1)
    )


@pytest.mark.parametrize(("dense", "rows"), [("bf16", "bf16"), ("int8", "fp8"), ("fp8", "fp8")])
def test_a_decode_row_of_each_batch_size(spec: ModelSpec, dense: DenseWeights, rows: LatentRows) -> None:
    found = list(gpu_decode.rows(slice_of(spec, dense, rows), (1, 2), inputs=2, rounds=2))
    assert [row["rows"] for row in found] == [1, 2]
    for row in found:
        assert (row["dense"], row["latents"], row["layers"]) == (dense, rows, LAYERS)
        assert min(row["step_ms"], row["cpu_ms"], row["card_ms"]) > 0
        assert spec.top_k <= row["experts"] <= row["rows"] * spec.top_k


def test_the_three_that_are_timed_do_the_same_work(spec: ModelSpec) -> None:
    made = slice_of(spec)
    fit = CardFit(chunk=2, graph_rows=2, hot=0, needs=())
    experts = device_experts(
        made.device, fit, spec, made.store, made.machine, made.dispatcher(2), max_running=2, dense=made.dense
    )
    try:
        with torch.no_grad():
            decode = Decode(made, experts, 2, inputs=2)
            for number in (0, 1, 2):
                decode.step(number)
                decode.card(number)
                decode.cpu(number)
                asked = decode._asked[number % 2]
                assert [layer for layer, *_ in asked] == list(spec.moe_layers)
                # The step by other means: experts that are called in its midst.
                step = decode._step(made.network(made.dispatcher(2)))
                step.fill(decode._batches[number % 2])
                step.work()
                assert torch.equal(decode._whole.logits, step.logits)
                assert not torch.equal(decode._alone.logits, step.logits)
        ids = [[ids for _, _, ids, _ in asked] for asked in decode._asked]
        assert any(not torch.equal(a, b) for a, b in zip(*ids, strict=True)), "inputs choose other experts"
    finally:
        experts.close()


class Timed:
    """What `gpu_decode.measure` asks, with given milliseconds."""

    rows, experts = 2, 7.5

    def __init__(self, **ms: float) -> None:
        self._ms = ms

    def __getattr__(self, name: str) -> Any:
        return lambda number: self._ms[name] / 1e3


@pytest.mark.parametrize(
    ("step", "cpu", "card", "limited_by", "share", "holds"),
    [
        (8.8, 8.0, 2.0, "cpu", 0.909, True),
        (8.81, 8.0, 2.0, "cpu", 0.908, False),
        (9, 2, 6, "card", 0.667, False),
    ],
)
def test_a_decode_row_is_per_layer_and_held_to_the_slower_half(
    step: float, cpu: float, card: float, limited_by: str, share: float, holds: bool
) -> None:
    timed: Any = Timed(step=step, cpu=cpu, card=card)
    row = gpu_decode.measure(timed, layers=4, rounds=3)
    assert (row["step_ms"], row["cpu_ms"], row["card_ms"]) == (round(step / 4, 4), cpu / 4, card / 4)
    assert (row["limited_by"], row["share_of_limit"], row["holds"]) == (limited_by, share, holds)


def test_contenders_take_turns_and_warm_up() -> None:
    asked: list[tuple[str, int]] = []

    def run(name: str, number: int) -> float:
        asked.append((name, number))
        return [100.0, 3.0, 1.0, 2.0][number]

    found = in_turn({"a": lambda n: run("a", n), "b": lambda n: run("b", n) * 2}, rounds=3, warm=1)
    assert found == {"a": 2.0, "b": 4.0}
    assert asked == [(name, number) for number in range(4) for name in "ab"]


def test_prefill_rows_count_what_went_over_the_bus(spec: ModelSpec) -> None:
    one, two, buffered = gpu_prefill.rows(slice_of(spec, "int8", "fp8"), CHUNK, (1, 2), rounds=2)
    assert (one["tokens"], two["tokens"], buffered["tokens"]) == (CHUNK, 2 * CHUNK, CHUNK)
    assert [row["experts"] for row in (one, two, buffered)] == ["locked slots", "locked slots", "buffers"]
    # At the emulated rates nothing is left to the CPU but what few rows chose.
    assert 0 < one["streamed_experts"] <= LAYERS * spec.num_experts
    assert one["streamed_experts"] < two["streamed_experts"] <= 2 * LAYERS * spec.num_experts
    assert one["streamed_gb"] == round(
        one["streamed_experts"] * ModelSizes.of(spec).experts.expert_bytes / 1e9, 3
    )
    assert min(one["tokens_s"], one["copy_gb_s"], one["share_of_limit"]) > 0


@pytest.mark.parametrize("locked", [True, False])
def test_prefill_goes_the_way_it_says(spec: ModelSpec, locked: bool) -> None:
    prefill = Prefill(slice_of(spec), CHUNK, locked=locked)
    try:
        with torch.no_grad():
            _, streamed = prefill.run(1)
        assert streamed > 0
        assert (prefill.experts.locked_bytes > 0) == locked
    finally:
        prefill.experts.close()


def test_what_is_not_streamed_misses_the_bar(spec: ModelSpec) -> None:
    prefill = Prefill(slice_of(spec), 2)  # so few rows are never streamed
    try:
        with torch.no_grad():
            row = gpu_prefill.measure(prefill, 2, 1, rounds=1)
    finally:
        prefill.experts.close()
    assert (row["streamed_experts"], row["share_of_limit"], row["holds"]) == (0, 0.0, False)


class Streamed:
    """What `gpu_prefill.measure` asks: ten experts of 1 MB a pass, in 5 ms, beside copies of 1 to 4 GB/s."""

    expert_bytes = 10**6

    def __init__(self) -> None:
        self._rates = iter([9e9, 1e9, 4e9, 2.5e9])  # the first warms up

    def run(self, passes: int) -> tuple[float, int]:
        return 0.005 * passes, 10 * passes

    def copy_rate(self) -> float:
        return next(self._rates)


def test_a_prefill_row_is_held_to_copies_of_its_own_round() -> None:
    prefill: Any = Streamed()
    row = gpu_prefill.measure(prefill, 100, 2, rounds=3)
    # 20 MB at 1, 4 and 2.5 GB/s take 20, 5 and 8 ms, beside 10 ms.
    assert (row["tokens_s"], row["share_of_limit"], row["holds"]) == (20_000.0, 0.8, True)
    assert (row["copy_gb_s"], row["streamed_gb"]) == (2.5, 0.02)


def test_a_bar_that_is_missed_becomes_the_exit_code(tmp_path: Path) -> None:
    kept = tmp_path / "rows.json"
    assert report([{"us": 1.0}, {"us": 1.0, "holds": True}], kept, {"device": "none"}) == 0
    assert report([{"us": 1.0, "holds": False}, {"us": 2.0, "holds": True}], kept, {"device": "none"}) == 1
    assert [row["us"] for row in json.loads(kept.read_text())["rows"]] == [1.0, 2.0]


def test_experts_get_a_bounded_part_of_the_ram(spec: ModelSpec) -> None:
    assert expert_memory(spec, most=8 << 20).nbytes == 8 << 20
    assert expert_memory(spec, most=1).nbytes >= ModelSizes.of(spec).experts.expert_bytes
    true = published_spec()
    assert (true.hidden_size, true.num_experts, len(true.moe_layers)) == (7168, 384, 60)


def test_weights_are_made_once_for_all_networks(spec: ModelSpec) -> None:
    made = slice_of(spec, "fp8", "fp8")
    first, second = (made.network(made.dispatcher(1)) for _ in range(2))
    head = first.head.weight
    assert isinstance(head, Weight8)
    assert head.kind == "fp8"
    assert second.head.weight is head


@pytest.mark.parametrize("hot", [0, 3])
def test_a_step_that_is_recorded_waits_for_nothing(spec: ModelSpec, hot: int) -> None:
    """All of it but what plays kernels: a wait, or memory by data, would break the capture on a card."""
    made = slice_of(spec, "bf16", "fp8")
    device = made.device
    slots = DeviceSlots(
        made.store,
        device.copies,
        device.torch,
        layers=spec.num_layers,
        experts=spec.num_experts,
        hidden=spec.hidden_size,
        inter=spec.moe_intermediate_size,
        count=hot,
    )
    with NoWaiting() as guard, torch.no_grad():
        answers = AtOnce(2, spec.hidden_size, device.torch)
        experts = HybridExperts(answers, slots, guard.allowed(device.compute), emulated_rates(spec))
        network = made.network(experts)
        assert network.decode is not None
        for layer in network.layers:
            layer.attention.decode = guard.allowed(network.decode)
        step = DecodeStep(network, 2, 4, pinned=False)
        guard.allowed(step.fill)(made.batch([200, 100], 1, 0))
        guard.allowed(step.work)()
        step.work()
        with pytest.raises(WaitsError):
            step.logits.tolist()
    slots.close()
