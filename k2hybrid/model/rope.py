"""Rotary position embedding with YaRN's frequency ramp, as DeepSeek-V3 and Kimi-K2 use it.

Sources: Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models" (arXiv 2309.00071);
the numbers of Kimi-K2 are checked in tests/unit/model/test_rope.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from k2hybrid.checkpoint.spec import ModelSpec, Yarn


def yarn_mscale(factor: float, mscale: float) -> float:
    """How much attention is sharpened for `factor` times the context: 0.1 · mscale · ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def softmax_scale(spec: ModelSpec) -> float:
    """What scores are multiplied with: qk_head_dim^-1/2, times the squared mscale of all dimensions."""
    scale = 1.0 / math.sqrt(spec.qk_head_dim)
    if spec.yarn is not None and spec.yarn.mscale_all_dim:
        scale *= yarn_mscale(spec.yarn.factor, spec.yarn.mscale_all_dim) ** 2
    return scale


def rotation_scale(yarn: Yarn | None) -> float:
    """What cos and sin are multiplied with; 1 where mscale equals mscale_all_dim, as in Kimi-K2."""
    if yarn is None:
        return 1.0
    return yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)


def inverse_frequencies(dim: int, theta: float, yarn: Yarn | None) -> torch.Tensor:
    """Radians per position of each pair, float64 [dim/2].

    YaRN leaves pairs that turn more than beta_fast times within the original context as they are, slows those
    that turn less than beta_slow times by `factor`, and blends linearly in between.
    """
    pairs = torch.arange(dim // 2, dtype=torch.float64)
    plain = theta ** (-2.0 * pairs / dim)
    if yarn is None:
        return plain

    def pair_with_turns(turns: float) -> float:
        return dim * math.log(yarn.original_max_positions / (turns * 2.0 * math.pi)) / (2.0 * math.log(theta))

    low = max(math.floor(pair_with_turns(yarn.beta_fast)), 0)
    high: float = min(math.ceil(pair_with_turns(yarn.beta_slow)), dim - 1)
    if low == high:
        high += 0.001  # the modelling code's guard against a ramp of width 0
    slowed = ((pairs - low) / (high - low)).clamp(0.0, 1.0)
    return plain * (1.0 - slowed) + plain / yarn.factor * slowed


@dataclass(frozen=True, slots=True)
class Rotation:
    """cos and sin of some rows' angles, fp32 [T, 1, dim/2]; the middle axis broadcasts over heads."""

    cos: torch.Tensor
    sin: torch.Tensor


class Rope:
    """Angles for any position. Nothing is tabulated: a batch's angles are computed once, for all layers."""

    def __init__(self, spec: ModelSpec) -> None:
        self.inv_freq = inverse_frequencies(spec.qk_rope_head_dim, spec.rope_theta, spec.yarn)
        self.scale = rotation_scale(spec.yarn)

    def at(self, positions: torch.Tensor) -> Rotation:
        """Rotation of rows at `positions` int64 [T]; float64 up to the angle, since positions reach 2^18."""
        angles = positions.to(torch.float64)[:, None, None] * self.inv_freq.to(positions.device)
        return Rotation(
            (angles.cos() * self.scale).to(torch.float32), (angles.sin() * self.scale).to(torch.float32)
        )


def rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """x fp32 [T, heads, dim] of adjacent pairs (x0, x1), (x2, x3), … -> the same layout, rotated."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = rotation.cos, rotation.sin
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
