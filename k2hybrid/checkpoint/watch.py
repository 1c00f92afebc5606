"""Whether mapped shards are still whole, what was lost of them, and the way back to whole ones."""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from mmap import PAGESIZE
from pathlib import Path

from k2hybrid.checkpoint.mapped import MappedShard, header_digest
from k2hybrid.checkpoint.names import expert_of, tensor_name
from k2hybrid.errors import NativeError
from k2hybrid.native.files import FileMap, failed_ranges, file_changes, look_at_files, rewritten_files
from k2hybrid.types import TensorRef

log = logging.getLogger(__name__)

RESTORE_SECONDS = 1.0  # between two tries
SETTLED_SECONDS = 1.0  # a file that was written to more recently may still be incomplete
# Where so many looks in a row take longer (a network, thousands of shards), they are made once a second.
SLOW_LOOK_SECONDS = 1e-3
SLOW_LOOKS = 8

Range = tuple[int, int]  # addresses [begin, end)


@dataclass(slots=True)
class _File:
    path: Path
    guard: FileMap
    header_bytes: int
    header_digest: str
    told: bool = False  # its loss stands in the log


def overlaps(ranges: Iterable[Range], address: int, nbytes: int) -> bool:
    """Whether one of `ranges` has bytes there."""
    return any(begin < address + nbytes and address < end for begin, end in ranges)


class FileWatch:
    """The shards of one checkpoint. For one thread; holds no map open.

    A page that is gone is read as zeros and marked by whoever reads it (`native.files`). The rest of a
    file's last page becomes zeros silently, and so does more of a file that is cut and put back at once:
    `look` finds them by sizes, and by the times at which files were written.

    Args:
        unread: names of tensors that nobody reads any more.
    """

    def __init__(
        self, shards: Iterable[MappedShard], tensors: Mapping[str, TensorRef], unread: Collection[str] = ()
    ) -> None:
        self._files = [_File(s.path, s.guard, s.header_bytes, s.header_digest) for s in shards]
        self._tensors = tensors
        self._unread = frozenset(unread)
        self._changes = -1
        self._lost: list[Range] = []
        # Ranges, and how often what was written to was.
        self._silent: frozenset[tuple[int, int, int]] = frozenset()
        self._told = self._silent
        self._slow_looks = 0
        self._next_look = self._next_restore = 0.0

    # --- what is lost -----------------------------------------------------------------------------

    def look(self) -> frozenset[Range]:
        """Compare the files with what they were.

        Returns:
            What may have been zeros without a signal since the last look: who read it was told nothing.
        """
        if self._slow_looks < SLOW_LOOKS or time.monotonic() >= self._next_look:
            self._slow_looks = self._slow_looks + 1 if look_at_files() > SLOW_LOOK_SECONDS else 0
            self._next_look = time.monotonic() + 1.0
        self._update()
        told, self._told = self._told, self._silent
        return frozenset((begin, end) for begin, end, _ in self._silent - told)

    @property
    def whole(self) -> bool:
        """Whether nothing is lost, as far as is known."""
        self._update()
        return not self._lost

    def failed(self, address: int, nbytes: int) -> bool:
        """Whether bytes there are lost."""
        self._update()
        return overlaps(self._lost, address, nbytes)

    def dense_failed(self, ranges: Collection[Range] = ()) -> bool:
        """Whether weights that every token needs (not embedding, not experts) are lost or lie in `ranges`."""
        if self.whole and not ranges:
            return False
        return any(self.failed(*place) or overlaps(ranges, *place) for place in self._dense)

    def experts_at(self, ranges: Collection[Range]) -> set[tuple[int, int]]:
        """(layer, expert) of all routed experts that have bytes in one of `ranges`."""
        tensors = self._tensors.values()
        found = {expert_of(ref.name) for ref in tensors if overlaps(ranges, ref.address, ref.nbytes)}
        return {expert for expert in found if expert is not None}

    @property
    def lost_files(self) -> list[str]:
        """Names of shards of which bytes are lost, as far as is known; may be asked from any thread."""
        return [file.path.name for file in self._files if file.guard.failed]

    @property
    def problem(self) -> str:
        """What to do about the files, for a message."""
        names = self.lost_files
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        if not names:
            return "files were written to while they were read; leave them as they are"
        return f"bytes of {', '.join(names[:3])}{more} are lost; put the whole file back in its place"

    @cached_property
    def _dense(self) -> list[Range]:
        embedding = tensor_name(None, "embed_tokens")
        return [
            (ref.address, ref.nbytes)
            for name, ref in self._tensors.items()
            if name != embedding and name not in self._unread and expert_of(name) is None
        ]

    def _update(self) -> None:
        changes = file_changes()
        if changes == self._changes:
            return
        self._changes = changes
        self._lost = [
            (begin, end)
            for begin, end in failed_ranges()
            if any(f.guard.address <= begin < f.guard.address + f.guard.nbytes for f in self._files)
        ]
        cuts = {
            (begin, min(end, -(-begin // PAGESIZE) * PAGESIZE), 0)
            for begin, end in self._lost
            if begin % PAGESIZE
        }
        self._silent = frozenset(cuts.union(self._rewritten()))
        for file in self._files:
            if not file.told and file.guard.failed:
                file.told = True
                log.error(
                    "%s has become shorter or cannot be read; requests that need what is lost fail until the "
                    "whole file is back",
                    file.path,
                )

    def _rewritten(self) -> Iterator[tuple[int, int, int]]:
        times = rewritten_files()
        for guard in (file.guard for file in self._files):
            if guard.address in times:
                yield guard.address, guard.address + guard.nbytes, times[guard.address]

    # --- the way back -----------------------------------------------------------------------------

    def restore(self) -> None:
        """Map those files again that are whole again. Between two passes: while nobody reads."""
        if self.whole or time.monotonic() < self._next_restore:
            return
        for file in self._files:
            if file.guard.failed and _restored(file):
                file.told = False
                log.warning("%s is whole again", file.path)
        self._next_restore = time.monotonic() + RESTORE_SECONDS
        self._update()
        self._told &= self._silent  # what is lost again is told again


def _restored(file: _File) -> bool:
    try:
        # A pipe in place of the file must not block the open.
        descriptor = os.open(file.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # not there yet
        return False
    try:
        info = os.fstat(descriptor)
        # A file from the future is one whose clock is not ours.
        if not stat.S_ISREG(info.st_mode) or 0 <= time.time() - info.st_mtime < SETTLED_SECONDS:
            return False
        if header_digest(os.pread(descriptor, file.header_bytes, 0)) != file.header_digest:
            return False
        return file.guard.restore(descriptor)
    except (OSError, NativeError) as problem:
        log.error("%s: %s", file.path, problem)
        return False
    finally:
        os.close(descriptor)
