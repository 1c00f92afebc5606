"""What a pass over a checkpoint reads and computes: from its spec, for the engine's predictions. Layer 5."""

from __future__ import annotations

import math

from k2hybrid.checkpoint.names import dense_layer_tensors
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.engine.cost import DenseWeights, NetworkSizes
from k2hybrid.model.mla import attention_sizes, head_groups
from k2hybrid.model.scratch import FUSED_RATE

_NEVER = 1 << 30  # rows: more than any sequence has
_NORM = "post_attention_layernorm"  # the first of what follows attention in a layer


def network_sizes(
    spec: ModelSpec, dense_bytes: int, row_bytes: int, *, on_device: bool = False, fused: bool = False
) -> NetworkSizes:
    """Sizes of the network that `spec` describes.

    Args:
        dense_bytes: of all weights but embedding and routed experts, as they are read.
        row_bytes: of one token in one layer of the cache.
        on_device: attention runs on a device.
        fused: its expanded form is that of `model.fused`, whose operations are counted by what they take.
    """
    weights = 3 * spec.hidden_size * spec.moe_intermediate_size  # gate, up, down of one expert
    moe_layers = len(spec.moe_layers)
    head = spec.hidden_size * (1 + spec.vocab_size)
    in_layers = [_weights(spec, layer) for layer in range(spec.num_layers)]
    byte_share = dense_bytes / (head + sum(sum(parts) for parts in in_layers))  # of one weight, on average

    rate = FUSED_RATE if fused else 1.0

    def dense(count: int) -> DenseWeights:
        return DenseWeights(round(count * byte_share), count)

    return NetworkSizes(
        layers=spec.num_layers,
        moe_layers=moe_layers,
        attention=dense(in_layers[0][0]),
        mlp=dense(in_layers[0][1] if moe_layers < spec.num_layers else 0),
        shared=dense(in_layers[-1][1] if moe_layers else 0),
        head=dense(head),
        expert=DenseWeights(weights // 2 + 2 * weights // spec.group_size, weights),
        experts=spec.num_experts,
        top_k=spec.top_k,
        context_ops=spec.num_heads * (spec.latent_dim + spec.kv_lora_rank),  # a score, and what it weighs
        latent_bytes=row_bytes,
        attention_parts=len(head_groups(spec.num_heads, on_device=on_device)),
        whole_below=math.ceil(min(attention_sizes(spec, fused=fused).absorbed_below, _NEVER)),
        pair_ops=round(spec.num_heads * (spec.qk_head_dim + spec.v_head_dim) / rate),
        key_ops=round(spec.num_heads * spec.kv_lora_rank * (spec.qk_nope_head_dim + spec.v_head_dim) / rate),
    )


def _weights(spec: ModelSpec, layer: int) -> tuple[int, int]:
    """Those of a layer's attention, and of what follows it but for routed experts."""
    attention = feed_forward = 0
    following = False
    for tensor in dense_layer_tensors(spec, layer):
        following |= tensor.key.role == _NORM
        if following:
            feed_forward += math.prod(tensor.shape)
        else:
            attention += math.prod(tensor.shape)
    return attention, feed_forward
