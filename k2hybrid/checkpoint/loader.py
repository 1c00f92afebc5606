"""Opens a checkpoint: refs of experts go to a sink, the other tensors are handed out, a ledger closes.

Nothing is read, copied or unpacked but the headers; weights stay mapped where they lie. Who took one and made
something else of it lets it go.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import torch

from k2hybrid.checkpoint.index import ShardIndex, plain
from k2hybrid.checkpoint.names import (
    PROJECTIONS,
    ExpectedTensor,
    expected_tensors,
    expert_prefix,
    tensor_name,
)
from k2hybrid.checkpoint.spec import ModelSpec, read_spec
from k2hybrid.checkpoint.watch import FileWatch
from k2hybrid.errors import CheckpointError, ShardIndexError, TensorError
from k2hybrid.native.files import file_failed, look_at_files
from k2hybrid.types import ExpertRef, ExpertSink, Int4Ref, TensorRef

if TYPE_CHECKING:
    from numpy.typing import NDArray

# torch knows no bf16 in numpy: the bytes are taken as int16 and viewed.
_VIEWS: dict[str, tuple[type[np.generic], torch.dtype]] = {
    "BF16": (np.int16, torch.bfloat16),
    "F32": (np.float32, torch.float32),
}

MISSING = "missing"  # what `compare` says of a tensor that is not there


class Checkpoint:
    """An open checkpoint: owns the maps that every `TensorRef.address` points into.

    Keep it open as long as any `ExpertRef` given to the sink is in use.
    """

    def __init__(self, model_dir: Path, spec: ModelSpec, index: ShardIndex) -> None:
        self.model_dir = model_dir
        self.spec = spec
        self._index: ShardIndex | None = index
        self._unused = set(index.tensors)
        self._let_go: set[str] = set()

    def take(self, layer: int | None, role: str) -> torch.Tensor:
        """The tensor `role` of `layer` in place, bf16 (`router_bias`: fp32): a read-only view of the map.

        Raises:
            TensorError: there is no such tensor, or it has been taken before.
        """
        try:
            name = tensor_name(layer, role)
        except KeyError:
            raise TensorError(f"no tensor has the role {role!r}") from None
        ref = self._open_index().tensors.get(name)
        if ref is None:
            raise TensorError(f"this checkpoint has no {name} ({role!r} of layer {layer})")
        self._use(ref)
        numpy_type, torch_type = _VIEWS[ref.dtype]
        array = self._bytes(ref).view(numpy_type).reshape(ref.shape)
        with warnings.catch_warnings():
            # torch warns that it cannot mark the tensor read-only; nothing here writes to weights.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
            return torch.from_numpy(array).view(torch_type)

    def let_go(self, layer: int | None, role: str) -> None:
        """A tensor that was taken will not be read again: its pages may go, and nobody is told of its loss.

        Raises:
            ShardIndexError: bytes of it are lost already, so that what was read of it may be wrong.
        """
        ref = self._open_index().tensors[tensor_name(layer, role)]
        look_at_files()
        if file_failed(ref.address, ref.nbytes):
            raise ShardIndexError(
                f"{ref.path} lost bytes while it was read; put the whole file back in its place and try again"
            )
        self._open_index().shards[ref.path].let_go(ref.offset, ref.nbytes)
        self._let_go.add(ref.name)

    def watch(self) -> FileWatch:
        """What tells whether the shards are still whole, now and after this checkpoint is closed."""
        index = self._open_index()
        return FileWatch(index.shards.values(), index.tensors, self._let_go)

    @property
    def maps(self) -> list[NDArray[np.uint8]]:
        """The shards' maps: whoever holds them keeps every address valid."""
        return [shard.bytes for shard in self._open_index().shards.values()]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(ref.nbytes for ref in self._open_index().tensors.values())

    @property
    def ignored_shapes(self) -> int:
        """How many `weight_shape` tensors do not agree with the shape that packed and scale have.

        Published files hold garbage there, so they are never relied on, and only counted here: reading them
        touches one page per matrix (K2: 69,120), too slow for every start.
        """
        count = 0
        index = self._open_index()
        for layer in self.spec.moe_layers:
            for expert in range(self.spec.num_experts):
                for projection in PROJECTIONS:
                    prefix = f"{expert_prefix(layer, expert)}{projection}_proj.weight_"
                    rows, words = index.tensors[prefix + "packed"].shape
                    ref = index.tensors[prefix + "shape"]
                    values = self._bytes(ref).view(np.int32 if ref.dtype == "I32" else np.int64)
                    count += values.tolist() != [rows, words * 8]
        return count

    def close_ledger(self) -> None:
        """Prove that every tensor was used exactly once (a second use fails at once).

        Raises:
            TensorError: listing the tensors nobody took.
        """
        if self._unused:
            raise TensorError(
                f"{len(self._unused)} tensors were never used; please report this as a bug",
                sorted(self._unused),
            )

    def close(self) -> None:
        """Let go of the maps; a map stays until the last tensor that views it is gone."""
        self._index = None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_index(self) -> ShardIndex:
        if self._index is None:
            raise CheckpointError(f"{self.model_dir} is closed; open it again")
        return self._index

    def _bytes(self, ref: TensorRef) -> NDArray[np.uint8]:
        return self._open_index().shards[ref.path].bytes[ref.offset : ref.offset + ref.nbytes]

    def _use(self, ref: TensorRef) -> None:
        try:
            self._unused.remove(ref.name)
        except KeyError:
            raise TensorError(f"{ref.name} is used a second time; every tensor is handed out once") from None

    def _hand_out_experts(self, sink: ExpertSink) -> None:
        tensors = self._open_index().tensors
        for layer in self.spec.moe_layers:
            for expert in range(self.spec.num_experts):
                prefix = expert_prefix(layer, expert)
                matrices = []
                for projection in PROJECTIONS:
                    name = f"{prefix}{projection}_proj.weight_"
                    packed, scale = tensors[name + "packed"], tensors[name + "scale"]
                    self._use(packed)
                    self._use(scale)
                    self._use(tensors[name + "shape"])
                    matrices.append(Int4Ref(packed, scale))
                sink.add_expert(layer, expert, ExpertRef(*matrices))


