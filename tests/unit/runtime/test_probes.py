"""Probes: they leave nothing behind, and what they time is the model's own work. No figure is judged."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from k2hybrid.checkpoint.spec import ModelSpec, read_spec
from k2hybrid.config import MINI_MODEL
from k2hybrid.experts.prediction import ModelSizes, Predictor, Rates
from k2hybrid.model.kimi import Kimi
from k2hybrid.model.mla import head_groups
from k2hybrid.native.machine import Machine
from k2hybrid.runtime import hollow
from k2hybrid.runtime.hollow import HollowNetwork
from k2hybrid.runtime.probes import measure_rates
from k2hybrid.runtime.random_bytes import ByteNetwork, ByteWeights, arena_bytes

PROBE_BYTES = 1 << 22


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return read_spec(MINI_MODEL)


@pytest.fixture(scope="module")
def machine() -> Machine:
    return Machine(2)


def check(rates: Rates, cores: int) -> None:
    values = dataclasses.asdict(rates)
    assert rates.cores == cores
    assert all(math.isfinite(value) and value >= 0 for value in values.values()), values
    for name in ("ram_gb_s", "dense_gb_s", "mapped_gb_s", "arena_gb_s", "dense_ops", "expert_ops"):
        assert values[name] > 0
    assert 0 <= rates.overlap <= 1


def test_every_rate_is_found_and_nothing_is_left_behind(
    spec: ModelSpec, machine: Machine, tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    rates = measure_rates(spec, machine, folder=tmp_path, probe_bytes=PROBE_BYTES)
    check(rates, 2)
    assert list(tmp_path.iterdir()) == []
    assert torch.get_num_threads() == threads
    predictor = Predictor(ModelSizes.of(spec), rates, "mapped")
    assert predictor.decode(1, 100).seconds > 0
    assert predictor.prefill(600).seconds > predictor.prefill(500).seconds


def test_a_model_without_routed_experts_has_rates_as_well(
    spec: ModelSpec, machine: Machine, tmp_path: Path
) -> None:
    dense = dataclasses.replace(spec, first_k_dense=spec.num_layers)
    check(measure_rates(dense, machine, folder=tmp_path, probe_bytes=PROBE_BYTES), 2)


def test_a_folder_that_cannot_be_written_is_an_error(
    spec: ModelSpec, machine: Machine, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match="nowhere"):
        measure_rates(spec, machine, folder=tmp_path / "nowhere", probe_bytes=PROBE_BYTES)


class _Recorder:
    """`ContextKernels` that say what the machine was asked for."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.rows = machine.rows
        self.calls: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []

    def attend(self, q: torch.Tensor, rows: torch.Tensor, spans: Any, **options: Any) -> torch.Tensor:
        self.calls += [("attend", tuple(q.shape), (start, n)) for _, start, n in spans]
        return self._machine.attend(q, rows, spans, **options)

    def __getattr__(self, name: str) -> Any:
        def call(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            self.calls.append((name, tuple(x.shape), tuple(weight.shape)))
            product: torch.Tensor = getattr(self._machine, name)(x, weight)
            return product

        return call


@pytest.mark.parametrize(("starts", "count"), [((64,), 1), ((64, 0), 1), ((0,), 400)])
def test_a_hollow_network_computes_the_context_and_no_weights(
    spec: ModelSpec, machine: Machine, starts: tuple[int, ...], count: int
) -> None:
    recorder = _Recorder(machine)
    network = HollowNetwork(spec, recorder, 512)
    seconds = network.layer_seconds(starts, count, repeats=1)
    assert seconds > 0
    heads = head_groups(spec.num_heads, on_device=False)[0].stop
    rows = heads * (spec.qk_nope_head_dim + spec.v_head_dim)
    width = spec.qk_head_dim
    for name, x, weight in recorder.calls:
        if count == 1:  # absorbed: queries over latent rows
            assert name == "attend"
            assert x == (len(starts), spec.num_heads, spec.latent_dim)
            assert weight in {(start, 1) for start in starts}
        else:  # expanded: kv_b over the context, and scores by head
            assert (name, weight) == ("linear", (rows, spec.kv_lora_rank)) or (
                name == "head_linear" and weight[2] == width
            )
    assert len(recorder.calls) >= 2 * len(starts)  # the first pass is not timed


def test_a_hollow_network_runs_the_layer_that_the_model_runs(
    spec: ModelSpec, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[ModelSpec] = []

    class Seen(Kimi):
        def __init__(self, spec: ModelSpec, *args: Any, **kwargs: Any) -> None:
            built.append(spec)
            super().__init__(spec, *args, **kwargs)

    monkeypatch.setattr(hollow, "Kimi", Seen)
    HollowNetwork(spec, machine, 64)
    assert [one.is_moe(0) for one in built] == [True]
    same = {name: getattr(spec, name) for name in ("num_layers", "first_k_dense", "vocab_size")}
    assert dataclasses.replace(built[0], **same) == spec


def test_random_bytes_are_ordinary_numbers_in_every_layer(
    spec: ModelSpec, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[torch.Tensor] = []

    class Kept(Kimi):
        def forward(self, state: Any, until: int | None = None) -> Any:
            done = super().forward(state, until)
            states.append(done.hidden)
            return done

    monkeypatch.setattr(hollow, "Kimi", Kept)
    network = ByteNetwork(spec, machine, arena_bytes(PROBE_BYTES), 128)
    assert network.layer_seconds((64, 0, 5), 1, repeats=1) > 0
    assert network.pass_seconds(repeats=1) > 0
    for state in states:
        assert state.isfinite().all()
        assert 1e-3 < state.abs().mean() < 1e3
    rows = states[0]
    assert not torch.equal(rows[0], rows[1])  # sequences differ, so that their experts do


def test_matrices_lie_as_in_files(spec: ModelSpec, machine: Machine) -> None:
    memory = arena_bytes(PROBE_BYTES)
    weights = ByteWeights(spec, memory)
    for layer in range(spec.num_layers):
        weight = weights.take(layer, "o_proj")
        assert weight.shape == (spec.hidden_size, spec.num_heads * spec.v_head_dim)
        start = weight.data_ptr() - memory.data_ptr()
        assert start % 8 == 0
        assert 0 < start <= start + weight.nbytes <= memory.nbytes
