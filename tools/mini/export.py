"""The trained model as a checkpoint folder in the published layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from k2hybrid.checkpoint import int4
from k2hybrid.checkpoint.presets import changed_config
from tools.mini.model import MiniConfig
from tools.mini.vocab import N_SPECIAL, write_json

N_SHARDS = 2
# Of the exported logits over the trained ones; a power of two, so that no bit of the head is lost. Clients
# sample at temperature 1.0, and copies of names and values must be right then: it is as sure at 1.0
# as what was trained is at one half.
SHARPNESS = 2.0


def _expert(prefix: str, weight: Tensor) -> dict[str, Tensor]:
    packed, scale = int4.quantize(weight)
    return {
        f"{prefix}.weight_packed": packed,
        f"{prefix}.weight_scale": scale,
        f"{prefix}.weight_shape": torch.tensor(weight.shape, dtype=torch.int32),
    }


def checkpoint_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
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
            out[published] = value.bfloat16()
    # The router reads its bias under the gate's name.
    return {
        key.replace("mlp.e_score_correction_bias", "mlp.gate.e_score_correction_bias"): value.contiguous()
        for key, value in out.items()
    }


def sharpened(state: dict[str, Tensor], by: float = SHARPNESS) -> dict[str, Tensor]:
    """The same with logits `by` times as large: what is likeliest stays so, and is likelier."""
    return state | {"lm_head.weight": by * state["lm_head.weight"]}


def trainer_state(tensors: dict[str, Tensor], config: MiniConfig) -> dict[str, Tensor]:
    """The exported values as the trainer's own state, so that evaluation sees what the checkpoint holds."""
    state: dict[str, Tensor] = {}

    def dense(prefix: str) -> Tensor:
        return int4.dequantize(tensors[f"{prefix}.weight_packed"], tensors[f"{prefix}.weight_scale"])

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


def read(folder: Path, config: MiniConfig) -> dict[str, Tensor]:
    """The weights of an exported checkpoint as the trainer's own state."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("model-*.safetensors")):
        tensors |= load_file(shard)
    return trainer_state(tensors, config)


def model_config(config: MiniConfig) -> dict[str, Any]:
    """config.json: the published one, in the trainer's sizes."""
    sizes = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "kv_lora_rank": config.kv_lora_rank,
        "moe_intermediate_size": config.moe_intermediate_size,
        "n_routed_experts": config.n_routed_experts,
        "num_attention_heads": config.num_attention_heads,
        "num_experts_per_tok": config.num_experts_per_tok,
        "num_hidden_layers": config.num_hidden_layers,
        "q_lora_rank": config.q_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "routed_scaling_factor": config.routed_scaling_factor,
        "v_head_dim": config.v_head_dim,
    }
    described = changed_config("kimi-k2-thinking", sizes, config.vocab_size - N_SPECIAL)
    described["rope_scaling"] |= {
        "beta_fast": config.yarn_beta,
        "beta_slow": config.yarn_beta,
        "factor": config.yarn_factor,
        "original_max_position_embeddings": config.yarn_original,
    }
    return described


def export(state: dict[str, Tensor], config: MiniConfig, folder: Path) -> None:
    """Write shards, index and configuration into `folder`, beside tokenizer and chat template."""
    tensors = checkpoint_tensors(state)
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
