"""Work on torch's current stream, captured once as a CUDA graph and launched again. Layer 1."""

from __future__ import annotations

from collections.abc import Callable

import torch


class GraphRecorder:
    """Captures into one memory pool: of graphs that never run at the same time, one's memory serves all."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture `work`, whose kernels have run before; the result launches it on the current stream."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile: pages are copied in the background.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        return graph.replay
