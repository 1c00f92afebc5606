"""Muon for matrices, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tools.mini.model import MiniModel, native_dtype


@torch.no_grad()
def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Newton–Schulz towards the nearest semi-orthogonal matrix; [..., m, n], any batch."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.to(native_dtype())
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True).to(x.dtype) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = (x.mT if tall else x).float()
    return result


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalized, scaled so that its root mean square is that of an AdamW update (0.2)."""

    def __init__(
        self, params: Iterable[Any], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "stacked": 1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].mul_(group["momentum"]).add_(p.grad)
                update = p.grad.add(state["momentum"], alpha=group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                # Matrices stacked along their rows (gate and up of an expert) are orthogonalized one by one.
                parts = update.unflatten(-2, (group["stacked"], -1))
                step = orthogonalize(parts).flatten(-3, -2)
                p.add_(step, alpha=-group["lr"] * 0.2 * max(parts.shape[-2:]) ** 0.5)


def make_optimizers(model: MiniModel, lr: float) -> list[torch.optim.Optimizer]:
    """Hidden matrices go to Muon; embeddings, head, router and norms to AdamW."""
    hidden, gate_up, rest = [], [], []
    for name, p in model.named_parameters():
        if name in ("embed_tokens", "lm_head.weight"):
            continue
        if p.ndim < 2 or name.endswith("mlp.gate"):
            rest.append(p)
        elif name.endswith("gate_up_proj"):
            gate_up.append(p)
        else:
            hidden.append(p)
    return [
        Muon([{"params": hidden}, {"params": gate_up, "stacked": 2}], lr=lr, weight_decay=0.05),
        torch.optim.AdamW(
            [
                {"params": [model.embed_tokens], "weight_decay": 0.01, "share": 1.0},
                {"params": [model.lm_head.weight], "weight_decay": 0.01, "share": 0.3},
                {"params": rest, "weight_decay": 0.0, "share": 1.0},
            ],
            lr=lr, betas=(0.9, 0.98), eps=1e-10,
        ),
    ]  # fmt: skip
