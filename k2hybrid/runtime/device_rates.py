"""How fast card, bus and CPU are at experts, measured at start, for the split between them. Layer 5.

What the card does is timed as a recorded step does it: launched by the device, not by Python, whose launches
and waits take longer than the experts of a decode step.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.config import DenseWeights
from k2hybrid.errors import K2Error
from k2hybrid.experts.compute import ExpertCompute
from k2hybrid.experts.copies import CopyEngine
from k2hybrid.experts.handoff import Handoff
from k2hybrid.experts.prediction import ModelSizes
from k2hybrid.experts.split import HANDOFF_S, PLAN_S, SplitRates
from k2hybrid.experts.store import ExpertStore
from k2hybrid.hardware.bandwidth import quick_gb_s
from k2hybrid.hardware.streams import SignalStream
from k2hybrid.model.decode_step import Recorder
from k2hybrid.model.layers import MLP
from k2hybrid.model.linears import DeviceLinears
from k2hybrid.native.machine import Machine
from k2hybrid.runtime.random_bytes import arena_bytes
from k2hybrid.types import LinearWeight, Weight8

log = logging.getLogger(__name__)

EXPERTS = 8  # of one call
MANY_ROWS = 1024
PROBE_BYTES = 256 << 20  # of RAM
HANDOFFS = 32  # of a step, so that its beginning and end count little
ROUNDS = 5

CPU_SHARE = 0.6  # of the CPU's peak that experts with many rows reach
LEAST_SHARE = 0.1  # of a call's time that its experts are taken to need, whatever a call without any says

Call = Callable[[], object]


@dataclass(frozen=True)
class Clock:
    """How a device's work is timed.

    Attributes:
        captured: seconds of one of these calls, all one after the other, without their launches.
        queued: seconds of what one call puts on the device's stream.
        cache_bytes: of the device; what is read again is to be four times as large.
    """

    captured: Callable[[Sequence[Call]], float]
    queued: Callable[[Call], float]
    cache_bytes: int = 0

    def copies(self, nbytes: int) -> int:
        """How many operands of this size take turns."""
        return 4 * self.cache_bytes // nbytes + 1


def measure_split_rates(
    spec: ModelSpec,
    dense: DenseWeights,
    machine: Machine,
    compute: ExpertCompute,
    copies: CopyEngine,
    device: torch.device,
    *,
    clock: Clock,
    handoff_s: float = HANDOFF_S,
    probe_bytes: int = PROBE_BYTES,
) -> SplitRates:
    """Run `compute`, copies and a shared expert over bytes of no meaning, and read RAM: about a second.

    Args:
        dense: what the shared expert's weights are.
        handoff_s: see `measured_handoff`.
    """
    sizes = ModelSizes.of(spec).experts
    hidden, inter, expert_bytes = sizes.hidden, sizes.inter, sizes.expert_bytes
    host = copies.buffer(EXPERTS * expert_bytes)
    memory = arena_bytes(max(probe_bytes, host.nbytes))
    host.copy_(memory[: host.nbytes])  # ordinary numbers
    sets = [
        torch.zeros(EXPERTS, expert_bytes, dtype=torch.uint8, device=device)
        for _ in range(clock.copies(host.nbytes))
    ]
    bus = host.nbytes / clock.queued(lambda: copies.in_order(sets[0].view(-1), host))
    for slots in sets[1:]:
        slots.copy_(sets[0])
    x = torch.full((MANY_ROWS, hidden), 0.01, dtype=torch.bfloat16, device=device)
    each = torch.arange(EXPERTS, dtype=torch.int32, device=device)[None]
    none = torch.full_like(each, -1)
    one = torch.zeros(MANY_ROWS, 1, dtype=torch.int32, device=device)

    def seconds(rows: int, chosen: torch.Tensor) -> float:
        weights = torch.ones(chosen.shape, dtype=torch.float32, device=device)
        call = partial(compute, x[:rows], chosen=chosen, weights=weights, hidden=hidden, inter=inter)
        return clock.captured([partial(call, slots=slots) for slots in sets])

    launch_s, few_s = seconds(1, none), seconds(1, each)
    few_s = max(few_s - launch_s, LEAST_SHARE * few_s)
    row_s = max(seconds(MANY_ROWS, one) - launch_s, 0.0) / MANY_ROWS
    peak = machine.peak("bf16") or machine.peak("int8") or machine.peak("fp32") or 1e9
    return SplitRates(
        expert_bytes=expert_bytes,
        card=EXPERTS * expert_bytes / few_s,
        ram=quick_gb_s(machine, memory) * 1e9,
        bus=bus,
        card_row_s=row_s,
        cpu_row_s=2 * 3 * hidden * inter / (CPU_SHARE * peak),
        card_busy_s=_shared_s(spec, dense, x[:1], clock),
        card_launch_s=launch_s,
        handoff_s=handoff_s,
        handoff_row_s=6 * hidden / bus,  # bf16 there, fp32 back
        plan_s=PLAN_S,
    )


def shared_expert(spec: ModelSpec, dense: DenseWeights, device: torch.device) -> MLP:
    """One of a model's sizes whose weights, all alike, are of `dense`."""

    def weight(outputs: int, inner: int) -> LinearWeight:
        if dense == "bf16":
            return torch.full((outputs, inner), 0.01, dtype=torch.bfloat16, device=device)
        kind = torch.int8 if dense == "int8" else torch.uint8
        values = torch.ones(outputs, inner, dtype=kind, device=device)
        return Weight8(values, torch.full((outputs,), 0.01, device=device), dense)

    hidden, inter = spec.hidden_size, spec.moe_intermediate_size * spec.num_shared_experts
    gate, up, down = weight(inter, hidden), weight(inter, hidden), weight(hidden, inter)
    return MLP(DeviceLinears(), gate, up, down, torch.bfloat16)


