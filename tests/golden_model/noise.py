"""What rounding to bf16 may cost: the fp32 model with random errors where the bf16 model rounds.

The bound of docs/numerics.md, "The model": every activation that a linear or attention's scores read, and
every stored latent, is disturbed by a relative error drawn uniformly from ±2⁻⁸, the largest error of one
rounding to bf16. The root mean square over some draws, times `SAFETY`, bounds the real error.
"""

from __future__ import annotations

import torch

from k2hybrid.cache.pages import Fp32Rows
from k2hybrid.experts.reference import ReferenceExperts
from k2hybrid.model.layers import Linear, TorchLinears
from tests.golden_model.tiny import TinyCheckpoint, TinyModel, tiny_model

UNIT_ROUNDOFF = 2.0**-8
SAFETY = 2.0


class Disturbance:
    """Multiplies with 1 + δ, δ uniform in ±UNIT_ROUNDOFF, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        delta = torch.rand(x.shape, generator=self._random) * 2 - 1
        return x.float() * (1 + UNIT_ROUNDOFF * delta)


class DisturbedLinears(TorchLinears):
    """Torch products of disturbed activations."""

    def __init__(self, disturb: Disturbance) -> None:
        self.disturb = disturb

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return super().linear(self.disturb(x), weight)

    def head_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return super().head_linear(self.disturb(x), weight)

    def head_linear_t(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return super().head_linear_t(self.disturb(x), weight)


class DisturbedKeysAndValues(Linear):
    """kv_b of the expanded form, whose results are rounded: attention reads them."""

    def __init__(self, kernels: DisturbedLinears, weight: torch.Tensor) -> None:
        super().__init__(kernels, weight)
        self.disturb = kernels.disturb

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.disturb(super().__call__(x))


class DisturbedRows(Fp32Rows):
    """Latent rows disturbed when stored."""

    def __init__(self, latent_dim: int, disturb: Disturbance) -> None:
        super().__init__(latent_dim)
        self.disturb = disturb

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        return super().encode(self.disturb(rows))


class DisturbedExperts(ReferenceExperts):
    """Input and SwiGLU output of every expert disturbed."""

    def __init__(self, disturb: Disturbance) -> None:
        super().__init__(torch.float32)
        self.disturb = disturb

    def expert(self, layer: int, expert: int, x: torch.Tensor) -> torch.Tensor:
        return super().expert(layer, expert, self.disturb(x))

    def round(self, h: torch.Tensor) -> torch.Tensor:
        return self.disturb(h)


def disturbed_model(checkpoint: TinyCheckpoint, seed: int) -> TinyModel:
    """One draw of the fp32 model with errors of the size of bf16's."""
    disturb = Disturbance(seed)
    experts = DisturbedExperts(disturb)
    checkpoint.fill(experts)
    rows = DisturbedRows(checkpoint.spec.latent_dim, disturb)
    kernels = DisturbedLinears(disturb)
    model = tiny_model(checkpoint, torch.float32, kernels=kernels, experts=experts, rows=rows)
    for layer in model.model.layers:
        layer.attention.kv_b = DisturbedKeysAndValues(kernels, layer.attention.kv_b.weight)
    return model
