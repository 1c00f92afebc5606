"""Rope and YaRN against the numbers of Kimi-K2, and against a rotation by hand."""

from __future__ import annotations

import math

import pytest
import torch

from k2hybrid.checkpoint.spec import ModelSpec, Yarn
from k2hybrid.model.rope import Rope, Rotation, inverse_frequencies, rotate, rotation_scale, softmax_scale
from tests.golden_model.tiny import YARN, config

KIMI = Yarn(
    factor=64.0, original_max_positions=4096, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0
)


def with_beta_fast(beta: float) -> Yarn:
    return Yarn(
        KIMI.factor, KIMI.original_max_positions, beta, KIMI.beta_slow, KIMI.mscale, KIMI.mscale_all_dim
    )


@pytest.mark.parametrize(
    ("beta_fast", "pair", "value"),
    [
        (1.0, 0, 1.0),
        (1.0, 1, 0.713111085),
        (1.0, 19, 0.00162175991),
        (1.0, 20, 1.80702339e-05),
        (1.0, 31, 4.38220646e-07),
        (32.0, 8, 50000 ** (-16 / 64)),
        (32.0, 9, 0.043776656),
        (32.0, 10, 0.0284279591),
        (32.0, 15, 0.00267020339),
        (32.0, 19, 0.000158374991),
        (32.0, 20, 1.80702339e-05),
    ],
)
def test_frequencies_of_kimi_k2(beta_fast: float, pair: int, value: float) -> None:
    assert inverse_frequencies(64, 50000.0, with_beta_fast(beta_fast))[pair].item() == pytest.approx(
        value, rel=3e-7
    )


def test_without_yarn_frequencies_are_powers_of_theta() -> None:
    assert inverse_frequencies(8, 10000.0, None).tolist() == pytest.approx([1, 0.1, 0.01, 0.001])


def test_a_ramp_of_no_width_is_a_step() -> None:
    # No pair turns once within 6 positions, so the ramp's two ends are both clamped to 0.
    plain = inverse_frequencies(8, 50000.0, None)
    stepped = inverse_frequencies(8, 50000.0, Yarn(4.0, 6, 1.0, 1.0, 1.0, 1.0))
    assert stepped.tolist() == pytest.approx([plain[0].item(), *(plain[1:] / 4).tolist()])


def test_softmax_scale_of_kimi_k2() -> None:
    spec = ModelSpec.from_config(
        config(
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            rope_scaling={**YARN, "original_max_position_embeddings": 4096},
        )
    )
    assert softmax_scale(spec) == pytest.approx(0.14467962580268923, rel=1e-15)
    assert Rope(spec).scale == 1.0


def test_cos_and_sin_are_scaled_where_the_mscales_differ() -> None:
    yarn = Yarn(40.0, 4096, 32.0, 1.0, 1.0, 0.707)
    expected = (0.1 * math.log(40.0) + 1) / (0.0707 * math.log(40.0) + 1)
    assert rotation_scale(yarn) == pytest.approx(expected)
    assert rotation_scale(None) == 1.0


def test_adjacent_pairs_turn_together() -> None:
    angles = torch.tensor([[[math.pi / 2, math.pi]]])
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    turned = rotate(x, Rotation(angles.cos(), angles.sin()))
    assert torch.allclose(turned, torch.tensor([[[-2.0, 1.0, -3.0, -4.0]]]), atol=1e-6)


def test_angles_stay_exact_at_the_end_of_the_context() -> None:
    rope = Rope(ModelSpec.from_config(config(rope_scaling=None)))
    position = 262_143
    rotation = rope.at(torch.tensor([position]))
    assert rotation.cos[0, 0, 0].item() == pytest.approx(math.cos(position), abs=1e-7)
    assert rotation.sin[0, 0, 0].item() == pytest.approx(math.sin(position), abs=1e-7)
