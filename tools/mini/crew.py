"""Several processes train one model: each its own lessons on its own core, one mean of the gradients.

Small matrices keep one core busy and two waiting for each other, so two processes of one thread are
faster than one of two.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


class Crew:
    """This process's place among those that train together; the first one leads."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @staticmethod
    def start(size: int) -> Crew:
        """Fork `size` − 1 further processes. They end with the leader; a signal to end is for the leader."""
        if size == 1:
            return Crew()
        folder = tempfile.mkdtemp(prefix="k2hybrid-crew-")
        rank = 0
        for other in range(1, size):
            if os.fork() == 0:
                rank = other
                break
        if rank:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
        return Crew(rank, size)

    @property
    def leads(self) -> bool:
        """Whether this process logs, probes and saves the model."""
        return self.rank == 0

    def mean(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over the crew."""
        if self.size == 1:
            return
        parts = list(tensors)
        flat = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(flat)
        flat /= self.size
        for part, mean in zip(parts, torch.split(flat, [part.numel() for part in parts]), strict=True):
            part.copy_(mean.view_as(part))

    def told(self, value: int) -> int:
        """The leader's `value`."""
        if self.size == 1:
            return value
        said = torch.tensor([value])
        dist.broadcast(said, 0)
        return int(said)
