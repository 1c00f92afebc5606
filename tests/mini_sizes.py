"""Sizes of the built-in model, from its own config."""

from __future__ import annotations

from k2hybrid.checkpoint.spec import read_spec
from k2hybrid.config import MINI_MODEL

SPEC = read_spec(MINI_MODEL)
ROUTED_EXPERTS = len(SPEC.moe_layers) * SPEC.num_experts
EXPERT_BYTES = 3 * SPEC.hidden_size * SPEC.moe_intermediate_size * 9 // 16  # four bits and a scale for 32
PAGE_BYTES = SPEC.num_layers * 64 * 2 * SPEC.latent_dim  # of 64 tokens' bf16 latents
