"""Random experts of true size in the kinds of memory where they can lie, and a dense matrix beside them.

`mapped` is a file as the safetensors library writes it: rows start at any multiple of 8 bytes. The numbers
are one random block over and over, at other offsets: no kernel branches on them, and memory does not care.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from bench.kernel_cases import DENSE_COLUMNS, DENSE_ROWS, HIDDEN, INTER
from k2hybrid.checkpoint.mapped import map_shard
from k2hybrid.checkpoint.shard_writer import ShardTensor, write_shard
from k2hybrid.experts.store import ExpertStore
from k2hybrid.types import ExpertRef, Int4Ref, TensorRef

if TYPE_CHECKING:
    from numpy.typing import NDArray

MEMORY = ("mapped", "mapped-4k", "arena")
BLOCK_BYTES = 256 << 20
PROBE_BYTES = 512 << 20
DENSE_NAME = "model.layers.0.mlp.gate_proj.weight"
_MADV_HUGEPAGE, _MADV_NOHUGEPAGE = 14, 15
_PROJECTIONS = {"gate": (INTER, HIDDEN), "up": (INTER, HIDDEN), "down": (HIDDEN, INTER)}


@dataclass(slots=True)
class ExpertMemory:
    """The store over the bytes, the dense matrix, and the bytes themselves for the probe."""

    store: ExpertStore
    dense: torch.Tensor  # bf16 [DENSE_ROWS, DENSE_COLUMNS]
    bytes: NDArray[np.uint8]
    _at: int = 0

    def window(self) -> torch.Tensor:
        """The next stretch for a probe: always another one, so that no cache holds it."""
        size = min(PROBE_BYTES, self.bytes.size)
        if self._at + size > self.bytes.size:
            self._at = 0
        start, self._at = self._at, self._at + size
        return _tensor(self.bytes[start : start + size])


def expert_tensors(experts: int) -> list[ShardTensor]:
    """What the file holds, under the published names: all experts of one layer, and the dense matrix."""
    found = [ShardTensor(DENSE_NAME, "BF16", (DENSE_ROWS, DENSE_COLUMNS))]
    for expert, (projection, (out, inner)) in itertools.product(range(experts), _PROJECTIONS.items()):
        name = _name(expert, projection)
        found.append(ShardTensor(f"{name}.weight_packed", "I32", (out, inner // 8)))
        found.append(ShardTensor(f"{name}.weight_scale", "BF16", (out, inner // 32)))
        found.append(ShardTensor(f"{name}.weight_shape", "I32", (2,)))
    return found


def in_file(path: Path, experts: int, huge_pages: bool) -> ExpertMemory:
    """Map the file at `path`, which is written first unless it is there.

    Raises:
        OSError: it cannot be written.
        ShardIndexError, HeaderError: what is there is no such file.
    """
    tensors = expert_tensors(experts)
    if not path.exists():
        partial = path.with_name(path.name + ".partial")
        partial.unlink(missing_ok=True)
        blocks = _Blocks()
        write_shard(partial, tensors, blocks.content, lambda _: None)
        partial.rename(path)
    shard, entries = map_shard(path)
    if not huge_pages:
        _advise(shard.bytes, _MADV_NOHUGEPAGE)
    shard.bytes[::4096].max()  # maps every page
    return _memory(shard.bytes, {entry.name: entry.offset for entry in entries}, experts, path)


def in_arena(experts: int) -> ExpertMemory:
    """Anonymous memory in huge pages; every matrix starts at a multiple of 64 bytes."""
    tensors = [tensor for tensor in expert_tensors(experts) if not tensor.name.endswith("shape")]
    offsets = dict(
        zip(
            (tensor.name for tensor in tensors),
            itertools.accumulate((-(-tensor.nbytes // 64) * 64 for tensor in tensors), initial=0),
            strict=False,
        )
    )
    room = mmap.mmap(-1, sum(-(-tensor.nbytes // 64) * 64 for tensor in tensors))
    content = np.frombuffer(room, dtype=np.uint8)
    _advise(content, _MADV_HUGEPAGE)
    blocks = _Blocks()
    for tensor in tensors:
        at = offsets[tensor.name]
        for piece in blocks.content(tensor):
            content[at : at + piece.size] = piece
            at += piece.size
    return _memory(content, offsets, experts, Path("anonymous"))


class _Blocks:
    """Random content: nibbles for packed weights, small bf16 numbers for scales and, with signs, the rest."""

    def __init__(self) -> None:
        random = np.random.Generator(np.random.SFC64(1))
        self._nibbles = random.integers(0, 256, BLOCK_BYTES, dtype=np.uint8)
        # 0.002 to 0.008: scales that keep an expert's outputs about as large as its inputs.
        codes = random.integers(0, 256, 8 << 20, dtype=np.uint16) + np.uint16(0x3B00)
        signs = random.integers(0, 2, codes.size, dtype=np.uint16) << np.uint16(15)
        self._scales = codes.view(np.uint8)
        self._dense = (codes | signs).view(np.uint8)
        self._at = 0

    def content(self, tensor: ShardTensor) -> Iterator[NDArray[np.uint8]]:
        """`tensor.nbytes` bytes from wherever the last tensor ended."""
        if tensor.name.endswith("weight_shape"):
            yield np.zeros(tensor.nbytes, dtype=np.uint8)
            return
        source = self._dense if tensor.name == DENSE_NAME else self._scales
        if tensor.name.endswith("weight_packed"):
            source = self._nibbles
        left = tensor.nbytes
        while left:
            start = self._at % source.size
            piece = source[start : start + left]
            self._at += piece.size
            left -= piece.size
            yield piece


def _memory(content: NDArray[np.uint8], offsets: dict[str, int], experts: int, path: Path) -> ExpertMemory:
    store = ExpertStore(layers=1, experts=experts, hidden=HIDDEN, inter=INTER)

    def ref(name: str, dtype: str, shape: tuple[int, int]) -> TensorRef:
        nbytes = math.prod(shape) * (4 if dtype == "I32" else 2)
        offset = offsets[name]
        return TensorRef(name, path, offset, nbytes, dtype, shape, content.ctypes.data + offset)

    for expert in range(experts):
        matrices = {}
        for projection, (out, inner) in _PROJECTIONS.items():
            name = _name(expert, projection)
            matrices[projection] = Int4Ref(
                ref(f"{name}.weight_packed", "I32", (out, inner // 8)),
                ref(f"{name}.weight_scale", "BF16", (out, inner // 32)),
            )
        store.add_expert(0, expert, ExpertRef(**matrices))
    start = offsets[DENSE_NAME]
    dense = _tensor(content[start : start + DENSE_ROWS * DENSE_COLUMNS * 2])
    return ExpertMemory(store, dense.view(torch.bfloat16).view(DENSE_ROWS, DENSE_COLUMNS), content)


def _name(expert: int, projection: str) -> str:
    return f"model.layers.1.mlp.experts.{expert}.{projection}_proj"


def _tensor(content: NDArray[np.uint8]) -> torch.Tensor:
    with warnings.catch_warnings():
        # Nobody writes to it.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        return torch.from_numpy(content)


def _advise(content: NDArray[np.uint8], advice: int) -> None:
    """For arrays that start a map, which hide it. A refusal costs speed only."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise(ctypes.c_void_p(content.ctypes.data), ctypes.c_size_t(content.size), advice)
