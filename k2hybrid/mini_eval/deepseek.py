"""A checkpoint of ours as transformers' DeepseekV3ForCausalLM in fp32, where transformers is installed.

transformers is no dependency of the package, so it is imported by name when it is asked for.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from k2hybrid.checkpoint import int4
from k2hybrid.checkpoint.spec import read_spec

_UNKNOWN_THERE = (
    "architectures", "model_type", "quantization_config", "dtype", "moe_layer_freq", "topk_method",
    "scoring_func",
)  # fmt: skip


def missing() -> str | None:
    """The package that is missing for `load`, or None."""
    return next((name for name in ("transformers", "safetensors") if find_spec(name) is None), None)


def config_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """The published values under transformers' names: rope in one table, no prediction of further tokens."""
    values = {name: value for name, value in config.items() if name not in _UNKNOWN_THERE}
    scaling = dict(values.pop("rope_scaling", None) or {})
    rope_type = scaling.pop("type", scaling.get("rope_type", "default"))
    rope = {**scaling, "rope_type": rope_type, "rope_theta": values.pop("rope_theta")}
    values |= {"rope_parameters": rope, "rope_interleave": True, "num_nextn_predict_layers": 0}
    return values | {"attn_implementation": "eager", "experts_implementation": "eager"}


def build(
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    moe_layers: range,
    expert: Callable[[str], torch.Tensor],
) -> Any:
    """The model from the published tensors; `expert` unpacks the matrix of a name."""
    transformers: Any = importlib.import_module("transformers")
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**config_values(config)))
    model = model.float().eval()
    # Its experts are stacked to 3-D weights.
    state = {name: tensor.float() for name, tensor in tensors.items() if ".mlp.experts." not in name}
    for layer in moe_layers:
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([expert(f"{prefix}.{e}.{part}_proj") for e in range(config["n_routed_experts"])])
            for part in ("gate", "up", "down")
        )
        state[f"{prefix}.gate_up_proj"] = torch.cat((gate, up), dim=1)
        state[f"{prefix}.down_proj"] = down
    model.load_state_dict(state, strict=True)
    return model


def load(folder: Path) -> Any:
    """The model in `folder`."""
    load_file: Any = importlib.import_module("safetensors.torch").load_file
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))

    def expert(name: str) -> torch.Tensor:
        return int4.dequantize(tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"])

    return build(config, tensors, read_spec(folder).moe_layers, expert)
