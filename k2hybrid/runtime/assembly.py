"""A network from a checkpoint folder: experts to the hand-off, every other tensor to its layer. Layer 5."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from k2hybrid.cache.pages import LatentPages
from k2hybrid.checkpoint.loader import Checkpoint, open_checkpoint
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.config import DenseWeights
from k2hybrid.model.kimi import Kimi
from k2hybrid.model.layers import LinearKernels
from k2hybrid.model.paged import PagedDecode
from k2hybrid.runtime.dense8 import Dense8Weights
from k2hybrid.runtime.device_weights import DeviceWeights
from k2hybrid.runtime.experts import Experts
from k2hybrid.types import RoutedExperts, WeightSource


class Parts(NamedTuple):
    """What the network reads and multiplies with: what a caller may put a meter around."""

    weights: WeightSource
    experts: RoutedExperts
    kernels: LinearKernels


def assemble(
    folder: Path,
    spec: ModelSpec,
    kernels: LinearKernels,
    experts: Experts,
    pages: LatentPages,
    *,
    latent_norm_eps: float,
    dense_weights: DenseWeights = "bf16",
    device: torch.device | None = None,
    decode: PagedDecode | None = None,
    metered: Callable[[Parts], Parts],
) -> tuple[Checkpoint, Kimi]:
    """Map the checkpoint and build the network over it. The caller closes the checkpoint, the network first.

    Args:
        experts: takes the routed experts, and is opened when it has them all.
        dense_weights: all but bf16 are made here, one at a time.
        device: where dense weights go, the embedding apart; None: they stay where they are.
        decode: see `Kimi`.
        metered: is given the parts, and returns those that the network is to use.

    Raises:
        CheckpointError: the folder cannot be used, a tensor was not used exactly once, or what 8-bit weights
            are made from is not finite or was lost meanwhile.
        NativeError: the memory for experts cannot be had.
    """
    with ExitStack() as opened:  # closes the checkpoint if a later part fails
        checkpoint = opened.enter_context(open_checkpoint(folder, experts.sink))
        weights: WeightSource = checkpoint
        if dense_weights != "bf16":
            weights = Dense8Weights(checkpoint, dense_weights)
        if device is not None:
            weights = DeviceWeights(weights, device, checkpoint.let_go)
        parts = metered(Parts(weights, experts.routed, kernels))
        network = Kimi(
            spec,
            parts.weights,
            parts.experts,
            parts.kernels,
            pages,
            latent_norm_eps=latent_norm_eps,
            decode=decode,
        )
        checkpoint.close_ledger()
        experts.open(checkpoint)
        opened.pop_all()
    return checkpoint, network
