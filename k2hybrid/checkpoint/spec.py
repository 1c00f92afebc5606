"""`ModelSpec`: what `config.json` says about the model, read strictly.

A value this runtime does not honour is refused by name, never ignored; keys it does not know are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2hybrid.checkpoint.fields import Fields
from k2hybrid.checkpoint.quantization import GROUP_SIZE, check_quantization
from k2hybrid.checkpoint.strict_json import parse_object, read_bounded, show
from k2hybrid.errors import SpecError

_LIMIT_BYTES = 16 << 20  # a published config.json has 4 KB
_MAX_DIM = 1 << 17  # no width of a model of this family comes near; keeps every product inside 64 bits
_MAX_EXPERTS_IN_ALL = 2**18  # layers × experts; K2 has 23,040


@dataclass(frozen=True, slots=True)
class Yarn:
    """YaRN rope scaling, as configured. `factor` ≥ 1; betas in rotations over the original context."""

    factor: float
    original_max_positions: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes and constants of one model; every value comes from its files."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_layers: int
    first_k_dense: int
    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    num_experts: int
    num_shared_experts: int
    top_k: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    rms_norm_eps: float
    rope_theta: float
    yarn: Yarn | None
    max_positions: int
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    group_size: int = GROUP_SIZE
    dtype: str = "bfloat16"

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values a token leaves in the latent cache, per layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def moe_layers(self) -> range:
        """Indices of the layers with routed experts."""
        return range(self.first_k_dense, self.num_layers)

    def is_moe(self, layer: int) -> bool:
        """Whether `layer` has routed experts."""
        return layer >= self.first_k_dense

    @classmethod
    def from_config(cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelSpec:
        """Read the parsed `config.json` (and `generation_config.json`, for further stop ids).

        Raises:
            SpecError: naming every field that is missing, unsupported or in contradiction with another.
        """
        problems: list[str] = []
        fields = Fields(config, problems)
        _check_family(config)
        _check_constants(fields)
        check_quantization(fields)
        spec = _read(cls, fields, generation or {})
        if not problems:
            _check_consistency(spec, problems)
        if problems:
            raise SpecError("config.json cannot be used:" + "".join(f"\n  - {line}" for line in problems))
        return spec


def read_spec(model_dir: Path) -> ModelSpec:
    """Read `config.json`, and `generation_config.json` where there is one, of the folder `model_dir`.

    Raises:
        SpecError: a file is unreadable, or the configuration is not supported.
    """
    config = read_config(model_dir / "config.json")
    generation_path = model_dir / "generation_config.json"
    generation = read_config(generation_path) if os.path.lexists(generation_path) else None
    return ModelSpec.from_config(config, generation)


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, one of a checkpoint's configuration files. SpecError."""
    return parse_object(read_bounded(path, _LIMIT_BYTES, SpecError), str(path), SpecError)


def _check_family(config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type")
    if model_type == "kimi_k2":
        return
    if isinstance(config.get("text_config"), Mapping):
        raise SpecError(
            f"model_type {show(model_type)} keeps its language model in text_config; such checkpoints are "
            "not supported, only model_type 'kimi_k2' is"
        )
    raise SpecError(f"model_type {show(model_type)} is not supported; only 'kimi_k2' (Kimi-K2-Thinking) is")


def _check_constants(fields: Fields) -> None:
    fields.only("architectures", [["DeepseekV3ForCausalLM"]], required=False)
    fields.only("hidden_act", ["silu"])
    fields.only("attention_bias", [False], required=False)
    fields.only("mlp_bias", [False], required=False)
    fields.only("tie_word_embeddings", [False])
    fields.only("scoring_func", ["sigmoid"])
    fields.only("topk_method", ["noaux_tc"])
    fields.only("moe_layer_freq", [1], required=False)
    fields.only("num_nextn_predict_layers", [0, None], required=False)
    fields.only("rope_interleave", [True], required=False)
    fields.only("sliding_window", [None], required=False)
    fields.only("pretraining_tp", [1], required=False)
    heads = fields.values.get("num_attention_heads")
    if heads is not None:  # the latent is shared by all heads: there is no grouping of keys
        fields.only("num_key_value_heads", [heads, None], required=False)
    if "rope_parameters" in fields.values:
        fields.problem(
            "rope_parameters", "is not read; give rope_theta and rope_scaling, as the published file does"
        )
    for name in ("dtype", "torch_dtype"):
        fields.only(name, ["bfloat16"], required=False)
    if "dtype" not in fields.values and "torch_dtype" not in fields.values:
        fields.problem("dtype", "(or torch_dtype) is missing; supported: 'bfloat16'")


def _read(cls: type[ModelSpec], fields: Fields, generation: Mapping[str, Any]) -> ModelSpec:
    integer = fields.integer
    vocab_size = integer("vocab_size", 1, 1 << 22)
    last_id = vocab_size - 1
    eos = _token_ids(fields, "eos_token_id", last_id, required=True)
    eos += _token_ids(
        Fields(generation, fields.problems, "generation_config.json: "),
        "eos_token_id",
        last_id,
        required=False,
    )
    return cls(
        model_type="kimi_k2",
        vocab_size=vocab_size,
        hidden_size=integer("hidden_size", 1, _MAX_DIM),
        intermediate_size=integer("intermediate_size", 1, 8 * _MAX_DIM),
        moe_intermediate_size=integer("moe_intermediate_size", 1, _MAX_DIM),
        num_layers=integer("num_hidden_layers", 1, 4096),
        first_k_dense=integer("first_k_dense_replace", 0, 4096),
        num_heads=integer("num_attention_heads", 1, 4096),
        q_lora_rank=fields.optional_integer("q_lora_rank", 1, _MAX_DIM),
        kv_lora_rank=integer("kv_lora_rank", 1, _MAX_DIM),
        qk_nope_head_dim=integer("qk_nope_head_dim", 1, 1 << 14),
        qk_rope_head_dim=integer("qk_rope_head_dim", 2, 1 << 14),
        v_head_dim=integer("v_head_dim", 1, 1 << 14),
        num_experts=integer("n_routed_experts", 1, 1 << 16),
        num_shared_experts=integer("n_shared_experts", 1, 64),
        top_k=integer("num_experts_per_tok", 1, 1 << 10),
        n_group=integer("n_group", 1, 1 << 16),
        topk_group=integer("topk_group", 1, 1 << 16),
        norm_topk_prob=fields.boolean("norm_topk_prob"),
        routed_scaling_factor=fields.number("routed_scaling_factor", 1e-6, 1e6),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-12, 1.0),
        rope_theta=fields.number("rope_theta", 1.0 + 1e-6, 1e12),
        yarn=_yarn(fields),
        max_positions=integer("max_position_embeddings", 1, 1 << 26),
        bos_token_id=integer("bos_token_id", 0, last_id),
        eos_token_ids=tuple(dict.fromkeys(eos)),
        pad_token_id=fields.optional_integer("pad_token_id", 0, last_id),
    )


