"""Tokens a second of a streamed prefill, beside what the bus alone would allow.

A few MoE layers of Kimi-K2-Thinking's widths take a prompt in passes of a chunk each; whatever experts the
split sends go over the bus: out of locked slots, and the first prompt again by way of buffers, as mapped ones
do. The limit is tokens / (streamed bytes / the rate of a page-locked copy), copies and passes in turn; share
is measured / limit, the median of the rounds, and should be 0.8.

    python -m bench.gpu_prefill [--json FILE] [--layers 2] [--rounds 3] [--chunk 16384]
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from typing import Any

import torch

from bench.device_rates import command, report
from bench.device_slice import Slice, expert_memory, published_spec, seconds
from bench.gpu_doorbell import conditions
from k2hybrid.experts.prediction import ModelSizes
from k2hybrid.model.device import DeviceModel
from k2hybrid.runtime.card import CardFit
from k2hybrid.runtime.device import open_device
from k2hybrid.runtime.hollow import few_layers
from k2hybrid.runtime.on_device import COLD_ROWS, device_experts

CHUNK = 16384
PASSES = (1, 2)
RUNNING = 16  # sequences: so many rows are handed off whatever rates say
COPIED = 8  # experts' bytes in one copy
BAR = 0.8


class Prefill:
    """Prompts through a slice, chunk after chunk.

    Args:
        locked: experts are lent, and go over the bus through no buffer.
    """

    def __init__(self, made: Slice, chunk: int, *, locked: bool = True) -> None:
        self._made, self._chunk, self._locked = made, chunk, locked
        spec, device = made.spec, made.device
        self.expert_bytes = ModelSizes.of(spec).experts.expert_bytes
        fit = CardFit(chunk=chunk, graph_rows=0, hot=0, needs=())
        cold = made.dispatcher(min(COLD_ROWS, chunk))
        self.experts = device_experts(
            device, fit, spec, made.store, made.machine, cold, max_running=RUNNING, dense=made.dense
        )
        self._model = DeviceModel(
            made.network(self.experts),
            self.experts,
            synchronize=device.stream.synchronize,
            recorder=device.recorder,
            context_tokens=made.context,
            graph_rows=0,
        )
        self._host = device.copies.buffer(COPIED * self.expert_bytes)
        self._there = torch.empty(COPIED * self.expert_bytes, dtype=torch.uint8, device=device.torch)

    def run(self, passes: int) -> tuple[float, int]:
        """Seconds, and experts that went over the bus."""
        streamed = 0
        self._made.store.lends = self._locked

        def work() -> None:
            nonlocal streamed
            for number in range(passes):
                state = self._model.begin(self._made.batch([number * self._chunk], self._chunk, number))
                self._model.forward(state, self._model.network.parts)
                streamed += self.experts.stats.misses

        return seconds(work), streamed

    def copy_rate(self) -> float:
        """Bytes a second of a page-locked copy."""
        copies = self._made.device.copies
        taken = seconds(lambda: copies.copy(self._there, [self._host], copies.fence()).wait())
        return self._host.nbytes / taken


def measure(prefill: Prefill, chunk: int, passes: int, rounds: int) -> dict[str, Any]:
    """One row."""
    prefill.run(passes)  # compiles
    prefill.copy_rate()
    shares, times, rates = [], [], []
    streamed = 0
    for _ in range(rounds):
        taken, streamed = prefill.run(passes)
        rate = prefill.copy_rate()
        shares.append(streamed * prefill.expert_bytes / rate / taken)
        times.append(taken)
        rates.append(rate)
    share, taken = statistics.median(shares), statistics.median(times)
    return {
        "case": "streamed prefill",
        "tokens": passes * chunk,
        "passes": passes,
        "rounds": rounds,
        "seconds": round(taken, 4),
        "tokens_s": round(passes * chunk / taken, 1),
        "streamed_experts": streamed,
        "streamed_gb": round(streamed * prefill.expert_bytes / 1e9, 3),
        "copy_gb_s": round(statistics.median(rates) / 1e9, 2),
        "share_of_limit": round(share, 3),
        "bar": BAR,
        "holds": share >= BAR,
    }


@torch.no_grad()
def rows(made: Slice, chunk: int, passes: tuple[int, ...], rounds: int) -> Iterator[dict[str, Any]]:
    """A row a prompt, and the first again through buffers."""
    for locked, counts in ((True, passes), (False, passes[:1])):
        prefill = Prefill(made, chunk, locked=locked)
        try:
            for count in counts:
                row = measure(prefill, chunk, count, rounds) | made.conditions()
                yield row | {"experts": "locked slots" if locked else "buffers"}
        finally:
            prefill.experts.close()


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=CHUNK)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure")
        return 0
    device = open_device("cuda")
    assert device is not None
    spec = few_layers(published_spec(), options.layers)
    memory = expert_memory(spec)
    made = Slice(device, spec, memory, sequences=1, context=max(PASSES) * options.chunk)
    told = conditions() | {"expert_bytes_apart": memory.nbytes}
    return report(rows(made, options.chunk, PASSES, options.rounds), options.json, told)


if __name__ == "__main__":
    sys.exit(main())
