"""Reads every byte of a checkpoint: are the files those that were published, and are all weights finite?"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import numpy as np

from k2hybrid.checkpoint.checksums import Checksum, known_checksums
from k2hybrid.checkpoint.finite import FiniteScan
from k2hybrid.checkpoint.index import plain
from k2hybrid.checkpoint.reading import CHUNK_BYTES, Reader
from k2hybrid.checkpoint.survey import Survey
from k2hybrid.errors import CheckpointError
from k2hybrid.types import TensorRef

MAX_READERS = 8  # as many streams as an NVMe disk needs; each holds two chunks


@dataclass(frozen=True, slots=True)
class Contents:
    """What reading everything found.

    Attributes:
        problems: a line for each file that is not what its checksum says, each tensor with values that are
            not finite, and each file that cannot be read.
        checked: files whose checksum is known, and was compared.
        unknown: files that were read, but of which no checksum is known.
        shapes_ignored: `weight_shape` tensors that contradict their matrices. No problem: published files
            have such, and they are never relied on.
        nbytes: bytes that were read.
    """

    problems: tuple[str, ...]
    checked: tuple[str, ...]
    unknown: tuple[str, ...]
    shapes_ignored: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Task:
    path: Path
    nbytes: int
    checksums: Sequence[Checksum]
    refs: Sequence[TensorRef]


class DeepCheck:
    """All files to be read: shards whose header is right, and whatever else has a known checksum."""

    def __init__(self, found: Survey) -> None:
        self._tensors = found.tensors
        known = known_checksums(found.folder)
        refs: dict[str, list[TensorRef]] = defaultdict(list)
        for ref in found.tensors.values():
            refs[ref.path.name].append(ref)
        faulty = {shard.name for shard in found.shards if shard.fault is not None}
        names = sorted({*known, *(shard.name for shard in found.shards)} - faulty)
        self._tasks = [
            _Task(found.folder / name, os.path.getsize(found.folder / name), known.get(name, ()), refs[name])
            for name in names
        ]
        self.total_bytes = sum(task.nbytes for task in self._tasks)

    def run(self, progress: Callable[[int], object] = lambda _: None, readers: int | None = None) -> Contents:
        """Read it all, several files at once.

        Args:
            progress: told bytes as they are read, from several threads.
            readers: files at once; None: one per core, eight at most.
        """
        stop = Event()
        # The longest first, so that no reader is left with a whole shard at the end.
        tasks = sorted(self._tasks, key=lambda task: -task.nbytes)
        pool = ThreadPoolExecutor(readers or min(MAX_READERS, os.cpu_count() or 1))
        try:
            results = list(pool.map(lambda task: self._check(task, stop, progress), tasks))
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
        problems = sorted(line for lines, _ in results for line in lines)
        return Contents(
            tuple(problems),
            tuple(task.path.name for task in self._tasks if task.checksums),
            tuple(task.path.name for task in self._tasks if not task.checksums),
            sum(ignored for _, ignored in results),
            self.total_bytes,
        )

    def _check(self, task: _Task, stop: Event, progress: Callable[[int], object]) -> tuple[list[str], int]:
        """(problems, contradicting weight_shape tensors) of one file."""
        scan = FiniteScan(task.refs, CHUNK_BYTES)
        shapes = _Shapes(task.refs)
        try:
            with Reader(task.path) as reader:
                if reader.nbytes != task.nbytes:
                    raise CheckpointError(f"{task.path} changed its size while it was checked")
                hashes = [one.started(reader.nbytes) for one in task.checksums]
                for offset, chunk in reader.chunks(stop, progress):
                    for running in hashes:
                        running.update(chunk)
                    scan.feed(offset, chunk)
                    shapes.feed(offset, chunk)
        except CheckpointError as problem:
            return [str(problem)], 0
        lines = [
            f"{task.path.name}: its {one.kind} hash is {running.hexdigest()}, "
            f"but {one.source} says {one.digest}"
            for one, running in zip(task.checksums, hashes, strict=True)
            if running.hexdigest() != one.digest
        ]
        lines += [f"{plain(name)}: {count} values are not finite" for name, count in scan.counts.items()]
        return lines, shapes.contradicting(self._tensors)


class _Shapes:
    """Collects the values of the `weight_shape` tensors as their bytes come by."""

    def __init__(self, refs: Sequence[TensorRef]) -> None:
        shapes = (ref for ref in refs if ref.name.endswith(".weight_shape") and ref.dtype in ("I32", "I64"))
        self._refs = sorted(shapes, key=lambda ref: ref.offset)
        self._found = {ref.name: bytearray() for ref in self._refs}
        self._next = 0

    def feed(self, offset: int, chunk: memoryview[int]) -> None:
        """The bytes of the file from `offset` on; chunk after chunk, without holes."""
        end = offset + len(chunk)
        for ref in self._refs[self._next :]:
            if ref.offset >= end:
                break
            self._found[ref.name] += chunk[max(ref.offset - offset, 0) : ref.offset + ref.nbytes - offset]
            self._next += ref.offset + ref.nbytes <= end

    def contradicting(self, tensors: dict[str, TensorRef]) -> int:
        """How many differ from the shape of their packed matrix, where there is one."""
        count = 0
        for ref in self._refs:
            packed = tensors.get(ref.name.removesuffix("shape") + "packed")
            if packed is not None and len(packed.shape) == 2:
                values = np.frombuffer(self._found[ref.name], "<i4" if ref.dtype == "I32" else "<i8")
                count += values.tolist() != [packed.shape[0], packed.shape[1] * 8]
        return count
