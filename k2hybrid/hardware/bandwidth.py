"""The machine's read bandwidth: the limit that every figure is held against.

A probe reads a buffer far larger than the caches with all threads of the pool, in several variants: striped
or one stretch per thread, with and without software prefetch, as one stream a thread or as several. The best
variant's median is the limit: a kernel that beats it would only show that the probe was poor.
"""

from __future__ import annotations

import mmap
import statistics
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from k2hybrid.native.machine import Machine

PROBE_BYTES = 1 << 30
ROUNDS = 5
MEMORY_KINDS = ("anonymous huge", "anonymous 4 KB pages", "mapped file")
STRIPE_BYTES = 128 << 10


class ReadVariant(NamedTuple):
    """One way to read: how many streams a thread, how far ahead, and how much a thread takes at a time."""

    streams: int
    ahead_bytes: int = 0
    stripe_bytes: int | None = STRIPE_BYTES  # None: one stretch a thread

    @property
    def name(self) -> str:
        """As reports call it."""
        stripe = f"{self.stripe_bytes >> 10} KB stripes" if self.stripe_bytes else "one stretch a thread"
        streams = "1 stream" if self.streams == 1 else f"{self.streams} streams"
        return f"{stripe}, {streams}, prefetch {self.ahead_bytes >> 10} KB"

    def seconds(self, machine: Machine, data: torch.Tensor) -> float:
        """Seconds to read `data` once."""
        stretch = -(-data.nbytes // machine.threads // 4096) * 4096
        stripe = self.stripe_bytes or max(4096, stretch)
        return machine.probe_read_seconds(data, stripe, self.ahead_bytes, self.streams)


# What was best somewhere: a core alone likes two streams, many cores long ones, small pages short prefetches.
VARIANTS = (
    *(ReadVariant(streams) for streams in (1, 2, 4, 8)),
    *(ReadVariant(streams, 4096) for streams in (1, 2)),
    *(ReadVariant(streams, 0, None) for streams in (1, 2, 4)),
    ReadVariant(2, 4096, None),
)
QUICK_VARIANTS = (ReadVariant(1), ReadVariant(2), ReadVariant(1, 4096), ReadVariant(2, 0, None))


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Median GB/s (10⁹ bytes) of every variant, and the best."""

    gb_s: float
    best: str
    variants: dict[str, float]
    threads: int
    probe_bytes: int


def measure(
    machine: Machine, probe_bytes: int = PROBE_BYTES, rounds: int = ROUNDS, memory: str = MEMORY_KINDS[0]
) -> Bandwidth:
    """Read freshly written memory; variants alternate, so that noise meets all of them.

    Args:
        machine: its pool does the reading.
        probe_bytes: several times the last-level cache.
        rounds: reads per variant; the median counts.
        memory: one of `MEMORY_KINDS`.
    """
    gb_s = medians(machine, probe_memory(memory, probe_bytes), VARIANTS, rounds)
    best = max(gb_s, key=lambda name: gb_s[name])
    return Bandwidth(gb_s[best], best, gb_s, machine.threads, probe_bytes)


def medians(
    machine: Machine, data: torch.Tensor, variants: Sequence[ReadVariant], rounds: int
) -> dict[str, float]:
    """Median GB/s of each variant by its name; variants alternate."""
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for _ in range(rounds):
        for variant in variants:
            seconds[variant.name].append(variant.seconds(machine, data))
    return {name: data.nbytes / statistics.median(times) / 1e9 for name, times in seconds.items()}


def quick_gb_s(
    machine: Machine, data: torch.Tensor, variants: Iterable[ReadVariant] = QUICK_VARIANTS
) -> float:
    """The best variant of one quick probe: the limit at this moment, for rounds that alternate with it."""
    return data.nbytes / min(variant.seconds(machine, data) for variant in variants) / 1e9


def probe_memory(kind: str, nbytes: int, folder: Path | None = None) -> torch.Tensor:
    """uint8 [nbytes] of one of `MEMORY_KINDS`, written and present; freed with the tensor.

    Args:
        folder: where a mapped file is made (it is gone at once); default the system's for temporary files.

    Raises:
        ValueError: an unknown kind.
        OSError: the file cannot be written.
    """
    if kind not in MEMORY_KINDS:
        raise ValueError(f"there is no memory {kind!r}; there are {', '.join(MEMORY_KINDS)}")
    if kind == "mapped file":
        return _mapped_file(nbytes, folder)
    room = mmap.mmap(-1, nbytes)
    room.madvise(mmap.MADV_HUGEPAGE if kind == "anonymous huge" else mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(room, dtype=torch.uint8).fill_(1)


def _mapped_file(nbytes: int, folder: Path | None) -> torch.Tensor:
    piece = bytes(range(1, 256)) * (1 << 12)
    with tempfile.TemporaryFile(dir=folder) as file:
        for start in range(0, nbytes, len(piece)):
            file.write(piece[: nbytes - start])
        file.flush()
        room = mmap.mmap(file.fileno(), nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    with warnings.catch_warnings():
        # Nobody writes to it.
        warnings.filterwarnings("ignore", message="The given buffer is not writ")
        data = torch.frombuffer(room, dtype=torch.uint8)
    data[::4096].sum()  # maps every page
    return data
