"""What this machine takes for the pieces of a model, measured in seconds and without its weights. Layer 5.

The kernels run over random bytes at the model's widths: one row through a layer's dense matrices, as much
and through as many experts as a token has, then many rows through the same. What a layer does beside them is
timed on the network itself (`hollow`).
"""

from __future__ import annotations

import math
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

import torch

from k2hybrid.checkpoint.names import layer_tensors
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.experts.dispatch import Dispatcher
from k2hybrid.experts.placement import ExpertSizes
from k2hybrid.experts.prediction import CHUNK_ROWS, ModelSizes, Rates, arithmetic_rates
from k2hybrid.experts.store import ExpertStore
from k2hybrid.hardware.bandwidth import quick_gb_s
from k2hybrid.model.sampler import Sampler
from k2hybrid.native import Machine
from k2hybrid.runtime.hollow import HollowNetwork
from k2hybrid.runtime.loading import WIDE_ATTENTION
from k2hybrid.types import ExpertRef, Int4Ref, SamplingParams, TensorRef

PROBE_BYTES = 1 << 30  # several times any last-level cache
PATTERN_BYTES = 32 << 20
ROUNDS = 5
SHORT, LONG = 64, 4096  # tokens of context
MANY = 8  # sequences
FEW_TOKENS, FULL_TOKENS = 4, 64  # an expert: one tile of the kernels, and enough to be bound by arithmetic


def measure_rates(
    spec: ModelSpec, machine: Machine, *, folder: Path | None = None, probe_bytes: int = PROBE_BYTES
) -> Rates:
    """Run the probes, about ten seconds at true widths.

    Args:
        folder: where a file of `probe_bytes` is made and removed; default the system's for temporary files.

    Raises:
        OSError: the file cannot be written.
    """
    # In a thread of its own: it is pinned, as the engine's is.
    with ThreadPoolExecutor(1, thread_name_prefix="probes") as worker:
        return worker.submit(_measure, spec, machine, folder, probe_bytes).result()


def _measure(spec: ModelSpec, machine: Machine, folder: Path | None, probe_bytes: int) -> Rates:
    machine.pin_caller()
    sizes = ModelSizes.of(spec)
    probe_bytes = max(probe_bytes, _layer_bytes(spec), sizes.experts.expert_bytes + 8)
    before = torch.get_num_threads()
    try:
        with _mapped(folder, probe_bytes) as mapped:
            return _rates(spec, machine, mapped, _arena(probe_bytes))
    finally:
        torch.set_num_threads(before)


def _rates(spec: ModelSpec, machine: Machine, mapped: torch.Tensor, arena: torch.Tensor) -> Rates:
    sizes = ModelSizes.of(spec)
    torch.set_num_threads(1)
    pieces: dict[str, Callable[[], float]] = {"ram": lambda: quick_gb_s(machine, arena)}
    dense = _Dense(spec, machine, mapped)
    pieces |= {"dense one": lambda: dense.seconds(1), "dense many": lambda: dense.seconds(CHUNK_ROWS)}
    if sizes.experts.count:
        in_file, in_arena = (_Experts(sizes, machine, memory) for memory in (mapped, arena))
        pieces |= {
            "mapped one": lambda: in_file.seconds(1),
            "arena one": lambda: in_arena.seconds(1),
            "mapped few": lambda: in_file.seconds(FEW_TOKENS),
            "mapped full": lambda: in_file.seconds(FULL_TOKENS),
            "mapped chunk": in_file.chunk_seconds,
        }
    found: dict[str, list[float]] = {name: [] for name in pieces}
    for _ in range(ROUNDS):  # in turn, so that a drift of the machine meets all of them
        for name, measure in pieces.items():
            found[name].append(measure())
    median = {name: statistics.median(values) for name, values in found.items()}

    expert_bytes = sizes.experts.expert_bytes
    expert_ops = overlap = 1.0
    mapped_gb_s = arena_gb_s = median["ram"]
    if sizes.experts.count:
        mapped_gb_s, arena_gb_s = (expert_bytes / median[f"{k} one"] / 1e9 for k in ("mapped", "arena"))
        expert_ops, overlap = arithmetic_rates(
            sizes,
            one=median["mapped one"],
            few=(FEW_TOKENS, median["mapped few"]),
            full=(FULL_TOKENS, median["mapped full"]),
            chunk=median["mapped chunk"],
        )
    beyond = median["dense many"] - (1.0 - overlap) * median["dense one"]
    return Rates(
        cores=machine.threads,
        ram_gb_s=median["ram"],
        dense_gb_s=dense.nbytes / median["dense one"] / 1e9,
        mapped_gb_s=mapped_gb_s,
        arena_gb_s=arena_gb_s,
        dense_ops=(CHUNK_ROWS - 1) * dense.nbytes / 2 / max(beyond, median["dense many"] / 2),
        expert_ops=expert_ops,
        overlap=overlap,
        **_beside_weights(spec, machine),
    )


