"""Plain multinomial sampling at temperature 1 from the trainer's model, many seeds of one prompt at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.mini.model import MiniModel


@torch.no_grad()
def sample(
    model: MiniModel, prompt: list[int], stop_id: int, *, seeds: int, max_new: int = 160, first_seed: int = 0
) -> list[list[int]]:
    """One continuation a seed, without the stop token; no top-p, no top-k, temperature 1."""
    generator = torch.Generator().manual_seed(first_seed)
    caches = [_Cache() for _ in model.blocks]
    logits = _advance(model, torch.tensor(prompt), torch.arange(len(prompt)), caches, rows=1)[-1:].expand(
        seeds, -1
    )
    outs: list[list[int]] = [[] for _ in range(seeds)]
    alive = list(range(seeds))
    for cache in caches:
        cache.repeat(seeds)
    for at in range(max_new):
        chosen = torch.multinomial(logits.float().softmax(-1), 1, generator=generator).squeeze(1)
        keep = [i for i, token in enumerate(chosen.tolist()) if token != stop_id]
        for i in keep:
            outs[alive[i]].append(int(chosen[i]))
        if not keep:
            break
        if len(keep) < len(alive):
            for cache in caches:
                cache.select(keep)
            chosen, alive = chosen[keep], [alive[i] for i in keep]
        positions = torch.full((len(alive),), len(prompt) + at)
        logits = _advance(model, chosen, positions, caches, rows=len(alive))
    return outs


class _Cache:
    """Keys and values [rows, heads, T, size] of one layer."""

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k = k if self.k is None else torch.cat((self.k, k), 2)
        self.v = v if self.v is None else torch.cat((self.v, v), 2)
        return self.k, self.v

    def repeat(self, rows: int) -> None:
        if self.k is not None and self.v is not None:
            self.k, self.v = self.k.expand(rows, -1, -1, -1), self.v.expand(rows, -1, -1, -1)

    def select(self, rows: list[int]) -> None:
        if self.k is not None and self.v is not None:
            self.k, self.v = self.k[rows], self.v[rows]


def _advance(model: MiniModel, ids: Tensor, positions: Tensor, caches: list[_Cache], rows: int) -> Tensor:
    """Logits of the new tokens: one row of many tokens (the prompt) or many rows of one token."""
    cos, sin = model.rotation(positions)
    x = F.embedding(ids, model.embed_tokens)
    for layer, cache in zip(model.blocks, caches, strict=True):
        q, k, v = layer.self_attn.project(layer.input_layernorm(x), cos, sin)
        if rows == 1:
            q, k, v = (t.unsqueeze(0) for t in (q, k, v))
        else:
            q, k, v = (t.transpose(0, 1).unsqueeze(2) for t in (q, k, v))
        k, v = cache.extend(k, v)
        scores = q @ k.transpose(-1, -2) * layer.self_attn.scale
        if q.shape[2] > 1:
            scores = scores + torch.full(scores.shape[-2:], float("-inf")).triu(1).to(scores.dtype)
        out = scores.float().softmax(-1).to(v.dtype) @ v
        out = out.transpose(1, 2).reshape(len(ids), -1)
        x = x + layer.self_attn.o_proj(out)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    logits: Tensor = model.lm_head(model.norm(x))
    return logits
