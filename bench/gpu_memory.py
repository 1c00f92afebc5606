"""What a card's memory holds, row by row, beside the table that a start prints (docs/memory.md).

Under a cap of 24,564 MiB, all that Kimi-K2-Thinking puts on a card is allocated: 8-bit weights of all layers,
FP8 latents of the whole context, experts and their ring, recorded steps of every batch size, and a chunk of
as many rows as the table finds room for. Only two layers are run, a dense one and a MoE layer: what a layer
takes for the moment it gives back, and what the driver keeps of a recorded step is counted a layer. What must
hold: all together stays below the cap. Of each row it is told what it took of what was planned.

    python -m bench.gpu_memory [--json FILE] [--mib 24564] [--context 262144]
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import torch

from bench.device_memory import Counters, cuda_counters, fitted, planned, released, row, weights_of
from bench.device_rates import command, report
from bench.device_slice import Slice, published_spec
from bench.gpu_doorbell import conditions
from k2hybrid.cache.pages import LatentPages
from k2hybrid.cache.rows import row_format
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.experts.device_experts import DeviceExperts
from k2hybrid.experts.plan import CardPlan
from k2hybrid.model.card_memory import CONTEXT_BYTES, CardWishes
from k2hybrid.model.device import DeviceModel
from k2hybrid.model.kimi import Kimi, Layer
from k2hybrid.runtime.card import CardFit
from k2hybrid.runtime.device import Device, emulated_rates, open_device
from k2hybrid.runtime.on_device import COLD_ROWS, device_experts
from k2hybrid.runtime.random_bytes import arena_bytes

CAP_MIB = 24_564
CONTEXT = 262_144
ARENA_BYTES = 6 << 30  # of RAM: the largest matrix is the embedding
LAYERS = 2


class Filled:
    """A card with all that a model puts there, two layers of it able to run.

    Args:
        wishes: with the chunk that is planned.
        memory: in RAM, see `Slice`.
    """

    def __init__(
        self,
        device: Device,
        spec: ModelSpec,
        plan: CardPlan,
        wishes: CardWishes,
        counters: Counters,
        memory: torch.Tensor,
    ) -> None:
        self._device, self._spec, self._plan, self._wishes = device, spec, plan, wishes
        self._count, self._memory = counters, memory
        self._few = dataclasses.replace(spec, num_layers=LAYERS, first_k_dense=1)
        self._weights: list[torch.Tensor] = []

    def rows(self) -> Iterator[dict[str, Any]]:
        """One after the other, each as it is put there."""
        plan, count, device = self._plan, self._count, self._device
        before = count.allocated()
        pages = self._pages()
        yield row("latents", planned(plan, "latents"), count.allocated() - before)

        wishes = self._wishes
        made = Slice(
            device,
            self._few,
            self._memory,
            sequences=1,
            context=wishes.context,
            dense=wishes.dense,
            rows=wishes.rows,
            pages=pages,
        )
        fit = CardFit(wishes.chunk, wishes.graph_rows, plan.hot, plan.needs)
        quick = dataclasses.replace(device, rates=lambda spec, *_: emulated_rates(spec))
        cold = made.dispatcher(min(COLD_ROWS, wishes.chunk))
        before = count.allocated()
        experts = device_experts(
            quick,
            fit,
            self._few,
            made.store,
            made.machine,
            cold,
            max_running=wishes.graph_rows,
            dense=wishes.dense,
        )
        try:
            there = count.allocated() - before
            yield row("hot experts and ring", planned(plan, "hot experts", "ring"), there)
            before = count.allocated()
            network = made.network(experts)
            self._other_layers(network.layers[-1])
            yield row("weights", planned(plan, "weights"), count.allocated() - before)
            yield from self._passes(made, network, experts)
        finally:
            experts.close()

    def _pages(self) -> LatentPages:
        spec, wishes = self._spec, self._wishes
        form = row_format(wishes.rows, spec.kv_lora_rank, spec.qk_rope_head_dim)
        count = -(-wishes.context // LatentPages.PAGE_TOKENS)
        pages = LatentPages(spec.num_layers, count, form, self._device.torch)
        for layer in range(LAYERS):
            pages.rows(layer).zero_()
        return pages

    def _other_layers(self, layer: Layer) -> None:
        """As many weights as all the layers that are not run have, each in a tensor of its own."""
        for _ in range(self._spec.num_layers - LAYERS):
            self._weights += [torch.empty_like(value) for value in weights_of(layer)]

    def _passes(self, made: Slice, network: Kimi, experts: DeviceExperts) -> Iterator[dict[str, Any]]:
        plan, count, wishes = self._plan, self._count, self._wishes
        layers = self._spec.num_layers
        held = count.reserved()
        model = self._recorded(made, network, experts)
        graphs = count.reserved() - held
        # The code of kernels came with the first: what the driver keeps is seen of graphs recorded again.
        outside = count.outside
        again = self._recorded(made, network, experts)
        kept = count.outside - outside
        del again
        released()
        yield row("decode graphs", planned(plan, "decode graphs"), graphs + kept * layers // LAYERS)

        before = count.allocated()
        count.reset()
        batch = made.batch([wishes.context - wishes.chunk], wishes.chunk, 0)
        model.forward(model.begin(batch), network.parts)
        most = count.most_allocated() - before
        yield row("a chunk, and scratch of a layer", planned(plan, "a chunk", "scratch"), most)

        slack = count.most_reserved() - count.most_allocated()
        yield row("allocator", planned(plan, "allocator"), slack)
        yield row("CUDA context", planned(plan, "CUDA"), count.outside - kept)
        whole = count.most_reserved() + count.outside + kept * (layers - LAYERS) // LAYERS
        yield row("all together", plan.budget, whole) | {
            "chunk": wishes.chunk,
            "hot_experts": plan.hot,
            "holds": whole <= plan.budget,
        }

    def _recorded(self, made: Slice, network: Kimi, experts: DeviceExperts) -> DeviceModel:
        """With a step of every batch size."""
        device, wishes = self._device, self._wishes
        model = DeviceModel(
            network,
            experts,
            synchronize=device.stream.synchronize,
            recorder=device.recorder,
            context_tokens=wishes.context,
            graph_rows=wishes.graph_rows,
        )
        for rows in range(1, wishes.graph_rows + 1):
            # All in one sequence's pages: nobody reads what they compute.
            batch = made.batch([wishes.context - 1] * rows, 1, rows)
            for _ in range(2):  # alone, and recorded then; again
                model.forward(model.begin(batch), network.parts)
        released()
        return model


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--mib", type=int, default=CAP_MIB)
    parser.add_argument("--context", type=int, default=CONTEXT)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure")
        return 0
    device = open_device("cuda")
    assert device is not None
    spec, cap = published_spec(), options.mib << 20
    plan, wishes = fitted(spec, cap, CardWishes(dense="int8", rows="fp8", context=options.context))
    counters = cuda_counters(device.torch)
    total = torch.cuda.mem_get_info(device.torch)[1]
    torch.cuda.set_per_process_memory_fraction(min((cap - CONTEXT_BYTES) / total, 1.0), device.torch)
    filled = Filled(device, spec, plan, wishes, counters, arena_bytes(ARENA_BYTES))
    with torch.no_grad():
        return report(filled.rows(), options.json, conditions() | {"cap_mib": options.mib})


if __name__ == "__main__":
    sys.exit(main())
