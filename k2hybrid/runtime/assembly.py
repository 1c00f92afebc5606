"""A network from a checkpoint folder: experts to the hand-off, every other tensor to its layer. Layer 5."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from k2hybrid.cache.pages import LatentPages
from k2hybrid.checkpoint.loader import Checkpoint, open_checkpoint
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.experts.dispatch import Dispatcher
from k2hybrid.experts.store import ExpertStore
from k2hybrid.model.kimi import Kimi
from k2hybrid.model.layers import LinearKernels
from k2hybrid.native import Machine
from k2hybrid.types import ExpertSink, RoutedExperts, WeightSource


class Parts(NamedTuple):
    """What the network reads and multiplies with: what a caller may put a meter around."""

    weights: WeightSource
    experts: RoutedExperts
    kernels: LinearKernels


def assemble(
    folder: Path,
    spec: ModelSpec,
    machine: Machine,
    pages: LatentPages,
    *,
    portable: bool,
    max_rows: int,
    latent_norm_eps: float,
    metered: Callable[[Parts], Parts],
) -> tuple[Checkpoint, Kimi]:
    """Map the checkpoint and build the network over it. The caller closes the checkpoint, the network first.

    Args:
        portable: routed experts run through numba instead of the extension.
        max_rows: the most rows of one step.
        metered: is given the parts, and returns those that the network is to use.

    Raises:
        CheckpointError: the folder cannot be used, or a tensor was not used exactly once.
        ConfigError: `portable`, and numba is not installed.
    """
    sizes = {"experts": spec.num_experts, "hidden": spec.hidden_size, "inter": spec.moe_intermediate_size}
    sink: ExpertSink
    experts: RoutedExperts
    if portable:
        from k2hybrid.experts.portable import PortableExperts  # numba is optional, and slow to import

        sink = experts = PortableExperts(
            **sizes, max_rows=max_rows, top_k=spec.top_k, threads=machine.threads
        )
    else:
        sink = store = ExpertStore(layers=spec.num_layers, **sizes)
        experts = Dispatcher(store, machine, max_rows=max_rows, top_k=spec.top_k)
    with ExitStack() as opened:  # closes the checkpoint if a later part fails
        checkpoint = opened.enter_context(open_checkpoint(folder, sink))
        weights, routed, kernels = metered(Parts(checkpoint, experts, machine))
        network = Kimi(spec, weights, routed, kernels, pages, latent_norm_eps=latent_norm_eps)
        checkpoint.close_ledger()
        opened.pop_all()
    return checkpoint, network
