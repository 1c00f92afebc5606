"""The machine's read bandwidth: the limit that every figure is held against.

A probe reads a buffer far larger than the caches with all threads of the pool, in several variants (striped
or one stretch per thread, with and without software prefetch). The best variant's median is the limit: a
kernel that beats it would only show that the probe was poor.
"""

from __future__ import annotations

import mmap
import statistics
from dataclasses import dataclass

import torch

from k2hybrid.native import Machine

PROBE_BYTES = 1 << 30
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Median GB/s (10⁹ bytes) of every variant, and the best."""

    gb_s: float
    best: str
    variants: dict[str, float]
    threads: int
    probe_bytes: int


def measure(machine: Machine, probe_bytes: int = PROBE_BYTES, rounds: int = ROUNDS) -> Bandwidth:
    """Read a freshly written anonymous buffer; variants alternate, so that noise meets all of them.

    Args:
        machine: its pool does the reading.
        probe_bytes: several times the last-level cache.
        rounds: reads per variant; the median counts.
    """
    room = mmap.mmap(-1, probe_bytes)
    room.madvise(mmap.MADV_HUGEPAGE)
    data = torch.frombuffer(room, dtype=torch.uint8)
    data.fill_(1)
    stretch = -(-probe_bytes // machine.threads // 4096) * 4096
    variants = {
        f"{name}, prefetch {ahead >> 10} KB": (stripe, ahead)
        for name, stripe in (("128 KB stripes", 128 << 10), ("one stretch a thread", stretch))
        for ahead in (0, 2048, 4096)
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, (stripe, ahead) in variants.items():
            seconds[name].append(machine.read_seconds(data, stripe, ahead))
    gb_s = {name: probe_bytes / statistics.median(times) / 1e9 for name, times in seconds.items()}
    best = max(gb_s, key=lambda name: gb_s[name])
    return Bandwidth(gb_s[best], best, gb_s, machine.threads, probe_bytes)
