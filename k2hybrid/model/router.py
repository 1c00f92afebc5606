"""The router: sigmoid scores in fp32, a correction bias that decides the choice but not the weights.

Source: DeepSeek-V3 (arXiv 2412.19437, §2.1.2, "noaux_tc"): the bias balances load; the sum is weighed by the
unbiased scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.model.layers import Linear, LinearKernels, row_kernels, span_by_span
from k2hybrid.native.rows import MOST_CHOSEN


@dataclass(frozen=True, slots=True)
class Routing:
    """Chosen experts of each row, best first: ids int32 [T, top_k], weights fp32 [T, top_k]."""

    ids: torch.Tensor
    weights: torch.Tensor


def choose(scores: torch.Tensor, bias: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    """The top_k experts of each row by score + bias, int64 [T, top_k]; equal scores go to the lower id.

    With groups, only the `topk_group` groups whose two best experts have the largest sum take part.
    """
    biased = scores + bias
    if spec.n_group > 1:
        groups = biased.view(-1, spec.n_group, spec.num_experts // spec.n_group)
        best_two = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)
        kept = best(best_two, spec.topk_group)
        closed = torch.ones_like(best_two, dtype=torch.bool).scatter_(1, kept, False)
        biased = groups.masked_fill(closed[..., None], -torch.inf).flatten(1)
    return best(biased, spec.top_k)


def best(values: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the `count` greatest of each row, int64 [T, count], best first; of equal ones the lower."""
    # Not topk: which of two equal entries it takes is unspecified.
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def weigh(scores: torch.Tensor, ids: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    """The weights of the chosen experts, fp32 [T, top_k], from the unbiased scores."""
    return scaled(scores.gather(1, ids), normalize=spec.norm_topk_prob, scale=spec.routed_scaling_factor)


def scaled(weights: torch.Tensor, *, normalize: bool, scale: float) -> torch.Tensor:
    """Scores of chosen experts [T, top_k], divided by their sum if `normalize`, times `scale`."""
    if normalize:
        # cumsum adds one after the other, in the same order however many rows there are; sum need not.
        weights = weights / (weights.cumsum(-1)[:, -1:] + 1e-20)
    return weights * scale


class Router:
    """weight [experts, hidden], bias fp32 [experts]."""

    def __init__(
        self, spec: ModelSpec, kernels: LinearKernels, weight: torch.Tensor, bias: torch.Tensor
    ) -> None:
        self.spec = spec
        self.linear = Linear(kernels, weight)
        self.bias = bias.float().contiguous()
        few = spec.n_group == 1 and spec.top_k <= MOST_CHOSEN
        self.rows = row_kernels(kernels, weight.dtype) if few else None

    def __call__(self, x: torch.Tensor, rows: Sequence[slice]) -> Routing:
        """x [T, hidden], the rows of each span -> Routing. bf16 products are exact in fp32."""
        logits = self.linear(x)
        if self.rows is not None:
            spec = self.spec
            return Routing(
                *self.rows.choose(
                    logits,
                    self.bias,
                    spec.top_k,
                    normalize=spec.norm_topk_prob,
                    scale=spec.routed_scaling_factor,
                )
            )
        scores = span_by_span(torch.sigmoid_, logits, rows)
        ids = choose(scores, self.bias, self.spec)
        return Routing(ids.to(torch.int32), weigh(scores, ids, self.spec))
