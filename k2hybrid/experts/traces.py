"""Routing traces: which experts every hand-off asked for, ids and nothing else; optionally what was foreseen.

    magic[8] · frame of the header, JSON · frames of records · an empty frame: the recording was closed
    a frame: length:u32 · crc:u32 of the length's bytes and the content · content
    a record: kind:u8 · 0:u8 · layer:u16 · rows:u32 · ids [rows, top_k], int16, or int32 with many experts

All numbers are little-endian; a frame holds whole records, in the order of hand-offs. Kind 1 is a prediction:
it follows the hand-off at which it was made, names the layer that it is for, and has `ahead` ids a row,
likeliest first. A file that was cut anywhere reads up to its last whole frame; a damaged one is refused.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import stat
import struct
import zlib
from array import array
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from k2hybrid.checkpoint.strict_json import show
from k2hybrid.errors import TraceError

log = logging.getLogger(__name__)

Ints = npt.NDArray[np.int32]
Offsets = npt.NDArray[np.int64]

MAGIC = b"K2TRACE\n"
VERSION = 1
FRAME = struct.Struct("<II")
RECORD = struct.Struct("<BxHI")
ROUTED, AHEAD = 0, 1
MAX_HEADER_BYTES = 1 << 16
MAX_FRAME_BYTES = 1 << 25
MAX_FILE_BYTES = 1 << 33  # a reader holds it in memory, a few times
# Of the fields that are numbers; what a model could plausibly have.
_LIMITS = {"layers": (1, 4096), "experts": (1, 65536), "top_k": (1, 1024), "ahead": (0, 1024)}
_LIMITS["expert_bytes"] = (0, 1 << 40)
_MAX_TEXT = 256


@dataclass(frozen=True, slots=True)
class TraceHeader:
    """What a trace is of.

    Attributes:
        model: its name.
        layers: all layers of the model, dense ones included.
        experts, top_k: routed experts of a layer, and how many of them a row is sent to.
        created_by: the program that recorded it, with its version.
        expert_bytes: of one expert; 0: not known.
        ahead: ids a row in predictions; 0: there are none.

    Raises:
        TraceError: a field is not what it should be.
    """

    model: str
    layers: int
    experts: int
    top_k: int
    created_by: str
    expert_bytes: int = 0
    ahead: int = 0

    def __post_init__(self) -> None:
        for name, (least, most) in _LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise TraceError(f"a trace's {name} must be a number of {least}…{most}, not {show(value)}")
        if max(self.top_k, self.ahead) > self.experts:
            raise TraceError(
                f"a trace cannot have {max(self.top_k, self.ahead)} ids a row of {self.experts} experts"
            )
        for name in ("model", "created_by"):
            text = getattr(self, name)
            # They are printed: no control characters, which a terminal would obey.
            if not isinstance(text, str) or len(text) > _MAX_TEXT or not text.isprintable():
                raise TraceError(f"a trace's {name} must be at most {_MAX_TEXT} printable characters")

    @property
    def dtype(self) -> np.dtype[np.signedinteger]:
        """Of the ids in the file."""
        return np.dtype("<i2") if self.experts <= 1 << 15 else np.dtype("<i4")

    def width(self, kind: int) -> int:
        """Ids a row in a record of this kind."""
        return self.top_k if kind == ROUTED else self.ahead


@dataclass(frozen=True)
class Trace:
    """A trace in memory; hand-offs in order.

    Attributes:
        layer: [tickets], counted over all layers of the model.
        rows: [tickets].
        starts: [tickets + 1]; ticket t has ids[starts[t] : starts[t + 1]], rows · top_k of them.
        ids: −1 is padding.
        ahead_layer: [tickets]: the layer foreseen at a ticket, −1: none.
        ahead_starts, ahead_ids: the predictions, as `starts` and `ids`.
        complete: the recording was closed, not cut off.
    """

    header: TraceHeader
    layer: Ints
    rows: Ints
    starts: Offsets
    ids: Ints
    ahead_layer: Ints
    ahead_starts: Offsets
    ahead_ids: Ints
    complete: bool = True

    def __len__(self) -> int:
        return len(self.layer)

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers that occur, ascending."""
        return tuple(np.unique(self.layer).tolist())

    def select(self, wanted: npt.NDArray[np.bool_]) -> Trace:
        """The tickets for which `wanted` [tickets] is true, with their predictions."""
        return Trace(
            self.header,
            self.layer[wanted],
            self.rows[wanted],
            *_parts(self.starts, self.ids, wanted),
            self.ahead_layer[wanted],
            *_parts(self.ahead_starts, self.ahead_ids, wanted),
            self.complete,
        )


