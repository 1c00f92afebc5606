"""How fast card, bus and CPU are at experts, measured at start, for the split between them. Layer 5."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.experts.compute import ExpertCompute
from k2hybrid.experts.copies import CopyEngine
from k2hybrid.experts.prediction import ModelSizes
from k2hybrid.experts.split import HANDOFF_S, LAUNCH_S, PLAN_S, SplitRates
from k2hybrid.hardware.bandwidth import quick_gb_s
from k2hybrid.native.machine import Machine
from k2hybrid.runtime.random_bytes import arena_bytes

EXPERTS = 8  # that are read one after the other: together larger than a card's cache
MANY_ROWS = 1024
ROUNDS = 5
PROBE_BYTES = 256 << 20  # of RAM

CPU_SHARE = 0.6  # of the CPU's peak that experts with many rows reach


def measure_split_rates(
    spec: ModelSpec,
    machine: Machine,
    compute: ExpertCompute,
    copies: CopyEngine,
    device: torch.device,
    synchronize: Callable[[], None],
    *,
    probe_bytes: int = PROBE_BYTES,
) -> SplitRates:
    """Run `compute` and copies over a few experts of random bytes, and read RAM: about a second.

    Args:
        synchronize: returns when the device has done all that was asked of it.
    """
    sizes = ModelSizes.of(spec).experts
    hidden, inter, expert_bytes = sizes.hidden, sizes.inter, sizes.expert_bytes
    host = copies.buffer(EXPERTS * expert_bytes)
    memory = arena_bytes(max(probe_bytes, host.nbytes))
    host.copy_(memory[: host.nbytes])  # ordinary numbers
    slots = torch.zeros(EXPERTS, expert_bytes, dtype=torch.uint8, device=device)
    x = torch.full((MANY_ROWS, hidden), 0.01, dtype=torch.bfloat16, device=device)
    each = torch.arange(EXPERTS, dtype=torch.int32, device=device)[None]
    one = torch.zeros(MANY_ROWS, 1, dtype=torch.int32, device=device)

    def seconds(work: Callable[[], object]) -> float:
        times = []
        for _ in range(ROUNDS + 1):  # the first compiles and loads
            synchronize()
            start = time.perf_counter()
            work()
            synchronize()
            times.append(time.perf_counter() - start)
        return max(statistics.median(times[1:]), 1e-9)

    def run(rows: int, chosen: torch.Tensor) -> torch.Tensor:
        weights = torch.ones(chosen.shape, dtype=torch.float32, device=device)
        return compute(x[:rows], slots, chosen, weights, hidden=hidden, inter=inter)

    bus = host.nbytes / seconds(lambda: copies.copy(slots.view(-1), [host], copies.fence()).wait())
    card = EXPERTS * expert_bytes / seconds(lambda: run(1, each))
    card_row_s = seconds(lambda: run(MANY_ROWS, one)) / MANY_ROWS
    peak = machine.peak("bf16") or machine.peak("int8") or machine.peak("fp32") or 1e9
    shared_bytes = 2 * 3 * hidden * inter * spec.num_shared_experts
    return SplitRates(
        expert_bytes=expert_bytes,
        card=card,
        ram=quick_gb_s(machine, memory) * 1e9,
        bus=bus,
        card_row_s=card_row_s,
        cpu_row_s=2 * 3 * hidden * inter / (CPU_SHARE * peak),
        card_busy_s=shared_bytes / card,
        card_launch_s=LAUNCH_S,
        handoff_s=HANDOFF_S,
        handoff_row_s=6 * hidden / bus,  # bf16 there, fp32 back
        plan_s=PLAN_S,
    )
