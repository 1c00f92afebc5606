"""Starting weights that make copying easy to find.

Copying in a transformer needs heads that look a few tokens back and, above them, heads that repeat what
they look at. Found by chance this takes millions of tokens. Here training starts near it and is free to
leave: embeddings share one constant direction, from which five heads of the first layer take fixed rotary
queries and keys that meet one to five tokens apart; the heads of the upper layers start with an
output map that is the transpose of their value map; and the head of the model starts as the embeddings.
"""

from __future__ import annotations

import math

import torch

from tools.mini.guidance import HEADS
from tools.mini.model import Attention, MiniModel

_CONSTANT_RMS = 0.25
_TOKEN_STD = 0.45
# Scores of a perfect match on the rotary pairs, fastest first: together they tell one step from any other.
_PAIR_SCORES = (10.0, 6.0, 4.0, 2.0)
# How many tokens back the first heads of the first layer look; the rest are free.
_STEPS_BACK = (1, 2, 3, 4, 5)
_FIRST_COPIER = 2


@torch.no_grad()
def start_near_copying(model: MiniModel) -> None:
    """Overwrite some of the random starting weights of `model`, drawing from torch's global generator."""
    config = model.config
    tokens = torch.randn(config.vocab_size, config.hidden_size) * _TOKEN_STD
    constant = torch.randn(config.hidden_size).sign() * _CONSTANT_RMS
    model.embed_tokens.copy_(tokens + constant)
    model.lm_head.weight.copy_(tokens * (2.0 / math.sqrt(config.hidden_size)))
    # The constant's share of a normalized row, along its unit vector.
    seen = math.sqrt(config.hidden_size) * _CONSTANT_RMS / math.hypot(_TOKEN_STD, _CONSTANT_RMS)
    _look_back(model.blocks[0].self_attn, constant / constant.norm(), seen, model.inv_freq)
    for layer in model.blocks[_FIRST_COPIER:]:
        _repeat_what_is_seen(layer.self_attn)
    index, first, end = HEADS["copy"]
    size = config.v_head_dim
    model.blocks[index].self_attn.o_proj.weight[:, first * size : end * size] *= 6


def _look_back(attention: Attention, unit: torch.Tensor, seen: float, inv_freq: torch.Tensor) -> None:
    """Fixed rotary keys, and for some heads fixed rotary queries turned by some tokens against them."""
    c = attention.config
    sizes = torch.tensor(_PAIR_SCORES).div(attention.scale).sqrt()
    n = len(sizes)
    keys = torch.zeros(c.qk_rope_head_dim)
    keys[: 2 * n : 2] = sizes
    rotary_rows = attention.kv_a_proj_with_mqa.weight[c.kv_lora_rank :]
    rotary_rows.mul_(0.2).add_(torch.outer(keys, unit) / seen)
    # One latent carries the constant to the queries; 1.5 times a random row, before the latent norm.
    attention.q_a_proj.weight[0] = 1.5 * unit
    carried = 1.5 * seen
    carried /= math.sqrt((c.q_lora_rank - 1 + carried**2) / c.q_lora_rank)
    per_head = attention.q_b_proj.weight.view(c.num_attention_heads, -1, c.q_lora_rank)
    for head, steps in enumerate(_STEPS_BACK):
        turned = torch.zeros(c.qk_rope_head_dim)
        turned[: 2 * n : 2] = sizes * (steps * inv_freq[:n]).cos()
        turned[1 : 2 * n : 2] = -sizes * (steps * inv_freq[:n]).sin()
        per_head[head, c.qk_nope_head_dim :, 0] = turned / carried


def _repeat_what_is_seen(attention: Attention, gain: float = 0.3) -> None:
    c = attention.config
    latent = attention.kv_a_proj_with_mqa.weight[: c.kv_lora_rank]
    per_head = attention.kv_b_proj.weight.view(c.num_attention_heads, -1, c.kv_lora_rank)
    values = per_head[:, c.qk_nope_head_dim :] @ latent
    attention.o_proj.weight.copy_(gain * values.flatten(0, 1).t())