def _beside_weights(spec: ModelSpec, machine: Machine) -> dict[str, float]:
    """The fields of `Rates` that are no weights'."""
    network = HollowNetwork(spec, machine, LONG + CHUNK_ROWS)
    step = network.layer_seconds((SHORT,), 1, 40)
    many = network.layer_seconds((SHORT,) * MANY, 1, 20)
    long = network.layer_seconds((LONG,), 1, 20)
    context_s = max(0.0, long - step) / (LONG - SHORT)
    sampler = Sampler(SamplingParams(temperature=1.0, seed=0), spec.vocab_size)
    logits = torch.randn(spec.vocab_size, generator=torch.Generator().manual_seed(0))
    sample_s = statistics.median(_timed(lambda: sampler.sample(logits)) for _ in range(20))
    begin_s = network.pass_seconds(20)
    torch.set_num_threads(machine.threads if spec.num_heads * spec.v_head_dim >= WIDE_ATTENTION else 1)
    first = network.layer_seconds((0,), CHUNK_ROWS, 3)
    later = network.layer_seconds((LONG // 2,), CHUNK_ROWS, 3)
    chunk_context_s = max(0.0, later - first) / (LONG // 2)
    return {
        "step_s": max(0.0, step - SHORT * context_s),
        "sequence_s": max(0.0, (many - step) / (MANY - 1) - SHORT * context_s),
        "context_s": context_s,
        "chunk_s": max(0.0, first - CHUNK_ROWS * chunk_context_s),
        "chunk_context_s": chunk_context_s,
        "sample_s": sample_s + begin_s,
    }


def _layer_shapes(spec: ModelSpec) -> list[tuple[int, ...]]:
    """Of the matrices of one layer, experts apart; of the kind that most layers are."""
    dense = takewhile(lambda tensor: tensor.key.expert is None, layer_tensors(spec, spec.num_layers - 1))
    return [tensor.shape for tensor in dense if len(tensor.shape) == 2]


def _layer_bytes(spec: ModelSpec) -> int:
    return 2 * sum(math.prod(shape) for shape in _layer_shapes(spec))


class _Dense:
    """The bf16 matrices of one layer, over and over in a stretch of memory."""

    def __init__(self, spec: ModelSpec, machine: Machine, memory: torch.Tensor) -> None:
        self._machine = machine
        shapes = _layer_shapes(spec)
        self.nbytes = _layer_bytes(spec)
        self._layers: list[list[torch.Tensor]] = []
        at = 0
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


class _Experts:
    """One layer of experts, dealt over a stretch of memory: as many as fit lie apart, the others on them."""

    def __init__(self, sizes: ModelSizes, machine: Machine, memory: torch.Tensor) -> None:
        e, self._top_k = sizes.experts, sizes.top_k
        store = ExpertStore(layers=1, experts=e.experts, hidden=e.hidden, inter=e.inter)
        apart = min(e.experts, (memory.nbytes - 8) // e.expert_bytes)
        for expert in range(e.experts):
            # Rows of published files start at any multiple of 8 bytes.
            store.add_expert(0, expert, _expert(e, memory.data_ptr() + 8 + expert % apart * e.expert_bytes))
        self._memory = memory
        self._dispatcher = Dispatcher(store, machine, max_rows=CHUNK_ROWS, top_k=sizes.top_k)
        self._groups = max(1, apart // self._top_k)
        self._random = torch.Generator().manual_seed(0)
        self._x = (torch.randn(CHUNK_ROWS, e.hidden, generator=self._random) * 0.1).to(torch.bfloat16)
        even = torch.rand(CHUNK_ROWS, e.experts, generator=self._random).argsort(dim=1)
        self._even = even[:, : self._top_k].to(torch.int32)
        self._weights = torch.full((CHUNK_ROWS, self._top_k), 1 / self._top_k)
        self._next = 0

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
        return _timed(lambda: self._run(self._even))

    def _run(self, ids: torch.Tensor) -> None:
        rows = ids.shape[0]
        self._dispatcher.submit(0, self._x[:rows], ids, self._weights[:rows]).collect()


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


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _pattern() -> torch.Tensor:
    """Random bytes that are ordinary numbers, as nibbles and as bf16 between 0.002 and 0.03."""
    random = torch.Generator().manual_seed(1)
    pattern = torch.randint(256, (PATTERN_BYTES,), dtype=torch.uint8, generator=random)
    pattern[1::2] = torch.randint(0x3B, 0x3D, (PATTERN_BYTES // 2,), dtype=torch.uint8, generator=random)
    return pattern


def _arena(nbytes: int) -> torch.Tensor:
    room = mmap.mmap(-1, nbytes)
    room.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(room, dtype=torch.uint8)
    pattern = _pattern()
    for start in range(0, nbytes, PATTERN_BYTES):
        memory[start : start + PATTERN_BYTES] = pattern[: nbytes - start]
    return memory


@contextmanager
def _mapped(folder: Path | None, nbytes: int) -> Iterator[torch.Tensor]:
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
