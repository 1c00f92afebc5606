"""The supported `quantization_config`: compressed-tensors pack-quantized INT4, symmetric, groups of 32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from k2hybrid.checkpoint.fields import Fields

GROUP_SIZE = 32


def check_quantization(config: Fields) -> None:
    """Add to `config.problems` whatever in `quantization_config` differs from the one supported layout."""
    quantization = config.child("quantization_config", required=False)
    if quantization is None:
        if config.values.get("quantization_config") is None:
            config.problem(
                "quantization_config",
                "is missing: plain bf16 checkpoints are not supported, only ones with INT4 experts",
            )
        return
    method = quantization.values.get("quant_method")
    if method == "fp8":
        quantization.problem(
            "quant_method",
            "= 'fp8': FP8 checkpoints are not supported; use one with compressed-tensors INT4 experts",
        )
        return
    quantization.only("quant_method", ["compressed-tensors"])
    quantization.only("format", ["pack-quantized"])
    quantization.only("quantization_status", ["compressed"])
    quantization.only("kv_cache_scheme", [None], required=False)
    for name in ("sparsity_config", "transform_config"):
        quantization.only(name, [None, {}], required=False)
    groups = quantization.child("config_groups")
    if groups is None:
        return
    if len(groups.values) != 1:
        quantization.problem("config_groups", f"must hold exactly one group, not {len(groups.values)}")
        return
    _check_group(groups)


def _check_group(groups: Fields) -> None:
    group = groups.child(next(iter(groups.values)))
    if group is None:
        return
    group.only("targets", [["Linear"]])
    group.only("format", [None, "pack-quantized"], required=False)
    for name in ("input_activations", "output_activations"):
        group.only(name, [None], required=False)
    weights = group.child("weights")
    if weights is None:
        return
    weights.only("num_bits", [4])
    weights.only("type", ["int"])
    weights.only("symmetric", [True])
    weights.only("strategy", ["group"])
    weights.only("group_size", [GROUP_SIZE])
    weights.only("dynamic", [False], required=False)
    weights.only("actorder", [None, False], required=False)
    weights.only("block_structure", [None], required=False)


def published_quantization() -> Mapping[str, Any]:
    """The `quantization_config` of the published checkpoint (model card files of Kimi-K2-Thinking)."""
    weights: dict[str, Any] = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": GROUP_SIZE,
        "num_bits": 4,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": "group",
        "symmetric": True,
        "type": "int",
    }
    return {
        "config_groups": {
            "group_0": {
                "input_activations": None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": weights,
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
    }
