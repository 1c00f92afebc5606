"""Random bytes in the place of a model's weights: matrices, experts and layers of its widths. Layer 5."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

import torch

from k2hybrid.checkpoint.names import ExpectedTensor, expected_tensors, layer_tensors
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.experts.dispatch import Dispatcher
from k2hybrid.experts.placement import ExpertSizes
from k2hybrid.experts.prediction import CHUNK_ROWS, ModelSizes
from k2hybrid.experts.store import ExpertStore
from k2hybrid.native.machine import Machine
from k2hybrid.runtime.hollow import TimedNetwork, few_layers
from k2hybrid.types import ExpertRef, ExpertSink, Int4Ref, TensorRef, Ticket

PATTERN_BYTES = 32 << 20
LAYERS = 2  # of the network
SHIFT = 8  # bytes: rows of published files start at any multiple of that, seldom at a cache line


def _layer_shapes(spec: ModelSpec) -> list[tuple[int, ...]]:
    """Of the matrices of one layer, experts apart; of the kind that most layers are."""
    dense = takewhile(lambda tensor: tensor.key.expert is None, layer_tensors(spec, spec.num_layers - 1))
    return [tensor.shape for tensor in dense if len(tensor.shape) == 2]


def layer_bytes(spec: ModelSpec) -> int:
    """Of those matrices."""
    return 2 * sum(math.prod(shape) for shape in _layer_shapes(spec))


class DenseBytes:
    """The bf16 matrices of one layer, over and over in a stretch of memory."""

    def __init__(self, spec: ModelSpec, machine: Machine, memory: torch.Tensor) -> None:
        self._machine = machine
        shapes = _layer_shapes(spec)
        self.nbytes = layer_bytes(spec)
        self._layers: list[list[torch.Tensor]] = []
        at = SHIFT
        while at + self.nbytes <= memory.nbytes:
            matrices = []
            for shape in shapes:
                stretch = memory[at : at + 2 * math.prod(shape)]
                matrices.append(stretch.view(torch.bfloat16).view(shape))
                at += stretch.nbytes
            self._layers.append(matrices)
        self._inputs = {columns: torch.randn(CHUNK_ROWS, columns) for columns in {s[1] for s in shapes}}
        self._inputs = {columns: x.to(torch.bfloat16) for columns, x in self._inputs.items()}
        self._next = 0

    def seconds(self, rows: int) -> float:
        """Of one layer; of few rows the mean of all copies, so that none is found in a cache."""
        layers = self._layers if rows == 1 else [self._layers[self._next % len(self._layers)]]
        self._next += 1
        start = time.perf_counter()
        for matrices in layers:
            for weight in matrices:
                self._machine.linear(self._inputs[weight.shape[1]][:rows], weight)
        return (time.perf_counter() - start) / len(layers)


class ExpertBytes:
    """One layer of experts, dealt over a stretch of memory: as many as fit lie apart, the others on them."""

    def __init__(self, sizes: ModelSizes, machine: Machine, memory: torch.Tensor) -> None:
        e, self._top_k = sizes.experts, sizes.top_k
        self._dispatcher = _dispatcher(sizes, machine, memory, layers=1)
        self._groups = max(1, min(e.experts, _apart(e, memory)) // self._top_k)
        self._random = torch.Generator().manual_seed(0)
        self._x = (torch.randn(CHUNK_ROWS, e.hidden, generator=self._random) * 0.1).to(torch.bfloat16)
        even = torch.rand(CHUNK_ROWS, e.experts, generator=self._random).argsort(dim=1)
        self._even = even[:, : self._top_k].to(torch.int32)
        self._weights = torch.full((CHUNK_ROWS, self._top_k), 1 / self._top_k)
        self._next = 0
        self._memory = memory

    def seconds(self, rows: int) -> float:
        """Of one expert that has `rows` rows; of few rows the mean of all that lie apart."""
        groups = self._groups if rows == 1 else 1
        start = time.perf_counter()
        for _ in range(groups):
            first = self._next % self._groups * self._top_k
            self._next += 1
            self._run(torch.arange(first, first + self._top_k, dtype=torch.int32).expand(rows, -1))
        return (time.perf_counter() - start) / (groups * self._top_k)

    def chunk_seconds(self) -> float:
        """Of a whole layer for a chunk's rows, routed evenly."""
        start = time.perf_counter()
        self._run(self._even)
        return time.perf_counter() - start

    def _run(self, ids: torch.Tensor) -> None:
        rows = ids.shape[0]
        self._dispatcher.submit(0, self._x[:rows], ids, self._weights[:rows]).collect()


def _apart(sizes: ExpertSizes, memory: torch.Tensor) -> int:
    """Experts that fit `memory`."""
    return (memory.nbytes - SHIFT) // sizes.expert_bytes


def byte_store(sizes: ModelSizes, memory: torch.Tensor, layers: int) -> ExpertStore:
    """Experts of some layers, mapped: `deal_bytes`."""
    e = sizes.experts
    store = ExpertStore(layers=layers, experts=e.experts, hidden=e.hidden, inter=e.inter)
    deal_bytes(store, sizes, memory, layers)
    return store