def _shared_s(spec: ModelSpec, dense: DenseWeights, x: torch.Tensor, clock: Clock) -> float:
    """Seconds of one row through a shared expert."""
    if not spec.num_shared_experts:
        return 0.0
    first = shared_expert(spec, dense, x.device)
    nbytes = sum(linear.weight.nbytes for linear in (first.gate, first.up, first.down))
    taking_turns = [first, *(shared_expert(spec, dense, x.device) for _ in range(1, clock.copies(nbytes)))]
    return clock.captured([partial(mlp, x, [slice(None)]) for mlp in taking_turns])


def measured_handoff(
    spec: ModelSpec, machine: Machine, stream: SignalStream, recorder: Recorder, rounds: int = ROUNDS
) -> float:
    """Seconds of one hand-off of a recorded step whose row has no experts: what it adds to the CPU's work.

    Whatever goes wrong is logged, and the assumed time taken: a model can be served all the same.
    """
    layers = range(HANDOFFS)
    sizes = ModelSizes.of(spec).experts
    store = ExpertStore(layers=HANDOFFS, experts=sizes.experts, hidden=sizes.hidden, inter=sizes.inter)
    handoff = Handoff(store, machine, stream, layers=layers, max_rows=1, top_k=spec.top_k)
    x = torch.zeros(1, sizes.hidden, dtype=torch.bfloat16, device=stream.device)
    ids = torch.full((1, spec.top_k), -1, dtype=torch.int32, device=stream.device)  # padding: reads nothing
    weights = torch.zeros(1, spec.top_k, device=stream.device)

    def work() -> None:
        for layer in layers:
            handoff.submit(layer, x, ids, weights).collect()

    def seconds(run: Callable[[], None]) -> float:
        start = time.perf_counter()
        handoff.begin(layers, 1)
        run()
        handoff.end()
        return (time.perf_counter() - start) / HANDOFFS

    try:
        seconds(work)  # what is loaded late is there then
        stream.synchronize()
        repeat = recorder(work)
        return statistics.median(seconds(repeat) for _ in range(rounds + 1))
    except (K2Error, RuntimeError) as problem:
        log.warning("a hand-off cannot be timed and is taken to need %.0f us: %s", HANDOFF_S * 1e6, problem)
        return HANDOFF_S
    finally:
        handoff.close()
