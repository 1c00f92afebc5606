"""Microseconds a layer of the hand-off with experts behind it, beside the CPU's own time for the same.

A step of 60 layers is captured once and replayed: each layer copies its rows to the CPU, rings, waits and
copies the sum back. Experts have the model's hidden size and a quarter of its inner size, so that what the
hand-off adds is seen. The limit beside it is the dispatcher called on the CPU with the same rows; the share
is limit / measured.

    python -m bench.gpu_handoff [--json FILE] [--emulated]

`--emulated` plays the device with an ordinary thread, for machines without one: copies and waits inline.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.gpu_doorbell import capture, conditions
from k2hybrid.experts.dispatch import Dispatcher
from k2hybrid.experts.handoff import Handoff
from k2hybrid.experts.store import ExpertStore
from k2hybrid.hardware.streams import SIGNALS, CudaStream, EmulatedStream, SignalStream
from k2hybrid.native.machine import Machine
from k2hybrid.types import ExpertRef, Int4Ref, TensorRef

HIDDEN, INTER, EXPERTS, TOP_K, LAYERS = 7168, 512, 64, 8, 60
BATCHES = (1, 2, 4, 8)
REPLAYS = 50


class Experts:
    """A store of random experts, the same in every layer, and the memory that they lie in."""

    def __init__(self, hidden: int, inter: int, experts: int, layers: int) -> None:
        self.store = ExpertStore(layers=layers, experts=experts, hidden=hidden, inter=inter)
        packed, scales = hidden * inter // 2, hidden * inter // 16
        g = torch.Generator().manual_seed(1)
        self._nibbles = torch.randint(0, 256, (experts, 3, packed), generator=g, dtype=torch.uint8)
        # 0.002 to 0.008: an expert's outputs are about as large as its inputs.
        codes = torch.randint(0x3B00, 0x3C00, (experts, 3, scales // 2), generator=g, dtype=torch.int16)
        self._scales = codes.view(torch.uint8)
        for layer in range(layers):
            for expert in range(experts):
                shapes = ((inter, hidden), (inter, hidden), (hidden, inter))
                parts = [self._matrix(expert, part, *shape) for part, shape in enumerate(shapes)]
                self.store.add_expert(layer, expert, ExpertRef(*parts))

    def _matrix(self, expert: int, part: int, out: int, inner: int) -> Int4Ref:
        def ref(memory: torch.Tensor, dtype: str, columns: int) -> TensorRef:
            stretch = memory[expert, part]
            shape = (out, columns)
            return TensorRef("t", Path("memory"), 0, stretch.nbytes, dtype, shape, stretch.data_ptr())

        return Int4Ref(ref(self._nibbles, "I32", inner // 8), ref(self._scales, "BF16", inner // 32))


class Steps:
    """The same rows through the same layers, handed off by a stream or called."""

    def __init__(self, experts: Experts, stream: SignalStream, layers: int, top_k: int, rows: int) -> None:
        self._experts, store = experts, experts.store
        g = torch.Generator().manual_seed(2)
        self.layers, self.rows = range(layers), rows
        self.x = torch.randn(rows, store.hidden, generator=g).bfloat16()
        self.weights = torch.rand(rows, top_k, generator=g)
        self.ids = [
            torch.stack([torch.randperm(store.experts, generator=g)[:top_k] for _ in range(rows)]).int()
            for _ in self.layers
        ]
        self.machine = Machine()
        self.dispatcher = Dispatcher(store, self.machine, max_rows=rows, top_k=top_k)
        self.handoff = Handoff(store, self.machine, stream, layers=self.layers, max_rows=rows, top_k=top_k)
        self._given = [t.to(stream.device) for t in (self.x, self.weights)]
        self._given_ids = [ids.to(stream.device) for ids in self.ids]
        self.outs: list[torch.Tensor] = []

    def record(self) -> None:
        """What a graph captures."""
        x, weights = self._given
        self.outs = [
            self.handoff.submit(layer, x, self._given_ids[layer], weights).collect() for layer in self.layers
        ]

    def step(self, run: Callable[[], None]) -> float:
        """Seconds of one step, its begin and end included."""
        start = time.perf_counter()
        self.handoff.begin(self.layers, self.rows)
        run()
        self.handoff.end()
        return time.perf_counter() - start

    def on_cpu(self) -> float:
        """Seconds of the same layers without a stream."""
        start = time.perf_counter()
        for layer in self.layers:
            self.dispatcher.submit(layer, self.x, self.ids[layer], self.weights).collect()
        return time.perf_counter() - start

    def check(self) -> None:
        """The last layer's sum has the dispatcher's bits."""
        layer = self.layers[-1]
        want = self.dispatcher.submit(layer, self.x, self.ids[layer], self.weights).collect()
        assert torch.equal(self.outs[layer].cpu(), want), "the hand-off computes something else"


def measure(steps: Steps, signal: str, run: Callable[[], None], replays: int) -> dict[str, Any]:
    """One row. Both are measured in turn, so that what else the machine does meets both."""
    for _ in range(3):
        steps.step(run)
        steps.on_cpu()
    steps.check()
    measured, alone = zip(*((steps.step(run), steps.on_cpu()) for _ in range(replays)), strict=True)
    count = len(steps.layers)
    median, limit = (statistics.median(times) * 1e6 / count for times in (measured, alone))
    return {
        "case": "hand-off of a layer",
        "signal": signal,
        "rows": steps.rows,
        "layers": count,
        "replays": replays,
        "us_median": round(median, 2),
        "us_p99": round(sorted(measured)[int(replays * 0.99)] * 1e6 / count, 2),
        "limit_us": round(limit, 2),
        "added_us": round(median - limit, 2),
        "share_of_limit": round(limit / median, 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write conditions and rows here")
    parser.add_argument("--replays", type=int, default=REPLAYS)
    parser.add_argument("--emulated", action="store_true", help="without a device")
    options = parser.parse_args()
    if not options.emulated and not torch.cuda.is_available():
        print("no CUDA device: nothing to measure")
        return 0
    experts = Experts(HIDDEN, INTER, EXPERTS, LAYERS)
    rows: list[dict[str, Any]] = []
    streams: dict[str, Callable[[], SignalStream]] = {name: partial(CudaStream, name) for name in SIGNALS}
    if options.emulated:
        streams = {"emulated": EmulatedStream}
    for signal, make_stream in streams.items():
        for batch in BATCHES:
            steps = Steps(experts, make_stream(), LAYERS, TOP_K, batch)
            run = steps.record if options.emulated else capture(steps.record).replay
            row = measure(steps, signal, run, options.replays)
            steps.handoff.close()
            print(
                f"{signal:16} {batch} rows {row['us_median']:8.1f} us a layer (p99 {row['us_p99']:.1f}), "
                f"the CPU alone {row['limit_us']:.1f} us, added {row['added_us']:.1f} us, "
                f"share {row['share_of_limit']:.0%}",
                flush=True,
            )
            rows.append(row)
            if options.json is not None:
                about = {} if options.emulated else {"conditions": conditions()}
                options.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
