"""What a pass over a checkpoint reads and computes: from its spec, for the engine's predictions. Layer 5."""

from __future__ import annotations

from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.engine.cost import NetworkSizes


def network_sizes(spec: ModelSpec, dense_bytes: int, row_bytes: int) -> NetworkSizes:
    """Sizes of the network that `spec` describes.

    Args:
        dense_bytes: of all weights but embedding and routed experts, as stored (bf16).
        row_bytes: of one token in one layer of the cache.
    """
    weights = 3 * spec.hidden_size * spec.moe_intermediate_size  # gate, up, down of one expert
    moe_layers = len(spec.moe_layers)
    latent = spec.latent_dim + spec.kv_lora_rank  # a score, and what it weighs, per head
    return NetworkSizes(
        layers=spec.num_layers,
        moe_layers=moe_layers,
        dense_bytes=dense_bytes,
        expert_bytes=weights // 2 + 2 * weights // spec.group_size,
        experts=spec.num_experts,
        top_k=spec.top_k,
        row_ops=dense_bytes // 2 + moe_layers * spec.top_k * weights,
        context_ops=spec.num_layers * spec.num_heads * latent,
        latent_bytes=spec.num_layers * row_bytes,
    )
