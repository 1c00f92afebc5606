"""Milliseconds a MoE layer of a recorded decode step, beside what CPU and card take alone for the same.

A few layers of Kimi-K2-Thinking's widths, 8-bit weights and FP8 latents on the card, experts in RAM. The CPU
alone: the experts that the step's rows chose, called without a stream. The card alone: the same step recorded
with experts that answer at once, and without a hand-off. The limit is the longer of the two, share is
limit / measured, and the step may take 1.1 of the limit.

    python -m bench.gpu_decode [--json FILE] [--layers 4] [--rounds 30]
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import torch

from bench.device_rates import command, report
from bench.device_slice import Slice, expert_memory, in_turn, published_spec, seconds
from bench.gpu_doorbell import conditions
from k2hybrid.cache.pages import LatentPages
from k2hybrid.experts.device_experts import DeviceExperts
from k2hybrid.model.decode_step import DecodeStep
from k2hybrid.model.kimi import Kimi
from k2hybrid.runtime.card import CardFit
from k2hybrid.runtime.device import emulated_rates, open_device
from k2hybrid.runtime.hollow import few_layers
from k2hybrid.runtime.on_device import device_experts
from k2hybrid.types import RoutedExperts, Ticket, TicketStats

BATCHES = (1, 2, 4, 8)
CONTEXT = 4096
INPUTS = 8  # that take turns: each chooses other experts
BAR = 1.1

Asked = tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]  # layer, and what it submits


class AtOnce:
    """`RoutedExperts` whose answer, zeros, lies on the device already."""

    failed_rows = ()
    stats = TicketStats(0, 0, 0.0, 0.0)

    def __init__(self, rows: int, hidden: int, device: torch.device) -> None:
        self._out = torch.zeros(rows, hidden, device=device)

    def submit(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Ticket:
        return self

    def collect(self) -> torch.Tensor:
        return self._out


class Heard:
    """`RoutedExperts` that keep what they are asked, in RAM, and let others answer. Not to be recorded."""

    def __init__(self, experts: RoutedExperts) -> None:
        self._experts = experts
        self.asked: list[Asked] = []

    def submit(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Ticket:
        self.asked.append((layer, x.cpu().clone(), ids.cpu().clone(), weights.cpu().clone()))
        return self._experts.submit(layer, x, ids, weights)


class Decode:
    """One batch size over a slice: the step, and its two halves alone.

    Args:
        experts: of the slice, handed off.
        inputs: that take turns.
    """

    def __init__(self, made: Slice, experts: DeviceExperts, rows: int, inputs: int) -> None:
        self.rows = rows
        self._made, self._experts = made, experts
        self._layers = made.spec.moe_layers
        self._called = made.dispatcher(rows)
        starts = [made.context - 1 - 17 * row for row in range(rows)]
        self._batches = [made.batch(starts, 1, seed) for seed in range(inputs)]
        heard = Heard(experts)
        eager = self._step(made.network(heard))
        self._asked: list[list[Asked]] = []
        for batch in self._batches:
            heard.asked = []
            eager.fill(batch)
            self._handed(eager.work)
            self._asked.append(heard.asked)
        self._whole = self._step(made.network(experts))
        self._fill(self._whole, 0)
        self._handed(self._whole.work)
        self._whole.record(made.device.recorder)
        self._alone = self._step(made.network(AtOnce(rows, made.spec.hidden_size, made.device.torch)))
        self._fill(self._alone, 0)
        self._alone.work()
        made.device.stream.synchronize()
        self._alone.record(made.device.recorder)

    @property
    def experts(self) -> float:
        """Distinct ones that a layer reads, in the mean."""
        counts = [len(set(ids.flatten().tolist())) for asked in self._asked for _, _, ids, _ in asked]
        return sum(counts) / len(counts)

    def step(self, number: int) -> float:
        """Seconds of the whole step, its begin and end included."""
        self._fill(self._whole, number)
        return seconds(lambda: self._handed(self._whole.run))

    def card(self, number: int) -> float:
        """Seconds of the same without a hand-off."""
        self._fill(self._alone, number)

        def run() -> None:
            self._alone.run()
            self._made.device.stream.synchronize()

        return seconds(run)

    def cpu(self, number: int) -> float:
        """Seconds of the routed experts alone."""

        def run() -> None:
            for asked in self._asked[number % len(self._asked)]:
                self._called.submit(*asked).collect()

        return seconds(run)

    def _step(self, network: Kimi) -> DecodeStep:
        pages = -(-self._made.context // LatentPages.PAGE_TOKENS)
        return DecodeStep(network, self.rows, pages, pinned=self._made.device.torch.type == "cuda")

    def _fill(self, step: DecodeStep, number: int) -> None:
        step.fill(self._batches[number % len(self._batches)])
        self._made.device.stream.synchronize()

    def _handed(self, work: Any) -> None:
        self._experts.begin(self._layers, self.rows)
        work()
        self._experts.end()


def measure(decode: Decode, layers: int, rounds: int) -> dict[str, Any]:
    """One row; all per MoE layer."""
    found = in_turn({"step": decode.step, "cpu": decode.cpu, "card": decode.card}, rounds, warm=3)
    step, cpu, card = (found[name] * 1e3 / layers for name in ("step", "cpu", "card"))
    limit = max(cpu, card)
    return {
        "case": "decode step, a MoE layer",
        "rows": decode.rows,
        "experts": round(decode.experts, 1),
        "rounds": rounds,
        "step_ms": round(step, 4),
        "cpu_ms": round(cpu, 4),
        "card_ms": round(card, 4),
        "limited_by": "cpu" if cpu > card else "card",
        "share_of_limit": round(limit / step, 3),
        "bar": BAR,
        "holds": step <= BAR * limit,
    }


@torch.no_grad()
def rows(made: Slice, batches: tuple[int, ...], inputs: int, rounds: int) -> Iterator[dict[str, Any]]:
    """A row a batch size."""
    most, spec = max(batches), made.spec
    # With no experts on the card nothing depends on rates, which take long to measure.
    device = dataclasses.replace(made.device, rates=lambda spec, *_: emulated_rates(spec))
    fit = CardFit(chunk=most, graph_rows=most, hot=0, needs=())
    experts = device_experts(
        device, fit, spec, made.store, made.machine, made.dispatcher(most), max_running=most, dense=made.dense
    )
    try:
        for batch in batches:
            decode = Decode(made, experts, batch, inputs)
            yield measure(decode, len(spec.moe_layers), rounds) | made.conditions()
    finally:
        experts.close()


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure")
        return 0
    device = open_device("cuda")
    assert device is not None
    spec = few_layers(published_spec(), options.layers)
    memory = expert_memory(spec)
    made = Slice(device, spec, memory, sequences=max(BATCHES), context=CONTEXT)
    told = conditions() | {"signal": device.signal, "expert_bytes_apart": memory.nbytes, "context": CONTEXT}
    return report(rows(made, BATCHES, INPUTS, options.rounds), options.json, told)


if __name__ == "__main__":
    sys.exit(main())
