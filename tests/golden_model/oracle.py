"""transformers' DeepseekV3ForCausalLM in fp32 on a tiny checkpoint unpacked by compressed-tensors."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from compressed_tensors.quantization.lifecycle.forward import dequantize
from transformers import DeepseekV3Config

from k2hybrid.mini_eval import deepseek
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
    """The published values under transformers' names."""
    return DeepseekV3Config(**deepseek.config_values(checkpoint.config))


def oracle_model(checkpoint: TinyCheckpoint) -> Any:
    """fp32, from the same tensors; experts are nibble · scale in fp32."""
    expert = functools.partial(_expert, checkpoint)
    return deepseek.build(checkpoint.config, checkpoint.tensors, checkpoint.spec.moe_layers, expert)


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
