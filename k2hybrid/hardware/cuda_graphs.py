"""Work on torch's current stream, captured once as a CUDA graph and launched again. Layer 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


class GraphRecorder:
    """Captures into one memory pool: of graphs that never run at the same time, one's memory serves all."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture `work`, whose kernels have run before; the result launches it on the current stream."""
        graph = torch.cuda.CUDAGraph()
        with captured(graph, self._pool):
            work()
        return graph.replay


# torch's allocators keep a pointer to a graph of whose capture's end they were not told.
_unended: list[torch.cuda.CUDAGraph] = []


@contextmanager
def captured(graph: torch.cuda.CUDAGraph, pool: Any = None) -> Iterator[None]:
    """Capture into `graph` what is put on the current stream within.

    Whatever fails, the thread has its stream back, and the error is the first one. torch's own context ends
    the capture first; where the driver refuses that, it leaves the thread on the capture's stream, and raises
    what the driver says of the end in place of what went wrong before.
    """
    stream = torch.cuda.current_stream()
    first: BaseException | None = None
    try:
        # Other threads may use the device meanwhile: pages are copied in the background.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            try:
                yield
            except BaseException as error:
                first = error
                raise
    except BaseException as error:
        if error is first:  # the capture was ended
            raise
        _abandon(graph, pool)
        if first is None:
            raise
        first.add_note(f"the capture that this was part of ended with: {error}")
        raise first from None
    finally:
        torch.cuda.set_stream(stream)


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """Tell the allocator, as torch does at the end of a capture, but not of one that the driver broke off."""
    _unended.append(graph)
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    if end is not None and pool is not None:
        with suppress(RuntimeError):  # it was told
            end(torch.cuda.current_device(), pool)
