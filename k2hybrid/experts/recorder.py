"""Records routing traces while a model serves: the model's thread copies ids, another one writes them."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from k2hybrid.errors import TraceError
from k2hybrid.experts.traces import AHEAD, FRAME, ROUTED, TraceHeader, frame, pack_header, pack_record
from k2hybrid.types import RoutedExperts, Ticket

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

DEFAULT_MAX_BYTES = 4 << 30  # some three million tokens of 60 layers with 8 experts
FRAME_BYTES = 1 << 16  # so much is written at once
MAX_WAITING_BYTES = 8 << 20  # what a disk that hangs may leave in memory
FLUSH_S = 1.0  # a kill loses at most what came in so long
_END = frame(b"")


class TraceWriter:
    """A new trace file, for its owner's eyes only. Thread-safe.

    Recording ends by itself, with a warning, when the file is full, the disk refuses or does not keep up;
    serving goes on. The file is then a whole trace of what came before.

    Args:
        max_bytes: the file's size at most.

    Raises:
        TraceError: the file is there already or cannot be created, or `max_bytes` holds no record.
    """

    def __init__(self, path: Path, header: TraceHeader, *, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        beginning = pack_header(header)
        self._left = max_bytes - len(beginning) - len(_END)  # for frames
        if self._left <= FRAME.size:
            raise TraceError(f"a trace of {max_bytes} bytes at most holds nothing; allow more")
        self._path = path
        self._header = header
        try:
            self._fd = os.open(
                path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
        except FileExistsError:
            raise TraceError(f"{path} is there already; name a new file for the trace") from None
        except (OSError, ValueError) as problem:
            raise TraceError(f"the trace {path} cannot be created: {problem}") from None
        try:
            _write(self._fd, beginning)
        except OSError as problem:
            os.close(self._fd)
            raise TraceError(f"the trace {path} cannot be written: {problem}") from None
        self._waiting = bytearray()
        self._change = threading.Condition()
        self._closed = False
        self._stopped = False  # nothing more is taken
        self._thread = threading.Thread(target=self._run, name="trace-writer", daemon=True)
        self._thread.start()

    @property
    def header(self) -> TraceHeader:
        """What the trace is of."""
        return self._header

    def routed(self, layer: int, ids: npt.NDArray[np.signedinteger]) -> None:
        """A hand-off's ids [rows, top_k]."""
        self._add(ROUTED, layer, ids)

    def ahead(self, layer: int, ids: npt.NDArray[np.signedinteger]) -> None:
        """Ids [rows, ahead] foreseen for `layer` at the last hand-off; once per hand-off, and behind it."""
        self._add(AHEAD, layer, ids)

    def close(self) -> None:
        """Write what waits and end the file; nothing happens the second time."""
        with self._change:
            if self._closed:
                return
            self._closed = self._stopped = True
            self._change.notify()
        self._thread.join()

    def _add(self, kind: int, layer: int, ids: npt.NDArray[np.signedinteger]) -> None:
        if ids.ndim != 2 or ids.shape[1] != self._header.width(kind):
            raise TraceError(f"a record has {self._header.width(kind)} ids a row, not the shape {ids.shape}")
        with self._change:
            if self._stopped:
                return
            record = pack_record(self._header, kind, layer, ids)
            if len(record) + FRAME.size > self._left:
                self._stop("the file has the size it may have")
            elif len(record) + len(self._waiting) > MAX_WAITING_BYTES:
                self._stop("the disk does not keep up")
            else:
                if not self._waiting or len(self._waiting) >= FRAME_BYTES:
                    self._change.notify()
                self._waiting += record
                self._left -= len(record)

    def _run(self) -> None:
        try:
            while True:
                with self._change:
                    self._change.wait_for(lambda: self._closed or self._waiting)
                    self._change.wait_for(
                        lambda: self._closed or len(self._waiting) >= FRAME_BYTES, timeout=FLUSH_S
                    )
                    content, self._waiting = bytes(self._waiting), bytearray()
                    self._left -= FRAME.size
                    closed = self._closed
                if content:
                    _write(self._fd, frame(content))
                if closed:
                    _write(self._fd, _END)
                    return
        except OSError as problem:
            with self._change:
                self._stop(f"it cannot be written: {problem}")
        finally:
            os.close(self._fd)

    def _stop(self, why: str) -> None:
        self._stopped = True
        log.warning("the trace %s ends here: %s", self._path, why)


class TraceRecorder:
    """`RoutedExperts` that notes the ids of each hand-off in `writer`."""

    def __init__(self, experts: RoutedExperts, writer: TraceWriter) -> None:
        self._experts = experts
        self._writer = writer

    def submit(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Ticket:
        """See `RoutedExperts.submit`."""
        ticket = self._experts.submit(layer, x, ids, weights)
        # Noted while the experts work; a hand-off that was refused is none.
        self._writer.routed(layer, ids.detach().cpu().numpy())
        return ticket


def _write(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]
