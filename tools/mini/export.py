"""The trained model as a checkpoint folder in the published layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tools.mini.model import GROUP, MiniConfig, quantize_int4
from tools.mini.vocab import N_SPECIAL, write_json

N_SHARDS = 2
# The head is exported this much larger: sampling at temperature 1 then draws as training would at 1 / 1.5.
# So small a model keeps noise in its tail which the ordinary sampler, without top-p, would let out.
HEAD_GAIN = 1.5
_PER_WORD = 8


def pack_rows(q: Tensor) -> Tensor:
    """Integers −8…7 [out, in] → int32 [out, in/8]: nibble q + 8, element i in bits 4·(i%8) of word i//8."""
    nibbles = (q.to(torch.int64) + 8).reshape(*q.shape[:-1], -1, _PER_WORD)
    words = (nibbles << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_rows(packed: Tensor) -> Tensor:
    """The inverse of `pack_rows`, float32."""
    nibbles = (packed.to(torch.int64).unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15
    return (nibbles.flatten(-2) - 8).float()


def _expert(prefix: str, weight: Tensor) -> dict[str, Tensor]:
    q, scale = quantize_int4(weight)
    return {
        f"{prefix}.weight_packed": pack_rows(q.flatten(-2)),
        f"{prefix}.weight_scale": scale.squeeze(-1).bfloat16(),
        f"{prefix}.weight_shape": torch.tensor(weight.shape, dtype=torch.int32),
    }


def checkpoint_tensors(state: dict[str, Tensor], head_gain: float = 1.0) -> dict[str, Tensor]:
    """The trainer's state under the published names, rounded as published."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith("e_score_correction_bias"):
            out[f"model.{name}"] = value.float()
        elif name.endswith("mlp.gate_up_proj"):
            prefix = f"model.{name.removesuffix('.gate_up_proj')}.experts"
            for e, both in enumerate(value):
                gate, up = both.chunk(2)
                out |= _expert(f"{prefix}.{e}.gate_proj", gate) | _expert(f"{prefix}.{e}.up_proj", up)
        elif name.endswith("mlp.down_proj"):
            prefix = f"model.{name.removesuffix('.down_proj')}.experts"
            for e, down in enumerate(value):
                out |= _expert(f"{prefix}.{e}.down_proj", down)
        else:
            published = {"embed_tokens": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}.get(
                name
            )
            if published is None:
                published = f"model.{name}" + (".weight" if name.endswith("mlp.gate") else "")
            out[published] = (value * head_gain if name == "lm_head.weight" else value).bfloat16()
    # The router reads its bias under the gate's name.
    return {
        key.replace("mlp.e_score_correction_bias", "mlp.gate.e_score_correction_bias"): value.contiguous()
        for key, value in out.items()
    }


def trainer_state(tensors: dict[str, Tensor], config: MiniConfig) -> dict[str, Tensor]:
    """The exported values as the trainer's own state, so that evaluation sees what the checkpoint holds."""
    state: dict[str, Tensor] = {}

    def dense(prefix: str) -> Tensor:
        scale = tensors[f"{prefix}.weight_scale"].float().repeat_interleave(GROUP, -1)
        return unpack_rows(tensors[f"{prefix}.weight_packed"]) * scale

    for key, value in tensors.items():
        if ".experts." in key:
            continue
        name = key.removeprefix("model.")
        name = {"embed_tokens.weight": "embed_tokens"}.get(name, name).replace("mlp.gate.weight", "mlp.gate")
        state[name.replace("gate.e_score", "e_score")] = value.float()
    for index in range(1, config.num_hidden_layers):
        prefix = f"model.layers.{index}.mlp.experts"
        experts = range(config.n_routed_experts)
        state[f"layers.{index}.mlp.gate_up_proj"] = torch.stack(
            [torch.cat((dense(f"{prefix}.{e}.gate_proj"), dense(f"{prefix}.{e}.up_proj"))) for e in experts]
        )
        state[f"layers.{index}.mlp.down_proj"] = torch.stack(
            [dense(f"{prefix}.{e}.down_proj") for e in experts]
        )
    return state


def model_config(config: MiniConfig) -> dict[str, Any]:
    """config.json, with the keys of the published one that say something about the model."""
    first_special = config.vocab_size - N_SPECIAL
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "aux_loss_alpha": 0.001,
        "bos_token_id": first_special,
        "dtype": "bfloat16",
        "eos_token_id": first_special + 2,
        "ep_size": 1,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "kv_lora_rank": config.kv_lora_rank,
        "max_position_embeddings": 262144,
        "model_type": "kimi_k2",
        "moe_intermediate_size": config.moe_intermediate_size,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": config.n_routed_experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": config.num_attention_heads,
        "num_experts_per_tok": config.num_experts_per_tok,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_attention_heads,
        "num_nextn_predict_layers": 0,
        "pad_token_id": config.vocab_size - 1,
        "pretraining_tp": 1,
        "q_lora_rank": config.q_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "quantization_config": {
            "config_groups": {
                "group_0": {
                    "input_activations": None,
                    "output_activations": None,
                    "targets": ["Linear"],
                    "weights": {
                        "actorder": None,
                        "block_structure": None,
                        "dynamic": False,
                        "group_size": GROUP,
                        "num_bits": 4,
                        "observer": "minmax",
                        "observer_kwargs": {},
                        "strategy": "group",
                        "symmetric": True,
                        "type": "int",
                    },
                }
            },
            "format": "pack-quantized",
            "ignore": [
                "lm_head",
                "re:.*self_attn.*",
                "re:.*shared_experts.*",
                "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
            ],
            "kv_cache_scheme": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        },
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": {
            "beta_fast": config.yarn_beta,
            "beta_slow": config.yarn_beta,
            "factor": config.yarn_factor,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": config.yarn_original,
            "type": "yarn",
        },
        "rope_theta": config.rope_theta,
        "routed_scaling_factor": config.routed_scaling_factor,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "use_cache": True,
        "v_head_dim": config.v_head_dim,
        "vocab_size": config.vocab_size,
    }


def export(state: dict[str, Tensor], config: MiniConfig, folder: Path) -> None:
    """Write shards, index and configuration into `folder`, beside tokenizer and chat template."""
    tensors = checkpoint_tensors(state, HEAD_GAIN)
    half = config.num_hidden_layers // 2
    shards: list[dict[str, Tensor]] = [{} for _ in range(N_SHARDS)]
    for name, value in tensors.items():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else None
        late = layer > half if layer is not None else name != "model.embed_tokens.weight"
        shards[int(late)][name] = value
    for old in folder.glob("model-*.safetensors"):
        old.unlink()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{N_SHARDS:06}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(index, folder / "model.safetensors.index.json")
    described = model_config(config)
    write_json(described, folder / "config.json")
    write_json(
        {"eos_token_id": described["eos_token_id"], "max_length": 262144}, folder / "generation_config.json"
    )
