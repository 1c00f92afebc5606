"""Known configurations to synthesize from, and the short names under which their sizes are changed."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from typing import Any

from k2hybrid.checkpoint.quantization import published_quantization
from k2hybrid.checkpoint.vocab import BOS, END_OF_MESSAGE, PAD, SPECIAL_COUNT
from k2hybrid.errors import SpecError

_K2_THINKING: Mapping[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 163584,
    "dtype": "bfloat16",
    "eos_token_id": 163586,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 262144,
    "model_type": "kimi_k2",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "pad_token_id": 163839,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "factor": 64.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}

PRESETS: Mapping[str, Mapping[str, Any]] = {"kimi-k2-thinking": _K2_THINKING}

# Short names, as the command line has them. Keys of config.json are understood as well.
OVERRIDES: Mapping[str, str] = {
    "layers": "num_hidden_layers",
    "dense_layers": "first_k_dense_replace",
    "experts": "n_routed_experts",
    "shared_experts": "n_shared_experts",
    "top_k": "num_experts_per_tok",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "moe_intermediate": "moe_intermediate_size",
    "heads": "num_attention_heads",
    "q_lora": "q_lora_rank",
    "kv_lora": "kv_lora_rank",
    "nope": "qk_nope_head_dim",
    "rope": "qk_rope_head_dim",
    "v_head": "v_head_dim",
    "positions": "max_position_embeddings",
}

_TOKEN_IDS = {"bos_token_id": BOS, "eos_token_id": END_OF_MESSAGE, "pad_token_id": PAD}


def published_config(like: str = "kimi-k2-thinking") -> dict[str, Any]:
    """The `config.json` of a published checkpoint.

    Raises:
        SpecError: no preset has that name.
    """
    if like not in PRESETS:
        raise SpecError(f"no preset is called {like!r}; known: {', '.join(PRESETS)}")
    return {**copy.deepcopy(dict(PRESETS[like])), "quantization_config": published_quantization()}


def changed_config(like: str, overrides: Mapping[str, Any], ranks: int | None) -> dict[str, Any]:
    """A preset with some values changed, the special tokens moved to the end of its vocabulary.

    Args:
        overrides: short names (`OVERRIDES`) or keys of config.json → values.
        ranks: size of a given vocabulary without its 256 specials; None: `vocab_size` decides.

    Raises:
        SpecError: an unknown name, or `vocab_size` beside a given vocabulary.
    """
    config = published_config(like)
    for name, value in overrides.items():
        key = OVERRIDES.get(name, name)
        if key not in config:
            near = difflib.get_close_matches(name, [*OVERRIDES, *config], n=1)
            raise SpecError(f"unknown size {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if key in _TOKEN_IDS or (key == "vocab_size" and ranks is not None):
            raise SpecError(f"{name} follows from the vocabulary and cannot be given beside it")
        config[key] = value
    config["num_key_value_heads"] = config["num_attention_heads"]
    if ranks is not None:
        config["vocab_size"] = ranks + SPECIAL_COUNT
    if type(config["vocab_size"]) is int:
        for key, special in _TOKEN_IDS.items():
            config[key] = config["vocab_size"] - SPECIAL_COUNT + special
    return config