def _parts(starts: Offsets, ids: Ints, wanted: npt.NDArray[np.bool_]) -> tuple[Offsets, Ints]:
    sizes = np.diff(starts)
    return offsets(sizes[wanted]), ids[np.repeat(wanted, sizes)]


def offsets(sizes: npt.NDArray[np.signedinteger]) -> Offsets:
    """[n] sizes → [n + 1] positions from 0."""
    return np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))


def pack_header(header: TraceHeader) -> bytes:
    """The beginning of a file."""
    return MAGIC + frame(json.dumps({"version": VERSION, **dataclasses.asdict(header)}).encode())


def pack_record(header: TraceHeader, kind: int, layer: int, ids: npt.NDArray[np.signedinteger]) -> bytes:
    """A record of ids [rows, width]."""
    return RECORD.pack(kind, layer, len(ids)) + ids.astype(header.dtype).tobytes()


def frame(content: bytes) -> bytes:
    """`content` with its length and checksum."""
    length = len(content).to_bytes(4, "little")
    return length + zlib.crc32(content, zlib.crc32(length)).to_bytes(4, "little") + content


def read_trace(path: Path) -> Trace:
    """Read a whole trace. What a cut-off recording ends with is left out, and a warning says so.

    Raises:
        TraceError: it cannot be read, is no trace, or is damaged; or predictions stand where none belong.
    """
    data = _content(path)
    if data[: len(MAGIC)] != MAGIC:
        raise TraceError(f"{path} is no routing trace; `k2hybrid serve --trace FILE` records one")
    first = _frame(data, len(MAGIC), MAX_HEADER_BYTES, path)
    if not first:
        raise TraceError(f"{path} ends within its header: nothing was recorded")
    header = _header(first, path)
    records = _Records(header, path)
    at = len(MAGIC) + FRAME.size + len(first)
    complete = False
    while at < len(data) and not complete:
        content = _frame(data, at, MAX_FRAME_BYTES, path)
        if content is None:
            break
        complete = not content
        records.add(content, at)
        at += FRAME.size + len(content)
    if at < len(data) and complete:
        raise TraceError(f"{path} goes on after its end, at byte {at}; record it again")
    if not complete:
        log.warning(
            "%s was cut off: its first %d hand-offs are used, its last %d bytes are not",
            path, len(records.layer), len(data) - at,
        )  # fmt: skip
    return records.trace(complete)


def _content(path: Path) -> bytes:
    try:
        # A pipe in place of the file must not block the open.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode):
                raise TraceError(f"{path} is not a regular file")
            if info.st_size > MAX_FILE_BYTES:
                raise TraceError(f"{path} has {info.st_size} bytes; at most {MAX_FILE_BYTES} can be read")
            return file.read(info.st_size)
    except (OSError, ValueError) as problem:
        raise TraceError(f"{path} cannot be read: {problem}") from None


