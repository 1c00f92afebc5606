"""Names of the published layout: Hugging Face name ↔ (layer, role, expert), with dtype and shape of each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from k2hybrid.checkpoint.spec import ModelSpec

BF16 = ("BF16",)
F32 = ("F32",)
I32 = ("I32",)
SHAPE_DTYPES = ("I32", "I64")  # both have been published for weight_shape

PROJECTIONS = ("gate", "up", "down")
PARTS = ("packed", "scale", "shape")

_OUTER = {
    "embed_tokens": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
_IN_LAYER = {
    "input_layernorm": "input_layernorm.weight",
    "post_attention_layernorm": "post_attention_layernorm.weight",
    "q_proj": "self_attn.q_proj.weight",
    "q_a_proj": "self_attn.q_a_proj.weight",
    "q_a_layernorm": "self_attn.q_a_layernorm.weight",
    "q_b_proj": "self_attn.q_b_proj.weight",
    "kv_a_proj": "self_attn.kv_a_proj_with_mqa.weight",
    "kv_a_layernorm": "self_attn.kv_a_layernorm.weight",
    "kv_b_proj": "self_attn.kv_b_proj.weight",
    "o_proj": "self_attn.o_proj.weight",
    "gate_proj": "mlp.gate_proj.weight",
    "up_proj": "mlp.up_proj.weight",
    "down_proj": "mlp.down_proj.weight",
    "router": "mlp.gate.weight",
    "router_bias": "mlp.gate.e_score_correction_bias",
    "shared_gate_proj": "mlp.shared_experts.gate_proj.weight",
    "shared_up_proj": "mlp.shared_experts.up_proj.weight",
    "shared_down_proj": "mlp.shared_experts.down_proj.weight",
}


_IN_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.")


class TensorKey(NamedTuple):
    """What a tensor is to the model. `layer` is None outside the layers, `expert` for all but routed experts.

    Expert roles are `expert_{gate,up,down}_proj.{packed,scale,shape}`.
    """

    layer: int | None
    role: str
    expert: int | None = None


class ExpectedTensor(NamedTuple):
    """One tensor that a checkpoint of some spec must have: safetensors dtypes allowed, shape `[out, in]`."""

    name: str
    key: TensorKey
    dtypes: tuple[str, ...]
    shape: tuple[int, ...]


def tensor_name(layer: int | None, role: str) -> str:
    """The Hugging Face name of a tensor outside the routed experts. KeyError: no such role."""
    return _OUTER[role] if layer is None else f"model.layers.{layer}.{_IN_LAYER[role]}"


def expert_prefix(layer: int, expert: int) -> str:
    """What the names of one routed expert's nine tensors begin with."""
    return f"model.layers.{layer}.mlp.experts.{expert}."


def expert_of(name: str) -> tuple[int, int] | None:
    """(layer, expert) of a routed expert's tensor; None: it is none."""
    found = _IN_EXPERT.match(name)
    return None if found is None else (int(found[1]), int(found[2]))


def expected_tensors(spec: ModelSpec) -> Iterator[ExpectedTensor]:
    """Every tensor of a checkpoint of `spec` (K2: 208,215), in the order of the model, one at a time."""
    embedding, *behind = outer_tensors(spec)
    yield embedding
    for layer in range(spec.num_layers):
        yield from layer_tensors(spec, layer)
    yield from behind


def outer_tensors(spec: ModelSpec) -> list[ExpectedTensor]:
    """Those of no layer: the embedding, before them, and what comes behind."""
    hidden = spec.hidden_size
    return [
        _dense(None, "embed_tokens", spec.vocab_size, hidden),
        _dense(None, "norm", hidden),
        _dense(None, "lm_head", spec.vocab_size, hidden),
    ]


def layer_tensors(spec: ModelSpec, layer: int) -> Iterator[ExpectedTensor]:
    """The tensors of one layer."""
    yield from dense_layer_tensors(spec, layer)
    if spec.is_moe(layer):
        for expert in range(spec.num_experts):
            yield from expert_tensors(spec, layer, expert)


def dense_layer_tensors(spec: ModelSpec, layer: int) -> Iterator[ExpectedTensor]:
    """Those of one layer that are no routed experts'."""
    hidden = spec.hidden_size
    yield _dense(layer, "input_layernorm", hidden)
    yield from _attention(spec, layer)
    yield _dense(layer, "post_attention_layernorm", hidden)
    if not spec.is_moe(layer):
        yield _dense(layer, "gate_proj", spec.intermediate_size, hidden)
        yield _dense(layer, "up_proj", spec.intermediate_size, hidden)
        yield _dense(layer, "down_proj", hidden, spec.intermediate_size)
        return
    yield _dense(layer, "router", spec.num_experts, hidden)
    yield _dense(layer, "router_bias", spec.num_experts)._replace(dtypes=F32)
    shared = spec.moe_intermediate_size * spec.num_shared_experts
    yield _dense(layer, "shared_gate_proj", shared, hidden)
    yield _dense(layer, "shared_up_proj", shared, hidden)
    yield _dense(layer, "shared_down_proj", hidden, shared)


def expert_tensors(spec: ModelSpec, layer: int, expert: int) -> Iterator[ExpectedTensor]:
    """The nine tensors of one routed expert: gate, up, down, each packed, scale, shape."""
    prefix = expert_prefix(layer, expert)
    for projection in PROJECTIONS:
        rows, columns = spec.moe_intermediate_size, spec.hidden_size
        if projection == "down":
            rows, columns = columns, rows
        name, role = f"{prefix}{projection}_proj.weight_", f"expert_{projection}_proj."
        key = TensorKey(layer, role + "packed", expert)
        yield ExpectedTensor(name + "packed", key, I32, (rows, columns // 8))
        key = TensorKey(layer, role + "scale", expert)
        yield ExpectedTensor(name + "scale", key, BF16, (rows, columns // spec.group_size))
        yield ExpectedTensor(name + "shape", TensorKey(layer, role + "shape", expert), SHAPE_DTYPES, (2,))


def _attention(spec: ModelSpec, layer: int) -> Iterator[ExpectedTensor]:
    query_rows = spec.num_heads * spec.qk_head_dim
    if spec.q_lora_rank is None:
        yield _dense(layer, "q_proj", query_rows, spec.hidden_size)
    else:
        yield _dense(layer, "q_a_proj", spec.q_lora_rank, spec.hidden_size)
        yield _dense(layer, "q_a_layernorm", spec.q_lora_rank)
        yield _dense(layer, "q_b_proj", query_rows, spec.q_lora_rank)
    yield _dense(layer, "kv_a_proj", spec.latent_dim, spec.hidden_size)
    yield _dense(layer, "kv_a_layernorm", spec.kv_lora_rank)
    rows = spec.num_heads * (spec.qk_nope_head_dim + spec.v_head_dim)
    yield _dense(layer, "kv_b_proj", rows, spec.kv_lora_rank)
    yield _dense(layer, "o_proj", spec.hidden_size, spec.num_heads * spec.v_head_dim)


def _dense(layer: int | None, role: str, *shape: int) -> ExpectedTensor:
    return ExpectedTensor(tensor_name(layer, role), TensorKey(layer, role), BF16, shape)
