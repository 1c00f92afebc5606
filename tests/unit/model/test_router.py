"""The router's choice and weights, each rule on numbers small enough to check by eye."""

from __future__ import annotations

import pytest
import torch

from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.model.layers import TorchLinears
from k2hybrid.model.router import Router, choose, weigh
from k2hybrid.native.machine import Machine
from tests.golden_model.tiny import config


def spec(**overrides: object) -> ModelSpec:
    values = {"n_routed_experts": 6, "num_experts_per_tok": 2, "routed_scaling_factor": 2.0}
    return ModelSpec.from_config(config(**{**values, **overrides}))


SCORES = torch.tensor([[0.1, 0.9, 0.5, 0.4, 0.8, 0.3]])
NO_BIAS = torch.zeros(6)


def test_the_best_scores_are_chosen() -> None:
    assert choose(SCORES, NO_BIAS, spec()).tolist() == [[1, 4]]


def test_the_bias_decides_the_choice_and_leaves_the_weights() -> None:
    bias = torch.tensor([1.0, 0, 0, 0, 0, 0])
    ids = choose(SCORES, bias, spec())
    assert ids.tolist() == [[0, 1]]
    assert weigh(SCORES, ids, spec())[0].tolist() == pytest.approx([2 * 0.1 / 1.0, 2 * 0.9 / 1.0])


def test_weights_are_not_normalised_unless_asked() -> None:
    ids = torch.tensor([[1, 4]])
    assert weigh(SCORES, ids, spec(norm_topk_prob=False))[0].tolist() == pytest.approx([1.8, 1.6])


def test_equal_scores_go_to_the_lower_id() -> None:
    ties = torch.full((3, 6), 0.5)
    assert choose(ties, NO_BIAS, spec()).tolist() == [[0, 1]] * 3


def test_only_the_best_groups_take_part() -> None:
    # Groups of two: sums of the best two 1.0, 0.9, 1.1. Expert 3 of the closed group would have been second.
    scores = torch.tensor([[0.9, 0.1, 0.05, 0.85, 0.6, 0.5]])
    grouped = spec(n_group=3, topk_group=2)
    assert choose(scores, NO_BIAS, grouped).tolist() == [[0, 4]]
    assert choose(scores, NO_BIAS, spec()).tolist() == [[0, 3]]


@pytest.mark.parametrize("overrides", [{}, {"norm_topk_prob": False}, {"n_group": 3, "topk_group": 2}])
def test_kernels_choose_as_torch_does(overrides: dict[str, object]) -> None:
    random = torch.Generator().manual_seed(5)
    weight = torch.randn(6, 64, generator=random).bfloat16()
    bias = torch.randn(6, generator=random) * 0.1
    x = torch.randn(200, 64, generator=random).bfloat16()
    ours, reference = (
        Router(spec(**overrides), kernels, weight, bias)(x, [slice(None)])
        for kernels in (Machine(1), TorchLinears())
    )
    assert ours.ids.dtype == reference.ids.dtype == torch.int32
    assert torch.equal(ours.ids, reference.ids)
    torch.testing.assert_close(ours.weights, reference.weights, rtol=1e-5, atol=1e-6)


def test_a_row_does_not_depend_on_the_others() -> None:
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 64, generator=random)
    x = torch.randn(9, 64, generator=random)
    router = Router(spec(), TorchLinears(), weight, NO_BIAS)
    together = router(x, [slice(i, i + 1) for i in range(9)])
    for i in range(9):
        alone = router(x[i : i + 1], [slice(0, 1)])
        assert torch.equal(alone.ids, together.ids[i : i + 1])
        assert torch.allclose(alone.weights, together.weights[i : i + 1], rtol=1e-6, atol=0)
