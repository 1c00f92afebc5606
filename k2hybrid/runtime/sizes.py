"""What a pass over a checkpoint reads and computes: from its spec, for the engine's predictions. Layer 5."""

from __future__ import annotations

import math

from k2hybrid.checkpoint.names import dense_layer_tensors
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.engine.cost import NetworkSizes


def network_sizes(spec: ModelSpec, dense_bytes: int, row_bytes: int) -> NetworkSizes:
    """Sizes of the network that `spec` describes.

    Args:
        dense_bytes: of all weights but embedding and routed experts, as they are read.
        row_bytes: of one token in one layer of the cache.
    """
    weights = 3 * spec.hidden_size * spec.moe_intermediate_size  # gate, up, down of one expert
    moe_layers = len(spec.moe_layers)
    in_layers = (tensor for layer in range(spec.num_layers) for tensor in dense_layer_tensors(spec, layer))
    dense = sum(math.prod(tensor.shape) for tensor in in_layers) + spec.hidden_size * (1 + spec.vocab_size)
    latent = spec.latent_dim + spec.kv_lora_rank  # a score, and what it weighs, per head
    return NetworkSizes(
        layers=spec.num_layers,
        moe_layers=moe_layers,
        dense_bytes=dense_bytes,
        expert_bytes=weights // 2 + 2 * weights // spec.group_size,
        experts=spec.num_experts,
        top_k=spec.top_k,
        row_ops=dense + moe_layers * spec.top_k * weights,
        context_ops=spec.num_layers * spec.num_heads * latent,
        latent_bytes=spec.num_layers * row_bytes,
    )
