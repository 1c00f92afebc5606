"""`ModelSpec` takes the published configuration and refuses, by name, everything it cannot honour."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from k2hybrid.checkpoint.presets import published_config
from k2hybrid.checkpoint.spec import ModelSpec, Yarn, read_spec
from k2hybrid.errors import SpecError

DELETE = object()
HUGE = pytest.param(10**5000, id="5000 digits")  # more than Python converts to text


def changed(path: str, value: Any) -> dict[str, Any]:
    """The published configuration with the value at the dotted `path` replaced."""
    config = copy.deepcopy(published_config())
    *parents, last = path.split(".")
    node = config
    for name in parents:
        node = node[name]
    if value is DELETE:
        del node[last]
    else:
        node[last] = value
    return config


def test_published_configuration() -> None:
    spec = ModelSpec.from_config(published_config())
    assert (spec.num_layers, spec.first_k_dense, spec.num_experts, spec.top_k) == (61, 1, 384, 8)
    assert (spec.hidden_size, spec.moe_intermediate_size, spec.vocab_size) == (7168, 2048, 163840)
    assert (spec.qk_head_dim, spec.latent_dim, spec.group_size) == (192, 576, 32)
    assert spec.yarn == Yarn(64.0, 4096, 1.0, 1.0, 1.0, 1.0)
    assert spec.eos_token_ids == (163586,)
    assert [layer for layer in range(61) if not spec.is_moe(layer)] == [0]
    assert spec.moe_layers == range(1, 61)


def test_other_values_that_are_supported() -> None:
    assert ModelSpec.from_config(changed("q_lora_rank", None)).q_lora_rank is None
    assert ModelSpec.from_config(changed("rope_scaling", None)).yarn is None
    assert ModelSpec.from_config(changed("rope_scaling", {"type": "default"})).yarn is None
    yarn = ModelSpec.from_config(changed("rope_scaling.beta_fast", 32.0)).yarn
    assert yarn is not None
    assert yarn.beta_fast == 32.0
    config = published_config() | {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 3}
    config["torch_dtype"] = config.pop("dtype")
    config["a_key_nobody_knows"] = {"x": [1]}
    spec = ModelSpec.from_config(config)
    assert (spec.n_group, spec.topk_group, spec.first_k_dense) == (4, 2, 3)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("model_type", "kimi_k25", "kimi_k25"),
        ("model_type", DELETE, "model_type"),
        ("architectures", ["LlamaForCausalLM"], "architectures"),
        ("hidden_act", "gelu", "hidden_act"),
        ("attention_bias", True, "attention_bias"),
        ("attention_bias", 0, "attention_bias"),
        ("tie_word_embeddings", True, "tie_word_embeddings"),
        ("scoring_func", "softmax", "scoring_func"),
        ("topk_method", "greedy", "topk_method"),
        ("moe_layer_freq", 2, "moe_layer_freq"),
        ("moe_layer_freq", True, "moe_layer_freq"),
        ("num_nextn_predict_layers", 1, "num_nextn_predict_layers"),
        ("num_key_value_heads", 8, "num_key_value_heads"),
        ("dtype", "float16", "dtype"),
        ("dtype", DELETE, "dtype"),
        ("torch_dtype", "float32", "torch_dtype"),
        ("rope_parameters", {"rope_type": "yarn"}, "rope_parameters"),
        ("rope_scaling.type", "linear", "rope_scaling.type"),
        ("rope_scaling.rope_type", "default", "rope_scaling.type"),
        ("rope_scaling.type", DELETE, "rope_scaling.type"),
        ("rope_scaling.type", ["yarn"], "rope_scaling.type"),
        ("rope_scaling.factor", DELETE, "rope_scaling.factor"),
        ("rope_scaling.factor", 0.5, "rope_scaling.factor"),
        ("rope_scaling.factor", float("nan"), "rope_scaling.factor"),
        ("rope_scaling.beta_fast", 0.5, "beta_fast"),
        ("rope_scaling.beta_fast", DELETE, "rope_scaling.beta_fast"),
        ("rope_scaling.original_max_position_embeddings", 4096.0, "original_max_position_embeddings"),
        ("rope_scaling", "yarn", "rope_scaling"),
        ("rope_theta", float("inf"), "rope_theta"),
        ("rope_theta", "50000", "rope_theta"),
        ("rms_norm_eps", 0, "rms_norm_eps"),
        ("routed_scaling_factor", 10**400, "routed_scaling_factor"),
        ("norm_topk_prob", 1, "norm_topk_prob"),
        ("eos_token_id", [], "eos_token_id"),
        ("eos_token_id", None, "eos_token_id"),
        ("eos_token_id", [163586, 163840], "eos_token_id"),
        ("eos_token_id", True, "eos_token_id"),
        ("bos_token_id", -1, "bos_token_id"),
        ("pad_token_id", 163840, "pad_token_id"),
        ("quantization_config", DELETE, "quantization_config"),
        ("quantization_config", None, "quantization_config"),
        ("quantization_config", "int4", "quantization_config"),
        ("quantization_config", {"quant_method": "fp8", "fmt": "e4m3"}, "FP8"),
        ("quantization_config.quant_method", "gptq", "quant_method"),
        ("quantization_config.format", "int-quantized", "quantization_config.format"),
        ("quantization_config.quantization_status", "frozen", "quantization_status"),
        ("quantization_config.quantization_status", DELETE, "quantization_status"),
        ("quantization_config.kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme"),
        ("quantization_config.sparsity_config", {"format": "sparse-24-bitmask"}, "sparsity_config"),
        ("quantization_config.config_groups", {}, "config_groups"),
        ("quantization_config.config_groups.group_1", {}, "config_groups"),
        ("quantization_config.config_groups.group_0.targets", ["Linear", "re:.*"], "targets"),
        ("quantization_config.config_groups.group_0.input_activations", {"num_bits": 8}, "input_activations"),
        (
            "quantization_config.config_groups.group_0.output_activations",
            {"num_bits": 8},
            "output_activations",
        ),
        ("quantization_config.config_groups.group_0.weights", None, "weights"),
        ("quantization_config.config_groups.group_0.weights.num_bits", 8, "num_bits"),
        ("quantization_config.config_groups.group_0.weights.type", "float", "weights.type"),
        ("quantization_config.config_groups.group_0.weights.symmetric", False, "symmetric"),
        ("quantization_config.config_groups.group_0.weights.strategy", "channel", "strategy"),
        ("quantization_config.config_groups.group_0.weights.group_size", 128, "group_size"),
        ("quantization_config.config_groups.group_0.weights.dynamic", True, "dynamic"),
        ("quantization_config.config_groups.group_0.weights.actorder", "group", "actorder"),
        ("n_group", 5, "n_group"),
        ("n_group", 384, "n_group"),
        ("topk_group", 2, "topk_group"),
        ("num_experts_per_tok", 385, "num_experts_per_tok"),
        ("qk_rope_head_dim", 63, "qk_rope_head_dim"),
        ("hidden_size", 7180, "hidden_size"),
        ("moe_intermediate_size", 2050, "moe_intermediate_size"),
        ("first_k_dense_replace", 62, "first_k_dense_replace"),
        ("n_shared_experts", 0, "n_shared_experts"),
        ("n_shared_experts", None, "n_shared_experts"),
        ("n_routed_experts", 65536, "n_routed_experts"),
    ],
)
def test_refused_by_name(path: str, value: Any, named: str) -> None:
    with pytest.raises(SpecError, match="(?s)" + named.replace(".", r"\.")):
        ModelSpec.from_config(changed(path, value))


SIZES = [
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"),
    *(
        "v_head_dim",
        "n_routed_experts",
        "num_experts_per_tok",
        "n_group",
        "topk_group",
        "max_position_embeddings",
    ),
]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -1, True, 64.0, "64", [64], 1 << 40, HUGE])
def test_impossible_sizes(name: str, value: Any) -> None:
    with pytest.raises(SpecError, match=name):
        ModelSpec.from_config(changed(name, value))


@pytest.mark.parametrize(
    "name", [*SIZES, "first_k_dense_replace", "rope_theta", "rms_norm_eps", "norm_topk_prob"]
)
def test_missing_is_refused(name: str) -> None:
    if name == "q_lora_rank":  # null or absent: one q_proj
        assert ModelSpec.from_config(changed(name, DELETE)).q_lora_rank is None
        return
    with pytest.raises(SpecError, match=f"{name} is missing"):
        ModelSpec.from_config(changed(name, DELETE))


def test_one_error_names_every_problem() -> None:
    config = published_config() | {"hidden_act": "gelu", "vocab_size": 0, "n_group": None}
    with pytest.raises(SpecError, match=r"(?s)hidden_act.*vocab_size.*n_group"):
        ModelSpec.from_config(config)


def test_nested_text_config_is_named() -> None:
    with pytest.raises(SpecError, match=r"kimi_k25.*text_config"):
        ModelSpec.from_config({"model_type": "kimi_k25", "text_config": published_config()})


def test_stop_ids_of_generation_config_are_added(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published_config()))
    assert read_spec(tmp_path).eos_token_ids == (163586,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [163585, 163586]}')
    assert read_spec(tmp_path).eos_token_ids == (163586, 163585)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 163840}')
    with pytest.raises(SpecError, match=r"generation_config\.json: eos_token_id"):
        read_spec(tmp_path)
