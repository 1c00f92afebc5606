"""Tokens per second with the dense half on a card: bytes and operations of a pass, at stated rates. Pure.

    a layer of a decode step   attention, router ──► the CPU's experts, there and back
                                                 └─► shared expert, hot experts        the longer of the two
    a layer of a large chunk   attention, router ──► bus, card, CPU and RAM at once    `split.plan_stream`

What the card reads and what it computes overlap; the longer counts. It is taken to reach of its rates what
the benches ask of it (`bench/gpu_mla.py`, `bench/gpu_flash.py`, `bench/gpu_prefill.py`), and to need
`LAYER_S` for the kernels of a layer, however small: assumptions, until a card was measured. A prefill's
attention is taken for matrix products alone, at that share of their rate, since `kernels.flash` stores no
score; one that did would be bound by memory.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from k2hybrid.experts.prediction import RESOURCES, Prediction, Predictor
from k2hybrid.experts.split import (
    HANDOFF_S,
    LAUNCH_S,
    PLAN_S,
    SplitRates,
    card_experts,
    plan_stream,
    streams,
)

CARD_SHARE = 0.6  # of memory and matrix rates
BUS_SHARE = 0.8
LAYER_S = 50e-6
CARD_RESOURCES = (*RESOURCES, "GPU memory", "GPU arithmetic", "PCIe")
_STREAM_LIMITS = {"CPU": "arithmetic", "card": "GPU arithmetic", "bus": "PCIe", "RAM": "RAM bandwidth"}


@dataclass(frozen=True, slots=True)
class CardRates:
    """What a card is said to do.

    Attributes:
        memory_gb_s, bus_gb_s: reads of its memory, and copies from RAM (GB are 10⁹ bytes).
        tflops: 10¹² operations a second of bf16 matrix products; a multiply-add is two.
    """

    memory_gb_s: float
    bus_gb_s: float
    tflops: float


class CardPredictor:
    """Predicts passes over one model whose experts are where `cpu` has them, and the rest on a card.

    Args:
        chunk: rows of a prefill's passes.
        hot: experts that the card holds besides.
    """

    def __init__(self, cpu: Predictor, card: CardRates, *, chunk: int, hot: int) -> None:
        sizes = cpu.sizes
        self.sizes = sizes
        self._cpu = cpu
        self._memory = CARD_SHARE * card.memory_gb_s * 1e9
        self._flop = CARD_SHARE * card.tflops * 1e12
        self._chunk = chunk
        self._hot = min(hot / sizes.experts.layers, sizes.experts.experts) if sizes.experts.layers else 0.0
        hidden = sizes.experts.hidden
        bus = BUS_SHARE * card.bus_gb_s * 1e9
        self._split = SplitRates(
            expert_bytes=max(sizes.experts.expert_bytes, 1),
            card=self._memory,
            ram=cpu.expert_bytes_s,
            bus=bus,
            card_row_s=2 * sizes.expert_ops / self._flop,
            cpu_row_s=sizes.expert_ops / cpu.rates.expert_ops,
            card_launch_s=LAUNCH_S,
            handoff_s=HANDOFF_S,
            handoff_row_s=(6 * hidden + 8 * sizes.top_k) / bus,  # bf16, ids and weights there; fp32 back
            # Through a buffer three times, out of a slot once.
            bus_traffic=3.0 if cpu.place == "mapped" else 1.0 + 2.0 * cpu.miss_rate,
            plan_s=PLAN_S,
        )

    def decode(self, sequences: int, context: int) -> Prediction:
        """One step of `sequences` sequences, each with `context` tokens behind it."""
        sizes, rows = self.sizes, sequences
        parts = dict.fromkeys(CARD_RESOURCES, 0.0)
        self._card(
            parts, sizes.dense_bytes - sizes.shared_bytes, 2 * rows * (sizes.dense_ops - sizes.shared_ops)
        )
        latents = rows * context
        self._card(parts, latents * sizes.latent_bytes, 2 * latents * sizes.layers * sizes.absorbed_ops)
        self._card(parts, sizes.head_bytes, 2 * rows * sizes.head_ops)
        _add(parts, self._handed(rows))
        parts["overhead"] += sizes.layers * LAYER_S + rows * self._cpu.rates.sample_s
        return Prediction(sequences, parts)

    def prefill(self, tokens: int) -> Prediction:
        """A prompt of `tokens` tokens, to its first token."""
        sizes = self.sizes
        total = dict.fromkeys(CARD_RESOURCES, 0.0)
        weights = sizes.dense_ops - sizes.shared_ops - sizes.kv_b_ops
        for start in range(0, tokens, self._chunk):
            rows = min(self._chunk, tokens - start)
            self._card(total, sizes.dense_bytes - sizes.shared_bytes, 2 * rows * weights)
            # Keys and values are made of all latents so far (for each tile of queries anew, which is left
            # out: 3 to 5 % at Kimi-K2's sizes); of its own chunk a row sees half.
            seen = 2 * (start + rows) * sizes.kv_b_ops
            self._card(total, 0, seen + 2 * rows * (start + rows / 2) * sizes.layers * sizes.expanded_ops)
            _add(total, self._experts(rows))
            total["overhead"] += sizes.layers * LAYER_S
        self._card(total, sizes.head_bytes, 2 * sizes.head_ops)
        total["overhead"] += self._cpu.rates.sample_s
        return Prediction(tokens, total)

    def _card(self, parts: dict[str, float], nbytes: float, flop: float) -> None:
        reading, computing = nbytes / self._memory, flop / self._flop
        parts["GPU memory" if reading >= computing else "GPU arithmetic"] += max(reading, computing)

    def _rates(self, rows: int) -> SplitRates:
        """With what the card does anyway while the CPU computes: a layer's shared expert."""
        sizes, layers = self.sizes, self.sizes.experts.layers
        busy = max(sizes.shared_bytes / self._memory, 2 * rows * sizes.shared_ops / self._flop) / layers
        return dataclasses.replace(self._split, card_busy_s=busy)

    def _experts(self, rows: int) -> dict[str, float]:
        """All layers' experts of a chunk, streamed or handed to the CPU, whichever takes less time."""
        sizes = self.sizes
        e = sizes.experts
        if not e.count or not streams(self._rates(rows), rows, sizes.top_k, e.experts, self._hot):
            return self._handed(rows)
        rates = self._rates(rows)
        distinct = max(1, round(sizes.distinct(rows)))
        here = round(distinct * self._hot / e.experts)
        each = rows * sizes.top_k / distinct
        plan = plan_stream(rates, rows, dict.fromkeys(range(distinct), each), range(here))
        disk = (distinct - here) * self._cpu.miss_rate * self._cpu.disk_s if self._cpu.miss_rate else 0.0
        limit = "disk" if disk > plan.seconds else _STREAM_LIMITS[plan.limit]
        return {limit: e.layers * max(plan.seconds, disk), "overhead": e.layers * rates.plan_s}

    def _handed(self, rows: int) -> dict[str, float]:
        """All layers' experts of a step: the CPU's, or what the card does meanwhile."""
        sizes = self.sizes
        layers = sizes.experts.layers
        if not sizes.experts.count:
            return {}
        distinct = sizes.distinct(rows)
        rates = self._rates(rows)
        each = rows * sizes.top_k / distinct
        here = distinct * self._hot / sizes.experts.experts
        taken = min(here, card_experts(rates, max(1, round(distinct)), each))
        left = 1.0 - taken / distinct
        cpu = {name: seconds * left for name, seconds in self._cpu.experts(rows).items()}
        cpu["PCIe"] = layers * rows * rates.handoff_row_s
        cpu["overhead"] += layers * rates.handoff_s
        hot = rates.card_launch_s + taken * rates.card_s(each) if taken else 0.0
        card = layers * (rates.card_busy_s + hot)
        return cpu if sum(cpu.values()) >= card else {"GPU memory": card}


def _add(parts: dict[str, float], others: dict[str, float]) -> None:
    for name, seconds in others.items():
        parts[name] += seconds
