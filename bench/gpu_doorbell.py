"""Microseconds per round trip between a captured CUDA graph and the CPU thread that answers it.

A step of 60 signal/wait pairs, as many as the model has MoE layers, is captured once and replayed; the CPU
answers at once, so what is left is the hand-off itself. The limit beside it is a graph of as many nodes, each
a kernel that reads one word of pinned memory: launches and the bus, without anybody to wait for.

    python -m bench.gpu_doorbell [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from k2hybrid.errors import EngineError
from k2hybrid.hardware.cuda_driver import CudaDriver
from k2hybrid.hardware.cuda_graphs import captured
from k2hybrid.hardware.device_side import DeviceSide
from k2hybrid.hardware.doorbell import Doorbell
from k2hybrid.hardware.streams import SIGNALS, Signal

LAYERS = 60
REPLAYS = 1000


def capture(record: Callable[[], None]) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with captured(graph):
        record()
    return graph


def capture_step(device: DeviceSide, layers: int) -> torch.cuda.CUDAGraph:
    """All rings and waits of one step; slot i sends 1000 + i and reads its answer into ``device.outputs``."""

    def record() -> None:
        for slot in range(layers):
            device.ring(slot, 1000 + slot)
            device.wait(slot)
        for slot in range(layers):
            device.read_output(slot)

    return capture(record)


def capture_rings(device: DeviceSide, layers: int) -> torch.cuda.CUDAGraph:
    """Rings and waits alone."""

    def record() -> None:
        for slot in range(layers):
            device.ring(slot, 0)
            device.wait(slot)

    return capture(record)


def record_reads(device: DeviceSide, count: int) -> None:
    for i in range(count):
        device.read_output(i % device.doorbell.slots)


def synchronize_within(seconds: float, doorbell: Doorbell) -> float:
    """Wait for the device and return the seconds it took; one still waiting then is freed with an error."""
    stream = torch.cuda.current_stream()
    start = time.perf_counter()
    while not stream.query():
        if time.perf_counter() - start > seconds:
            while not stream.query() and time.perf_counter() - start < seconds + 5:
                doorbell.release_all()
                time.sleep(0.001)
            raise EngineError(f"the graph was still waiting after {seconds} s")
    return time.perf_counter() - start


@contextmanager
def pinned_doorbell(layers: int, **options: float) -> Iterator[Doorbell]:
    """Pinned memory outlives the graph: the device is idle before it goes."""
    doorbell = Doorbell(layers, pinned=True, **options)
    try:
        yield doorbell
    finally:
        doorbell.abort()
        torch.cuda.synchronize()


def replay_times_us(replay: Callable[[], None], replays: int) -> list[float]:
    times = []
    for _ in range(replays):
        start = time.perf_counter()
        replay()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e6)
    return times


def round_trips(signal: Signal, layers: int = LAYERS, replays: int = REPLAYS) -> dict[str, Any]:
    """One row: microseconds per round trip over all replays, each of them one step."""
    with pinned_doorbell(layers) as doorbell:
        device = DeviceSide(doorbell, signal)
        rings = capture_rings(device, layers)
        for _ in range(3):
            doorbell.publish(rows=1, layers=layers)
            rings.replay()
            synchronize_within(5.0, doorbell)
            doorbell.finish().require_answered()

        times = []
        for _ in range(replays):
            doorbell.publish(rows=1, layers=layers)
            times += replay_times_us(rings.replay, 1)
            doorbell.finish().require_answered()

        reads = capture(lambda: record_reads(device, 2 * layers))
        limit = statistics.median(replay_times_us(reads.replay, max(replays // 10, 10))) / layers
    median = statistics.median(times) / layers
    return {
        "case": "doorbell round trip",
        "signal": signal,
        "layers": layers,
        "replays": replays,
        "us_mean": round(statistics.fmean(times) / layers, 3),
        "us_median": round(median, 3),
        "us_p99": round(sorted(times)[int(len(times) * 0.99)] / layers, 3),
        "limit_us": round(limit, 3),
        "share_of_limit": round(limit / median, 3),
    }


def conditions() -> dict[str, Any]:
    return {
        "device": CudaDriver().describe(),
        "torch": torch.__version__,
        "cuda_of_torch": torch.version.cuda,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write conditions and rows here")
    parser.add_argument("--replays", type=int, default=REPLAYS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure")
        return 0
    rows = []
    for signal in SIGNALS:
        row = round_trips(signal, replays=options.replays)
        print(
            f"{signal:16} {row['us_median']:7.2f} us per round trip (p99 {row['us_p99']:.2f}), "
            f"limit {row['limit_us']:.2f} us, share {row['share_of_limit']:.0%}",
            flush=True,
        )
        rows.append(row)
        if options.json is not None:
            options.json.write_text(json.dumps({"conditions": conditions(), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