def open_checkpoint(model_dir: Path, sink: ExpertSink) -> Checkpoint:
    """Validate the checkpoint in `model_dir`, then hand every routed expert to `sink`, each exactly once.

    Raises:
        SpecError: `config.json` is unreadable or unsupported.
        ShardIndexError, HeaderError: the index or a shard is unreadable, missing or contradicts itself.
        TensorError: listing all tensors that are missing, extra, duplicated, mis-shaped or mis-typed.
    """
    spec = read_spec(model_dir)
    index = ShardIndex(model_dir)
    problems = {**compare(expected_tensors(spec), index.tensors), **index.problems}
    if problems:
        raise TensorError(
            f"the tensors in {model_dir} do not match config.json:",
            sorted(f"{name}: {text}" for name, text in problems.items()),
        )
    checkpoint = Checkpoint(model_dir, spec, index)
    checkpoint._hand_out_experts(sink)
    return checkpoint


def compare(expected: Iterable[ExpectedTensor], found: dict[str, TensorRef]) -> dict[str, str]:
    """name → what differs, for each tensor that is not as the spec asks."""
    problems: dict[str, str] = {}
    extra = set(found)
    for name, _, dtypes, shape in expected:
        ref = found.get(name)
        if ref is None:
            problems[name] = MISSING
            continue
        extra.discard(name)
        if ref.dtype not in dtypes or ref.shape != shape:
            wanted = f"{' or '.join(dtypes)} {list(shape)}"
            problems[name] = f"{ref.dtype} {list(ref.shape)}, expected {wanted}"
    problems |= {plain(name): "extra; this model has no such tensor" for name in extra}
    return problems
