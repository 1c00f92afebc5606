"""The header of a safetensors file, parsed strictly.

Format (safetensors README): 8 bytes little-endian header length n, n bytes of JSON
`{name: {"dtype", "shape", "data_offsets": [begin, end]}}`, then the tensors' bytes, without gap or overlap,
to the end of the file.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from k2hybrid.checkpoint.strict_json import parse_object, show
from k2hybrid.errors import HeaderError

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the bound of the safetensors library
_MAX_NAME = 1024
_MAX_DIMS = 8

DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}


class HeaderEntry(NamedTuple):
    """One tensor of a file; `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def header_bytes(prefix: bytes, file_bytes: int, what: str) -> int:
    """The header length that the file's first 8 bytes claim, if it can be true.

    Raises:
        HeaderError: the file is too short, or the length cannot be true.
    """
    if len(prefix) < PREFIX_BYTES:
        raise HeaderError(f"{what} is truncated: {file_bytes} bytes are too few for a safetensors file")
    claimed = int.from_bytes(prefix, "little")
    if claimed < 2:
        raise HeaderError(f"{what}: the header claims {claimed} bytes; no JSON object is that short")
    if claimed > MAX_HEADER_BYTES:
        raise HeaderError(
            f"{what}: the header claims {claimed} bytes; more than {MAX_HEADER_BYTES} is not plausible"
        )
    if claimed > file_bytes - PREFIX_BYTES:
        raise HeaderError(f"{what} is truncated: header of {claimed} bytes in a file of {file_bytes}")
    return claimed


def parse_header(header: bytes, file_bytes: int, what: str) -> list[HeaderEntry]:
    """The tensors of a file of `file_bytes` bytes with the JSON `header`, in the order of their offsets.

    Raises:
        HeaderError: the header is malformed, or does not describe exactly the bytes of the file.
    """
    if header[:1] != b"{":
        raise HeaderError(f"{what}: the header does not begin with '{{'")
    fields = parse_object(header, f"{what}: the header", HeaderError)
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(type(value) is str for value in metadata.values()):
        raise HeaderError(f"{what}: __metadata__ is not a map of strings")
    data_start = PREFIX_BYTES + len(header)
    entries = [_entry(name, value, data_start, what) for name, value in fields.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    cursor = data_start
    for entry in entries:
        if entry.offset != cursor:
            kind = "overlaps the tensor before it" if entry.offset < cursor else "leaves a hole before it"
            raise HeaderError(
                f"{what}: tensor {show(entry.name)} {kind} (offset {entry.offset}, expected {cursor})"
            )
        cursor += entry.nbytes
    if cursor != file_bytes:
        kind = "is truncated" if cursor > file_bytes else "has bytes that belong to no tensor"
        raise HeaderError(
            f"{what} {kind}: its tensors end at byte {cursor}, the file at {file_bytes}; fetch it again"
        )
    return entries


def _entry(name: str, value: Any, data_start: int, what: str) -> HeaderEntry:
    if len(name) > _MAX_NAME:
        raise HeaderError(f"{what}: a tensor name has {len(name)} characters")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(
            f"{what}: {show(name)} must have exactly dtype, shape and data_offsets, not {show(value)}"
        )
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    item_bytes = DTYPE_BYTES.get(dtype) if type(dtype) is str else None
    if item_bytes is None:
        raise HeaderError(f"{what}: {show(name)} has the unknown dtype {show(dtype)}")
    if not _are_counts(shape) or len(shape) > _MAX_DIMS:
        raise HeaderError(f"{what}: {show(name)} has the impossible shape {show(shape)}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderError(f"{what}: {show(name)} has the impossible data_offsets {show(offsets)}")
    begin, end = offsets
    if end - begin != item_bytes * math.prod(shape):
        raise HeaderError(
            f"{what}: {show(name)} has {end - begin} bytes, but {dtype} {show(shape)} needs "
            f"{show(item_bytes * math.prod(shape))}"
        )
    if (data_start + begin) % item_bytes:
        raise HeaderError(
            f"{what}: {show(name)} ({dtype}) lies at byte {data_start + begin}, which is not a multiple of "
            f"{item_bytes}; save the file again with the safetensors library, which aligns it"
        )
    return HeaderEntry(name, dtype, tuple(shape), data_start + begin, end - begin)


def _are_counts(values: Any) -> bool:
    """A list of plain integers that fit 63 bits (true is an int to Python, and refused)."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)
