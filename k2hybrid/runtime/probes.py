"""What this machine takes for the pieces of a model, measured in seconds and without its weights. Layer 5.

The kernels run over random bytes at the model's widths (`random_bytes`): one row through a layer's matrices
and through as many experts as a token has, then many rows; and whole layers in steps of one row and of
several. What a chunk does beside its weights is timed on a layer without any (`hollow`).
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from k2hybrid.cache.pages import PAGE_TOKENS
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.experts.prediction import CHUNK_ROWS, ModelSizes, Predictor, Rates, arithmetic_rates
from k2hybrid.hardware.bandwidth import quick_gb_s
from k2hybrid.model.sampler import Sampler
from k2hybrid.native.machine import Machine
from k2hybrid.runtime.hollow import HollowNetwork, few_layers
from k2hybrid.runtime.loading import WIDE_ATTENTION
from k2hybrid.runtime.random_bytes import (
    SHIFT,
    ByteNetwork,
    DenseBytes,
    ExpertBytes,
    arena_bytes,
    layer_bytes,
    mapped_bytes,
)
from k2hybrid.types import SamplingParams

PROBE_BYTES = 1 << 30  # several times any last-level cache
ROUNDS = 5
SHORT, LONG = 64, 4096  # tokens of context
MANY = 8  # sequences
STEPS = 7  # a round
FEW_TOKENS, FULL_TOKENS = 4, 64  # an expert: one tile of the kernels, and enough to be bound by arithmetic


def measure_rates(
    spec: ModelSpec, machine: Machine, *, folder: Path | None = None, probe_bytes: int = PROBE_BYTES
) -> Rates:
    """Run the probes, about ten seconds at true widths.

    Args:
        folder: where a file of `probe_bytes` is made and removed; default the system's for temporary files.

    Raises:
        OSError: the file cannot be written.
    """
    # In a thread of its own: it is pinned, as the engine's is.
    with ThreadPoolExecutor(1, thread_name_prefix="probes") as worker:
        return worker.submit(_measure, spec, machine, folder, probe_bytes).result()


def _measure(spec: ModelSpec, machine: Machine, folder: Path | None, probe_bytes: int) -> Rates:
    machine.pin_caller()
    sizes = ModelSizes.of(spec)
    probe_bytes = max(probe_bytes, SHIFT + max(layer_bytes(spec), sizes.experts.expert_bytes))
    before = torch.get_num_threads()
    try:
        with mapped_bytes(folder, probe_bytes) as mapped:
            return _rates(spec, machine, mapped, arena_bytes(probe_bytes))
    finally:
        torch.set_num_threads(before)


def _rates(spec: ModelSpec, machine: Machine, mapped: torch.Tensor, arena: torch.Tensor) -> Rates:
    sizes = ModelSizes.of(spec)
    torch.set_num_threads(1)
    pieces: dict[str, Callable[[], float]] = {"ram": lambda: quick_gb_s(machine, arena)}
    dense = DenseBytes(spec, machine, mapped)
    pieces |= {"dense one": lambda: dense.seconds(1), "dense many": lambda: dense.seconds(CHUNK_ROWS)}
    if sizes.experts.count:
        in_file, in_arena = (ExpertBytes(sizes, machine, memory) for memory in (mapped, arena))
        pieces |= {
            "mapped one": lambda: in_file.seconds(1),
            "arena one": lambda: in_arena.seconds(1),
            "mapped few": lambda: in_file.seconds(FEW_TOKENS),
            "mapped full": lambda: in_file.seconds(FULL_TOKENS),
            "mapped chunk": in_file.chunk_seconds,
        }
    network = ByteNetwork(spec, machine, mapped, LONG + PAGE_TOKENS)
    pieces |= {
        "step": lambda: network.layer_seconds((SHORT,), 1, STEPS),
        "step many": lambda: network.layer_seconds((SHORT,) * MANY, 1, STEPS),
        "step long": lambda: network.layer_seconds((LONG,), 1, STEPS),
    }
    found: dict[str, list[float]] = {name: [] for name in pieces}
    for _ in range(ROUNDS):  # in turn, so that a drift of the machine meets all of them
        for name, measure in pieces.items():
            found[name].append(measure())
    median = {name: statistics.median(values) for name, values in found.items()}

    expert_bytes = sizes.experts.expert_bytes
    expert_ops = overlap = 1.0
    mapped_gb_s = arena_gb_s = median["ram"]
    if sizes.experts.count:
        mapped_gb_s, arena_gb_s = (expert_bytes / median[f"{k} one"] / 1e9 for k in ("mapped", "arena"))
        expert_ops, overlap = arithmetic_rates(
            sizes,
            one=median["mapped one"],
            few=(FEW_TOKENS, median["mapped few"]),
            full=(FULL_TOKENS, median["mapped full"]),
            chunk=median["mapped chunk"],
        )
    beyond = median["dense many"] - (1.0 - overlap) * median["dense one"]
    rates = Rates(
        cores=machine.threads,
        ram_gb_s=median["ram"],
        dense_gb_s=dense.nbytes / median["dense one"] / 1e9,
        mapped_gb_s=mapped_gb_s,
        arena_gb_s=arena_gb_s,
        dense_ops=(CHUNK_ROWS - 1) * dense.nbytes / 2 / max(beyond, median["dense many"] / 2),
        expert_ops=expert_ops,
        overlap=overlap,
        step_s=0.0,
        sequence_s=0.0,
        context_s=max(0.0, median["step long"] - median["step"]) / (LONG - SHORT),
        sample_s=_sample_seconds(spec) + network.pass_seconds(STEPS),
        **_chunk_rates(spec, machine),
    )
    # Of whole steps, what is not explained by weights and context.
    one_layer = Predictor(ModelSizes.of(few_layers(spec, 1)), rates, "mapped")
    one, many = (
        median[name] - one_layer.weights_seconds(n) - n * SHORT * rates.context_s
        for name, n in (("step", 1), ("step many", MANY))
    )
    step_s = max(0.0, one)
    return dataclasses.replace(rates, step_s=step_s, sequence_s=max(0.0, (many - step_s) / (MANY - 1)))


def _sample_seconds(spec: ModelSpec) -> float:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=0), spec.vocab_size)
    logits = np.random.default_rng(0).standard_normal(spec.vocab_size, np.float32)
    return statistics.median(_timed(lambda: sampler.sample(logits)) for _ in range(20))


def _chunk_rates(spec: ModelSpec, machine: Machine) -> dict[str, float]:
    """What a chunk takes beside its weights: they would hide it, so they are left out."""
    network = HollowNetwork(spec, machine, LONG // 2 + CHUNK_ROWS)
    torch.set_num_threads(machine.threads if spec.num_heads * spec.v_head_dim >= WIDE_ATTENTION else 1)
    first = network.layer_seconds((0,), CHUNK_ROWS, 3)
    later = network.layer_seconds((LONG // 2,), CHUNK_ROWS, 3)
    context_s = max(0.0, later - first) / (LONG // 2)
    return {"chunk_s": max(0.0, first - CHUNK_ROWS * context_s), "chunk_context_s": context_s}


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
