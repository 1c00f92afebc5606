"""transformers' DeepseekV3ForCausalLM in fp32 on a tiny checkpoint unpacked by compressed-tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from compressed_tensors.quantization.lifecycle.forward import dequantize
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from tests.golden_model.tiny import TinyCheckpoint

INT4 = QuantizationArgs(
    num_bits=4, type=QuantizationType.INT, symmetric=True, strategy=QuantizationStrategy.GROUP, group_size=32
)


@dataclass(frozen=True, slots=True)
class OracleRun:
    """logits fp32 [T, vocab]; of each MoE layer: biased scores [T, experts], ids and weights [T, k]."""

    logits: torch.Tensor
    biased: list[torch.Tensor]
    ids: list[torch.Tensor]
    weights: list[torch.Tensor]


def oracle_config(checkpoint: TinyCheckpoint) -> Any:
    """The published values under transformers' names: rope in one table, no prediction of further tokens."""
    values: dict[str, Any] = dict(checkpoint.config)
    for name in ("architectures", "model_type", "quantization_config", "dtype", "moe_layer_freq"):
        values.pop(name)
    for name in ("topk_method", "scoring_func"):
        values.pop(name)
    rope = {
        "rope_type": "default",
        **(values.pop("rope_scaling") or {}),
        "rope_theta": values.pop("rope_theta"),
    }
    rope["rope_type"] = rope.pop("type", rope["rope_type"])
    values |= {"rope_parameters": rope, "rope_interleave": True, "num_nextn_predict_layers": 0}
    values |= {"attn_implementation": "eager", "experts_implementation": "eager"}
    return DeepseekV3Config(**values)


def oracle_model(checkpoint: TinyCheckpoint) -> Any:
    """fp32, from the same tensors; experts are nibble · scale in fp32, stacked to 3-D weights."""
    spec = checkpoint.spec
    model: Any = DeepseekV3ForCausalLM(oracle_config(checkpoint))
    model = model.float().eval()
    state = {
        name: tensor.float() for name, tensor in checkpoint.tensors.items() if ".mlp.experts." not in name
    }
    for layer in spec.moe_layers:
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([_expert(checkpoint, f"{prefix}.{e}.{part}_proj") for e in range(spec.num_experts)])
            for part in ("gate", "up", "down")
        )
        state[f"{prefix}.gate_up_proj"] = torch.cat((gate, up), dim=1)
        state[f"{prefix}.down_proj"] = down
    model.load_state_dict(state, strict=True)
    return model


def _expert(checkpoint: TinyCheckpoint, name: str) -> torch.Tensor:
    packed = checkpoint.tensors[f"{name}.weight_packed"]
    scale = checkpoint.tensors[f"{name}.weight_scale"].float()
    q = unpack_from_int32(packed, 4, torch.Size((packed.shape[0], packed.shape[1] * 8)))
    weight: torch.Tensor = dequantize(q, scale, args=INT4)
    return weight.float()


@torch.no_grad()
def run_oracle(checkpoint: TinyCheckpoint, ids: torch.Tensor) -> OracleRun:
    """One sequence of ids [T], all at once."""
    model = oracle_model(checkpoint)
    run = OracleRun(torch.empty(0), [], [], [])

    def note(module: Any, _inputs: Any, outputs: Any) -> None:
        logits, weights, chosen = outputs
        run.biased.append(logits.sigmoid() + module.e_score_correction_bias)
        run.weights.append(weights.clone())
        run.ids.append(chosen.clone())

    for layer in checkpoint.spec.moe_layers:
        model.model.layers[layer].mlp.gate.register_forward_hook(note)
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return OracleRun(logits, run.biased, run.ids, run.weights)
