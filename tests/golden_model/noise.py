"""What rounding to bf16 may cost: the fp32 model with random errors where the bf16 model rounds.

The bound of docs/numerics.md, "The model": every activation that a linear or attention's scores read, and
every stored latent, is disturbed by a relative error drawn uniformly from ±2⁻⁸, the largest error of one
rounding to bf16; latents stored as FP8 by ±2⁻⁴ besides. The root mean square over some draws, times `SAFETY`,
bounds the real error.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from k2hybrid.cache.rows import Fp32Rows
from k2hybrid.experts.reference import ReferenceExperts
from k2hybrid.model.layers import Linear, TorchLinears
from tests.golden_model.tiny import TinyCheckpoint, TinyModel, tiny_model

UNIT_ROUNDOFF = 2.0**-8
E4M3_ROUNDOFF = 2.0**-4
SAFETY = 2.0


class Disturbance:
    """Multiplies with 1 + δ, δ uniform in ±`roundoff`, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed)

    def __call__(self, x: torch.Tensor, roundoff: float = UNIT_ROUNDOFF) -> torch.Tensor:
        delta = torch.rand(x.shape, generator=self._random) * 2 - 1
        return x.float() * (1 + roundoff * delta)


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
    """Latent rows disturbed when stored; with `fp8`, the latent part once more, by e4m3's error."""

    def __init__(self, latent: int, rope: int, disturb: Disturbance, *, fp8: bool) -> None:
        super().__init__(latent + rope)
        self.latent = latent if fp8 else 0
        self.disturb = disturb

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        rows = self.disturb(rows)
        if self.latent:
            rows[:, : self.latent] = self.disturb(rows[:, : self.latent], E4M3_ROUNDOFF)
        return super().encode(rows)


class DisturbedExperts(ReferenceExperts):
    """Input and SwiGLU output of every expert disturbed."""

    def __init__(self, disturb: Disturbance) -> None:
        super().__init__(torch.float32)
        self.disturb = disturb

    def expert(self, layer: int, expert: int, x: torch.Tensor) -> torch.Tensor:
        return super().expert(layer, expert, self.disturb(x))

    def round(self, h: torch.Tensor) -> torch.Tensor:
        return self.disturb(h)


def disturbed_model(checkpoint: TinyCheckpoint, seed: int, rows: str = "bf16") -> TinyModel:
    """One draw of the fp32 model with errors of the size of bf16's, and of what `rows` add."""
    disturb = Disturbance(seed)
    experts = DisturbedExperts(disturb)
    checkpoint.fill(experts)
    spec = checkpoint.spec
    stored = DisturbedRows(spec.kv_lora_rank, spec.qk_rope_head_dim, disturb, fp8=rows == "fp8")
    kernels = DisturbedLinears(disturb)
    model = tiny_model(checkpoint, torch.float32, kernels=kernels, experts=experts, rows=stored)
    for layer in model.model.layers:
        attention = layer.attention
        attention.groups = [
            replace(group, kv_b=DisturbedKeysAndValues(kernels, group.kv_b.weight))
            for group in attention.groups
        ]
    return model
