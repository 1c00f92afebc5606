"""Faults planted in the model, one by one. Each must make the comparison with the oracle fail."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from unittest import mock

import torch

from k2hybrid.checkpoint import int4
from k2hybrid.checkpoint.spec import ModelSpec, Yarn
from k2hybrid.model import mla, rope, router
from k2hybrid.model.layers import RMSNorm
from k2hybrid.model.mla import MLA
from k2hybrid.model.rope import Rotation
from tests.golden_model.tiny import TinyCheckpoint

Fault = Callable[[], AbstractContextManager[object]]

_choose, _weigh, _frequencies, _dequantize = (
    router.choose,
    router.weigh,
    rope.inverse_frequencies,
    int4.dequantize,
)


def softmax_mscale_left_out() -> AbstractContextManager[object]:
    return mock.patch.object(mla, "softmax_scale", lambda spec: spec.qk_head_dim**-0.5)


def beta_fast_as_in_the_other_checkpoint() -> AbstractContextManager[object]:
    def frequencies(dim: int, theta: float, yarn: Yarn | None) -> torch.Tensor:
        return _frequencies(dim, theta, yarn and replace(yarn, beta_fast=33.0 - yarn.beta_fast))

    return mock.patch.object(rope, "inverse_frequencies", frequencies)


def correction_bias_inside_the_weights() -> AbstractContextManager[object]:
    def choose(scores: torch.Tensor, bias: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
        scores += bias  # the scores that `weigh` will read
        return _choose(scores, torch.zeros_like(bias), spec)

    return mock.patch.object(router, "choose", choose)


def routed_scaling_factor_left_out() -> AbstractContextManager[object]:
    def weigh(scores: torch.Tensor, ids: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
        return _weigh(scores, ids, replace(spec, routed_scaling_factor=1.0))

    return mock.patch.object(router, "weigh", weigh)


def rope_over_halves() -> AbstractContextManager[object]:
    def rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        cos, sin = rotation.cos, rotation.sin
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    return mock.patch.object(mla, "rotate", rotate)


def latent_norm_over_the_rotary_part_too() -> AbstractContextManager[object]:
    def compress(self: MLA, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight = torch.cat((self.latent_norm.weight, torch.ones(self.sizes.rope)))
        row = RMSNorm(weight, self.latent_norm.eps, torch.float32)(self.kv_a(x))
        return row[:, : self.sizes.latent].to(self.dtype), row[:, self.sizes.latent :]

    return mock.patch.object(MLA, "compress", compress)


def nibbles_as_twos_complement() -> AbstractContextManager[object]:
    def dequantize(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return _dequantize(packed ^ -0x77777778, scale)  # 0x88888888: flips the top bit of each nibble

    return mock.patch("k2hybrid.experts.reference.dequantize", dequantize)


def scale_groups_shifted_by_one() -> AbstractContextManager[object]:
    def dequantize(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if scale.shape[1] > 1:
            return _dequantize(packed, scale.roll(1, dims=1))
        return _dequantize(packed, scale.roll(1, dims=0))  # one group a row: the shift meets the next row

    return mock.patch("k2hybrid.experts.reference.dequantize", dequantize)


FAULTS: tuple[Fault, ...] = (
    softmax_mscale_left_out,
    beta_fast_as_in_the_other_checkpoint,
    correction_bias_inside_the_weights,
    routed_scaling_factor_left_out,
    rope_over_halves,
    latent_norm_over_the_rotary_part_too,
    nibbles_as_twos_complement,
    scale_groups_shifted_by_one,
)


def affected(fault: Fault, checkpoint: TinyCheckpoint) -> bool:
    """Whether the fault can be seen in this model at all."""
    spec = checkpoint.spec
    if fault is softmax_mscale_left_out:
        return spec.yarn is not None and spec.yarn.mscale_all_dim > 0
    if fault is beta_fast_as_in_the_other_checkpoint:
        right = rope.Rope(spec).inv_freq
        with fault():
            return not torch.equal(rope.Rope(spec).inv_freq, right)
    if fault is correction_bias_inside_the_weights and spec.top_k == 1 and spec.norm_topk_prob:
        return False  # the one weight is 1 whatever the score
    return bool(spec.moe_layers) or fault in (rope_over_halves, latent_norm_over_the_rotary_part_too)
