"""What a card does at best: its memory, its matrix products, and the bus to it. Layer 5.

Times are of captured graphs, so that launches from Python do not count. Those of the bus hardly do.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from k2hybrid.experts.card_prediction import CardRates
from k2hybrid.experts.copies import CudaCopies
from k2hybrid.hardware.cuda_graphs import captured
from k2hybrid.model.card_memory import CONTEXT_BYTES
from k2hybrid.runtime.device_rates import Clock

log = logging.getLogger(__name__)

REPLAYS = 20
COPY_BYTES = 1 << 30
HOST_BYTES = 256 << 20
SIDE = 8192  # of the matrices


def us_per_call(calls: Sequence[Callable[[], Any]], replays: int = REPLAYS) -> float:
    """Median over replays of one graph of all calls, one after the other."""
    for call in calls:
        call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with captured(graph):
        for call in calls:
            call()
    return median_us(graph.replay, replays) / len(calls)


def median_us(work: Callable[[], Any], replays: int = REPLAYS) -> float:
    """Median of what the current stream takes for it, a few runs later."""
    new_event: Any = torch.cuda.Event
    times: list[float] = []
    for _ in range(replays + 3):
        start, end = new_event(enable_timing=True), new_event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times[3:])


def card_clock(device: torch.device) -> Clock:
    """Of a card that is the calling thread's device."""

    def seconds(calls: Sequence[Callable[[], Any]]) -> float:
        try:
            return 1e-6 * us_per_call(calls)
        except RuntimeError:  # it is served all the same, unrecorded, and then launches count
            log.exception("calls cannot be captured; their launches are timed with them")
            return 1e-6 * statistics.fmean(median_us(call) for call in calls)

    cache: int = torch.cuda.get_device_properties(device).L2_cache_size
    return Clock(seconds, lambda call: 1e-6 * median_us(call), cache)


def copy_rate(nbytes: int = COPY_BYTES) -> float:
    """Bytes a second of a copy within the card, reads and writes together."""
    source = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * nbytes / us_per_call([lambda: target.copy_(source)]) * 1e6


def matmul_rate(side: int = SIDE) -> float:
    """Operations a second of a bf16 matrix product."""
    a, b = (torch.randn(side, side, device="cuda").bfloat16() for _ in range(2))
    product = torch.empty_like(a)
    return 2 * side**3 / us_per_call([lambda: torch.matmul(a, b, out=product)]) * 1e6


def measure_card(device: torch.device) -> tuple[int, CardRates]:
    """Bytes that a process may take of its memory, its CUDA context included, and rates: about a second.

    Raises:
        RuntimeError: too little memory is free, or this torch has no kernels for it.
    """
    torch.cuda.set_device(device)
    free: int = torch.cuda.mem_get_info(device)[0]
    copies = CudaCopies(device)
    host = copies.buffer(HOST_BYTES)
    there = torch.empty(HOST_BYTES, dtype=torch.uint8, device=device)
    bus = HOST_BYTES / median_us(lambda: copies.in_order(there, host)) * 1e6
    return free + CONTEXT_BYTES, CardRates(copy_rate() / 1e9, bus / 1e9, matmul_rate() / 1e12)