def _yarn(fields: Fields) -> Yarn | None:
    scaling = fields.child("rope_scaling", required=False)
    if scaling is None:
        return None
    kinds = [scaling.values[name] for name in ("type", "rope_type") if name in scaling.values]
    if not kinds:
        scaling.problem("type", "is missing; supported: 'yarn'")
        return None
    for kind in kinds:
        if kind != "yarn" and not (kind == "default" and len(set(map(str, kinds))) == 1):
            scaling.problem(
                "type", f"= {show(kind)} is not supported; supported: 'yarn', or rope_scaling null"
            )
            return None
    if kinds[0] == "default":
        return None
    return Yarn(
        factor=scaling.number("factor", 1.0, 1e6),
        original_max_positions=scaling.integer("original_max_position_embeddings", 1, 1 << 26),
        beta_fast=scaling.number("beta_fast", 1e-6, 1e6),
        beta_slow=scaling.number("beta_slow", 1e-6, 1e6),
        mscale=scaling.number("mscale", 0.0, 1e3),
        mscale_all_dim=scaling.number("mscale_all_dim", 0.0, 1e3),
    )


def _token_ids(fields: Fields, name: str, last_id: int, *, required: bool) -> list[int]:
    """One id or a list of ids."""
    value = fields.values.get(name)
    if value is None:
        if required:
            fields.problem(name, "is missing")
        return []
    ids = value if isinstance(value, list) else [value]
    if not ids or len(ids) > 1024 or any(type(one) is not int or not 0 <= one <= last_id for one in ids):
        fields.problem(name, f"must be one id or a list of ids in 0…{last_id}, not {show(value)}")
        return []
    return ids


def _check_consistency(spec: ModelSpec, problems: list[str]) -> None:
    """Fields that are well-formed alone but contradict each other."""

    def refuse(wrong: bool, text: str) -> None:
        if wrong:
            problems.append(text)

    refuse(
        spec.first_k_dense > spec.num_layers,
        f"first_k_dense_replace {spec.first_k_dense} exceeds num_hidden_layers {spec.num_layers}",
    )
    refuse(
        spec.qk_rope_head_dim % 2 != 0, f"qk_rope_head_dim {spec.qk_rope_head_dim} is odd; rope rotates pairs"
    )
    for name, size in (
        ("hidden_size", spec.hidden_size),
        ("moe_intermediate_size", spec.moe_intermediate_size),
    ):
        refuse(
            size % spec.group_size != 0,
            f"{name} {size} is not a multiple of {spec.group_size}, the group of an INT4 scale",
        )
    refuse(
        spec.num_layers * spec.num_experts > _MAX_EXPERTS_IN_ALL,
        f"num_hidden_layers {spec.num_layers} × n_routed_experts {spec.num_experts} exceeds 2**18",
    )
    refuse(spec.topk_group > spec.n_group, f"topk_group {spec.topk_group} exceeds n_group {spec.n_group}")
    if spec.num_experts % spec.n_group:
        problems.append(f"n_routed_experts {spec.num_experts} is not divisible by n_group {spec.n_group}")
        return
    per_group = spec.num_experts // spec.n_group
    refuse(
        spec.n_group > 1 and per_group < 2,
        f"n_group {spec.n_group} leaves {per_group} expert a group; a group is scored by its best two",
    )
    refuse(
        spec.top_k > per_group * min(spec.topk_group, spec.n_group),
        f"num_experts_per_tok {spec.top_k} exceeds the {per_group * spec.topk_group} experts of "
        f"{spec.topk_group} kept groups",
    )
    refuse(
        spec.yarn is not None and spec.yarn.beta_fast < spec.yarn.beta_slow,
        "rope_scaling.beta_fast is smaller than beta_slow",
    )