def deal_bytes(sink: ExpertSink, sizes: ModelSizes, memory: torch.Tensor, layers: int) -> None:
    """Give all experts, dealt over a stretch of memory: what fits lies apart, the others on them."""
    e = sizes.experts
    for number in range(layers * e.experts):
        address = memory.data_ptr() + SHIFT + number % _apart(e, memory) * e.expert_bytes
        sink.add_expert(number // e.experts, number % e.experts, _expert(e, address))


def _dispatcher(sizes: ModelSizes, machine: Machine, memory: torch.Tensor, layers: int) -> Dispatcher:
    store = byte_store(sizes, memory, layers)
    return Dispatcher(store, machine, max_rows=CHUNK_ROWS, top_k=sizes.top_k)


def _expert(sizes: ExpertSizes, address: int) -> ExpertRef:
    matrices = []
    for out, inner in ((sizes.inter, sizes.hidden), (sizes.inter, sizes.hidden), (sizes.hidden, sizes.inter)):
        parts = []
        for dtype, shape, nbytes in (
            ("I32", (out, inner // 8), out * inner // 2),
            ("BF16", (out, inner // 32), out * inner // 16),
        ):
            parts.append(TensorRef("probe", Path(), 0, nbytes, dtype, shape, address))
            address += nbytes
        matrices.append(Int4Ref(*parts))
    return ExpertRef(*matrices)


class ByteNetwork(TimedNetwork):
    """Two layers with all that they read: between two steps of one, the other drives it out of the caches.

    Args:
        memory: holds a layer's matrices, and an expert.
    """

    def __init__(self, spec: ModelSpec, machine: Machine, memory: torch.Tensor, context: int) -> None:
        some = few_layers(spec, LAYERS)
        self._memory = memory
        # Without routed experts nobody asks for any.
        routed = (
            _dispatcher(ModelSizes.of(some), machine, memory, LAYERS) if spec.moe_layers else _NoExperts()
        )
        super().__init__(some, ByteWeights(some, memory), routed, machine, context)


class _NoExperts:
    def submit(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Ticket:
        raise AssertionError("the model has no routed experts")


class ByteWeights:
    """Matrices one after the other, and from the beginning again; see `types.WeightSource`."""

    def __init__(self, spec: ModelSpec, memory: torch.Tensor) -> None:
        self._shapes: dict[tuple[int | None, str], ExpectedTensor] = {
            (tensor.key.layer, tensor.key.role): tensor
            for tensor in expected_tensors(spec)
            if tensor.key.expert is None
        }
        self._memory = memory
        self._at = SHIFT

    def take(self, layer: int | None, role: str) -> torch.Tensor:
        tensor = self._shapes[layer, role]
        if len(tensor.shape) == 1:
            return (
                torch.zeros(tensor.shape)
                if "F32" in tensor.dtypes
                else torch.ones(tensor.shape, dtype=torch.bfloat16)
            )
        nbytes = 2 * math.prod(tensor.shape)
        if self._at + nbytes > self._memory.nbytes:
            self._at = SHIFT
        stretch = self._memory[self._at : self._at + nbytes]
        self._at += nbytes
        return stretch.view(torch.bfloat16).view(tensor.shape)


def _pattern() -> torch.Tensor:
    """Random bytes that are ordinary numbers: as nibbles, and as bf16 from 0.002 to 0.03 of either sign."""
    random = torch.Generator().manual_seed(1)
    pattern = torch.randint(256, (PATTERN_BYTES,), dtype=torch.uint8, generator=random)
    signs = torch.randint(2, (PATTERN_BYTES // 2,), dtype=torch.uint8, generator=random) << 7
    pattern[1::2] = torch.randint(0x3B, 0x3D, signs.shape, dtype=torch.uint8, generator=random) | signs
    return pattern


def arena_bytes(nbytes: int) -> torch.Tensor:
    """uint8 [nbytes], anonymous, in huge pages where the kernel has them; freed with the tensor."""
    room = mmap.mmap(-1, nbytes)
    room.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(room, dtype=torch.uint8)
    pattern = _pattern()
    for start in range(0, nbytes, PATTERN_BYTES):
        memory[start : start + PATTERN_BYTES] = pattern[: nbytes - start]
    return memory


@contextmanager
def mapped_bytes(folder: Path | None, nbytes: int) -> Iterator[torch.Tensor]:
    """uint8 [nbytes] of a file in `folder`, mapped and present, for as long as the context lasts."""
    with tempfile.TemporaryFile(dir=folder) as file:
        pattern = _pattern().numpy().data
        for start in range(0, nbytes, PATTERN_BYTES):
            file.write(pattern[: nbytes - start])
        file.flush()
        os.fdatasync(file.fileno())  # or it would be written while the probes run
        room = mmap.mmap(file.fileno(), nbytes, flags=mmap.MAP_SHARED)
        memory = torch.frombuffer(room, dtype=torch.uint8)
        memory[::4096].sum()  # maps every page
        yield memory
