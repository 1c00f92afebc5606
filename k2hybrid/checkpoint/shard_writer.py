"""Writes safetensors shards as the safetensors library lays them out, streaming."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from k2hybrid.checkpoint.header import DTYPE_BYTES

# The library sorts by this rank, then by name, so that the wider type comes first and all are aligned
# (safetensors 0.8, tensor.rs: the order of its Dtype).
_DTYPE_ORDER = ("I64", "F32", "I32", "BF16")


class ShardTensor(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)


def in_file_order(tensors: Iterable[ShardTensor]) -> list[ShardTensor]:
    """The order in which the library lays tensors into a file."""
    return sorted(tensors, key=lambda tensor: (_DTYPE_ORDER.index(tensor.dtype), tensor.name))


def shard_header(ordered: Sequence[ShardTensor]) -> bytes:
    """Length, JSON and padding to 8 bytes, as the library writes them."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in ordered:
        end = begin + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shard(
    path: Path,
    tensors: Iterable[ShardTensor],
    content: Callable[[ShardTensor], Iterable[Any]],
    written: Callable[[int], object],
) -> None:
    """Write one file.

    Args:
        content: the bytes of a tensor, in pieces (anything with a buffer).
        written: told the number of bytes after each tensor.

    Raises:
        OSError: the disk is full, or the file exists.
        ValueError: `content` yields another number of bytes than dtype and shape ask for.
    """
    ordered = in_file_order(tensors)
    with open(path, "xb", buffering=1 << 16) as file:
        file.write(shard_header(ordered))
        for tensor in ordered:
            count = sum(file.write(piece) for piece in content(tensor))
            if count != tensor.nbytes:
                raise ValueError(f"{tensor.name}: {count} bytes of content for {tensor.nbytes}")
            written(count)
