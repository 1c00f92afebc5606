"""Hostile traces: whatever a file claims, reading it ends in a named error or in possible hand-offs."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k2hybrid.errors import TraceError
from k2hybrid.experts.recorder import TraceWriter
from k2hybrid.experts.traces import MAGIC, MAX_FRAME_BYTES, Trace, TraceHeader, frame, read_trace

GOOD: dict[str, Any] = {
    "version": 1,
    "model": "m",
    "layers": 3,
    "experts": 6,
    "top_k": 2,
    "created_by": "t",
    "expert_bytes": 0,
    "ahead": 2,
}
RECORD = struct.pack("<BxHI2h", 0, 1, 1, 4, 5)
END = frame(b"")


def file_of(path: Path, header: Any = None, *frames: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(GOOD if header is None else header).encode()
    path.write_bytes(MAGIC + frame(text) + b"".join(frames))
    return path


def possible(trace: Trace) -> bool:
    header = trace.header
    ids = np.concatenate([trace.ids, trace.ahead_ids])
    return (
        len(trace.ids) == trace.rows.sum() * header.top_k == trace.starts[-1]
        and bool((trace.layer < header.layers).all())
        and bool(((ids >= -1) & (ids < header.experts)).all())
    )


def test_the_target_is_good(tmp_path: Path) -> None:
    trace = read_trace(file_of(tmp_path / "t", None, frame(RECORD), END))
    assert (trace.layer.tolist(), trace.ids.tolist(), trace.complete) == ([1], [4, 5], True)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "ends within its header"),
        (b"not json", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 60_000, "not JSON"),
        (b"[]", "without a version"),
        (b"{}", "without a version"),
        ({**GOOD, "version": 2}, "of version 2; this k2hybrid reads version 1"),
        ({**GOOD, "version": True}, "of version true"),
        ({**GOOD, "version": "1" * 10_000}, "of version"),
        ({"version": 1}, "missing or unknown fields"),
        ({**GOOD, "extra": 1}, "missing or unknown fields: 'extra'"),
        ({**GOOD, "x" * 30_000: 1}, "missing or unknown fields"),
        ({**GOOD, "layers": 0}, "layers must be a number of 1…4096, not 0"),
        ({**GOOD, "layers": 1e300}, "layers must be"),
        ({**GOOD, "layers": True}, "layers must be"),
        ({**GOOD, "layers": None}, "layers must be"),
        (json.dumps(GOOD).replace('"layers": 3', '"layers": NaN').encode(), "layers must be"),
        (json.dumps(GOOD).replace('"layers": 3', '"layers": 1' + "0" * 4000).encode(), "layers must be"),
        ({**GOOD, "experts": 65537}, "experts must be"),
        ({**GOOD, "experts": -1}, "experts must be"),
        ({**GOOD, "top_k": 7}, "7 ids a row of 6 experts"),
        ({**GOOD, "ahead": 7}, "7 ids a row of 6 experts"),
        ({**GOOD, "expert_bytes": -5}, "expert_bytes must be"),
        ({**GOOD, "model": "\x1b]0;owned\x07"}, "printable"),
        ({**GOOD, "created_by": "a\nb"}, "printable"),
        ({**GOOD, "model": "m" * 257}, "at most 256"),
        ({**GOOD, "model": ["m"]}, "printable"),
    ],
)  # fmt: skip
def test_headers(tmp_path: Path, header: Any, message: str) -> None:
    path = file_of(tmp_path / "t", header, frame(RECORD), END)
    with pytest.raises(TraceError, match=message) as caught:
        read_trace(path)
    assert len(str(caught.value)) < 1000 + len(str(path))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0", "a record is cut"),
        (RECORD[:-1], "a record is cut"),
        (RECORD + b"\0\0\0", "a record is cut"),
        (struct.pack("<BxHI", 0, 1, 0xFFFFFFFF), "a record is cut"),
        (struct.pack("<BxHI2h", 0, 3, 1, 0, 0), "layer 3 of 3"),
        (struct.pack("<BxHI2h", 2, 0, 1, 0, 0), "kind 2"),
        (struct.pack("<BxHI2h", 0, 0, 1, 6, 0), "none of 6 experts"),
        (struct.pack("<BxHI2h", 0, 0, 1, -2, 0), "none of 6 experts"),
        (struct.pack("<BxHI2h", 1, 0, 1, 0, 0), "a prediction without a hand-off"),
        (RECORD + struct.pack("<BxHI2h", 1, 2, 1, 0, 0) * 2, "a prediction without a hand-off"),
    ],
)
def test_records(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        read_trace(file_of(tmp_path / "t", None, frame(content), END))


def test_predictions_where_the_header_knows_none(tmp_path: Path) -> None:
    content = RECORD + struct.pack("<BxHI", 1, 2, 0xFFFFFFFF)
    with pytest.raises(TraceError, match="kind 1 do not belong"):
        read_trace(file_of(tmp_path / "t", {**GOOD, "ahead": 0}, frame(content), END))


def test_frames(tmp_path: Path) -> None:
    path = tmp_path / "t"
    flipped = bytearray(frame(RECORD))
    flipped[-1] ^= 1
    with pytest.raises(TraceError, match="wrong checksum"):
        read_trace(file_of(path, None, bytes(flipped), END))
    with pytest.raises(TraceError, match=f"no frame has {MAX_FRAME_BYTES + 1} bytes"):
        read_trace(file_of(path, None, struct.pack("<II", MAX_FRAME_BYTES + 1, 0)))
    with pytest.raises(TraceError, match="goes on after its end"):
        read_trace(file_of(path, None, END, frame(RECORD)))
    path.write_bytes(MAGIC + b"\xff" * 8)
    with pytest.raises(TraceError, match="damaged at byte 8: no frame"):
        read_trace(path)
    # A tail of zeros, as a file system leaves after a power cut.
    with pytest.raises(TraceError, match="wrong checksum"):
        read_trace(file_of(path, None, frame(RECORD), b"\0" * 64))


def test_what_is_no_trace_or_no_file(tmp_path: Path) -> None:
    path = tmp_path / "t"
    for data in (b"", b"K2TRACE", b"K2TRACE\r", b"PK\3\4" * 100, os.urandom(5000)):
        path.write_bytes(data)
        with pytest.raises(TraceError, match="no routing trace"):
            read_trace(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TraceError, match="not a regular file"):
        read_trace(tmp_path / "pipe")
    for name in ("missing", ".", "nul\0"):
        with pytest.raises(TraceError, match=r"cannot be read|not a regular file"):
            read_trace(tmp_path / name)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = file_of(tmp_path / "t")
    os.truncate(path, 1 << 34)  # a hole
    with pytest.raises(TraceError, match="at most"):
        read_trace(path)


def test_flipped_bits(tmp_path: Path) -> None:
    """One bit of every byte: a named error, or the beginning of the same hand-offs."""
    rng = random.Random(0)
    numbers = np.random.default_rng(0)
    path = tmp_path / "t"
    writer = TraceWriter(path, TraceHeader("m", 3, 6, 2, "t"))
    for at in range(40):
        writer.routed(at % 3, numbers.integers(-1, 6, (1 + at % 4, 2)))
    writer.close()
    good, data = read_trace(path), path.read_bytes()
    refused = 0
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            trace = read_trace(path)
        except TraceError:
            refused += 1
            continue
        assert possible(trace)
        assert not trace.complete
        assert trace.ids.tolist() == good.ids[: len(trace.ids)].tolist()
    assert refused > 0.98 * len(data)
