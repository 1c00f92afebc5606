"""A few MoE layers of a model's true widths on a device, over random bytes: what its benches run.

Weights on the device are made once: every network over them is another way to work with the same bytes.
Experts are dealt over as much RAM as is given: as many as fit lie apart, the others on them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from k2hybrid.cache.pages import LatentPages
from k2hybrid.cache.rows import row_format
from k2hybrid.checkpoint.dense8 import quantize
from k2hybrid.checkpoint.dense_bytes import DENSE8_ROLES
from k2hybrid.checkpoint.presets import published_config
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.config import DenseWeights, LatentRows
from k2hybrid.experts.dispatch import Dispatcher
from k2hybrid.experts.prediction import ModelSizes
from k2hybrid.experts.store import ExpertStore
from k2hybrid.hardware.memory import MachineMemory
from k2hybrid.model.batch import Batch, Span
from k2hybrid.model.kimi import Kimi
from k2hybrid.model.linears import DeviceLinears
from k2hybrid.native.machine import Machine
from k2hybrid.native.store import Loan, MemorySpan
from k2hybrid.runtime.device import Device
from k2hybrid.runtime.device_weights import DeviceWeights
from k2hybrid.runtime.random_bytes import ByteWeights, arena_bytes, deal_bytes, layer_bytes
from k2hybrid.types import LinearWeight, RoutedExperts, WeightSource

MOST_EXPERT_BYTES = 16 << 30


def published_spec() -> ModelSpec:
    """Kimi-K2-Thinking's."""
    return ModelSpec.from_config(published_config())


def expert_memory(spec: ModelSpec, most: int = MOST_EXPERT_BYTES) -> torch.Tensor:
    """Half of the RAM that is free, `most` bytes at most, and enough for a layer's matrices and an expert."""
    free = (MachineMemory.now().available_bytes or 0) // 2
    least = 2 * max(layer_bytes(spec), ModelSizes.of(spec).experts.expert_bytes)
    return arena_bytes(max(min(free, most), least))


class LendingStore(ExpertStore):
    """Experts in a stretch of whole pages, which `lends` them as slots would.

    Attributes:
        lends: or has them copied, as mapped ones.
    """

    def __init__(self, spec: ModelSpec, memory: torch.Tensor) -> None:
        sizes = ModelSizes.of(spec)
        e = sizes.experts
        super().__init__(layers=spec.num_layers, experts=e.experts, hidden=e.hidden, inter=e.inter)
        deal_bytes(self, sizes, memory, spec.num_layers)
        self.lends = True
        self._all = MemorySpan(memory.data_ptr(), memory.nbytes)

    def lend(self, layer: int, expert: int) -> Loan | None:
        """See `ExpertStore.lend`."""
        if not self.lends:
            return None
        return Loan(tuple(MemorySpan(t.address, t.nbytes) for t in self.tensors(layer, expert)), (self._all,))

    def give_back(self, layer: int, expert: int) -> None:
        """See `ExpertStore.give_back`. Nothing ever moves."""


class Slice:
    """Layers on a device, their experts in RAM, and latents of some sequences.

    Args:
        spec: few layers, see `runtime.hollow.few_layers`.
        memory: what weights and experts are made of.
        sequences, context: of latents; a sequence has room for so many tokens.
        pages: to put them in; None: as many as they need, filled with random latents.
    """

    def __init__(
        self,
        device: Device,
        spec: ModelSpec,
        memory: torch.Tensor,
        *,
        sequences: int,
        context: int,
        dense: DenseWeights = "int8",
        rows: LatentRows = "fp8",
        pages: LatentPages | None = None,
        machine: Machine | None = None,
    ) -> None:
        self.device, self.spec = device, spec
        self.context, self.dense, self.rows = context, dense, rows
        self.machine = machine or Machine()
        self.store = LendingStore(spec, memory)
        each = -(-context // LatentPages.PAGE_TOKENS)
        self.pages = pages if pages is not None else self._random_pages(sequences * each)
        self.tables = [torch.tensor(self.pages.allocate(each)) for _ in range(sequences)]
        made: WeightSource = _Dense(ByteWeights(spec, memory), dense)
        self._weights = _Once(DeviceWeights(made, device.torch, lambda layer, role: None))
        self._memory = memory

    def _random_pages(self, count: int) -> LatentPages:
        spec, device = self.spec, self.device.torch
        form = row_format(self.rows, spec.kv_lora_rank, spec.qk_rope_head_dim)
        pages = LatentPages(spec.num_layers, count, form, device)
        for layer in range(spec.num_layers):
            for page in range(count):
                latents = torch.randn(pages.PAGE_TOKENS, spec.latent_dim, device=device) * 0.1
                pages.write(layer, torch.tensor([page]), 0, latents)
        return pages

    def network(self, experts: RoutedExperts) -> Kimi:
        """Over the same weights and latents as any other of this slice."""
        return Kimi(
            self.spec,
            self._weights,
            experts,
            DeviceLinears(),
            self.pages,
            decode=self.device.decode(self.pages),
        )

    def dispatcher(self, rows: int) -> Dispatcher:
        """The experts called on the CPU."""
        return Dispatcher(self.store, self.machine, max_rows=rows, top_k=self.spec.top_k)

    def batch(self, starts: Sequence[int], count: int, seed: int) -> Batch:
        """`count` random tokens of as many sequences as there are starts, each behind its own.

        Of more starts than sequences, some write into the same pages.
        """
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(self.spec.vocab_size, (count * len(starts),), generator=draw)
        positions = torch.cat([torch.arange(start, start + count) for start in starts])
        spans = tuple(
            Span(start, count, self.tables[row % len(self.tables)]) for row, start in enumerate(starts)
        )
        last = torch.arange(1, len(starts) + 1) * count - 1
        return Batch(ids, positions, spans, last)

    def conditions(self) -> dict[str, object]:
        """What rows of a bench should say of it."""
        return {"layers": self.spec.num_layers, "dense": self.dense, "latents": self.rows}


def seconds(work: Callable[[], object]) -> float:
    """That it takes; `work` waits for the device by itself."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turn(contenders: Mapping[str, Callable[[int], float]], rounds: int, warm: int) -> dict[str, float]:
    """Median seconds of each, one after the other in every round, so that what else runs meets all alike.

    Args:
        contenders: take the number of a round, and return seconds.
        warm: rounds before those that count.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(warm + rounds):
        for name, run in contenders.items():
            times[name].append(run(number))
    return {name: statistics.median(taken[warm:]) for name, taken in times.items()}


class _Dense:
    """Another `WeightSource` with `DENSE8_ROLES` in 8 bits, if asked for."""

    def __init__(self, source: ByteWeights, dense: DenseWeights) -> None:
        self._source = source
        self._dense = dense

    def take(self, layer: int | None, role: str) -> LinearWeight:
        weight = self._source.take(layer, role)
        if self._dense == "bf16" or role not in DENSE8_ROLES:
            return weight
        return quantize(weight, self._dense, role)


class _Once:
    """Another `WeightSource`, each weight made once and given again."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._kept: dict[tuple[int | None, str], LinearWeight] = {}

    def take(self, layer: int | None, role: str) -> LinearWeight:
        if (layer, role) not in self._kept:
            self._kept[layer, role] = self._source.take(layer, role)
        return self._kept[layer, role]