def _frame(data: bytes, at: int, limit: int, path: Path) -> bytes | None:
    """The content of the frame at `at`, or None if the file ends within it."""
    if len(data) - at < FRAME.size:
        return None
    length, crc = FRAME.unpack_from(data, at)
    if length > limit:
        raise TraceError(f"{path} is damaged at byte {at}: no frame has {length} bytes")
    content = data[at + FRAME.size : at + FRAME.size + length]
    if len(content) < length:
        return None
    if zlib.crc32(content, zlib.crc32(data[at : at + 4])) != crc:
        raise TraceError(f"{path} is damaged at byte {at}: wrong checksum; record it again")
    return content


def _header(content: bytes, path: Path) -> TraceHeader:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        raise TraceError(f"{path} has a header that is not JSON") from None
    if not isinstance(fields, dict) or "version" not in fields:
        raise TraceError(f"{path} has a header without a version")
    version = fields.pop("version")
    if type(version) is not int or version != VERSION:
        raise TraceError(
            f"{path} is a trace of version {show(version)}; this k2hybrid reads version {VERSION}"
        )
    names = {field.name for field in dataclasses.fields(TraceHeader)}
    if fields.keys() != names:
        odd = ", ".join(sorted(show(name) for name in fields.keys() ^ names)[:8])
        raise TraceError(f"{path} has a header with missing or unknown fields: {odd}")
    try:
        return TraceHeader(**fields)
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from None


class _Records:
    """Collects records, and checks them."""

    def __init__(self, header: TraceHeader, path: Path) -> None:
        self.layer = array("i")
        self._rows = array("q")
        self._ahead_layer = array("i")
        self._ahead_rows = array("q")
        self._ids = (bytearray(), bytearray())  # by kind, as in the file
        self._header = header
        self._path = path

    def add(self, content: bytes, at: int) -> None:
        """The records of the frame at byte `at`."""
        header, here, end = self._header, 0, len(content)
        checked = [len(ids) for ids in self._ids]
        while here < end:
            if end - here < RECORD.size:
                raise self._damaged(at, "a record is cut")
            kind, layer, rows = RECORD.unpack_from(content, here)
            if kind not in (ROUTED, AHEAD) or (kind == AHEAD and not header.ahead):
                raise self._damaged(at, f"records of kind {kind} do not belong there")
            if layer >= header.layers:
                raise self._damaged(at, f"layer {layer} of {header.layers}")
            first = here + RECORD.size
            here = first + rows * header.width(kind) * header.dtype.itemsize
            if here > end:
                raise self._damaged(at, "a record is cut")
            if kind == ROUTED:
                self.layer.append(layer)
                self._rows.append(rows)
                self._ahead_layer.append(-1)
                self._ahead_rows.append(0)
            elif not self.layer or self._ahead_layer[-1] >= 0:
                raise self._damaged(at, "a prediction without a hand-off of its own")
            else:
                self._ahead_layer[-1] = layer
                self._ahead_rows[-1] = rows
            self._ids[kind].extend(content[first:here])
        for ids, start in zip(self._ids, checked, strict=True):
            new = np.frombuffer(bytes(ids[start:]), header.dtype)
            if len(new) and not -1 <= new.min() <= new.max() < header.experts:
                raise self._damaged(at, f"an id that none of {header.experts} experts has")

    def trace(self, complete: bool) -> Trace:
        """All of them."""
        header = self._header
        rows, ahead_rows = (np.array(part, np.int64) for part in (self._rows, self._ahead_rows))
        ids, ahead = (np.frombuffer(bytes(part), header.dtype).astype(np.int32) for part in self._ids)
        layer, ahead_layer = (np.array(part, np.int32) for part in (self.layer, self._ahead_layer))
        starts, ahead_starts = offsets(rows * header.top_k), offsets(ahead_rows * header.ahead)
        rows32 = rows.astype(np.int32)
        return Trace(header, layer, rows32, starts, ids, ahead_layer, ahead_starts, ahead, complete)

    def _damaged(self, at: int, what: str) -> TraceError:
        return TraceError(f"{self._path} is damaged in the frame at byte {at}: {what}")
