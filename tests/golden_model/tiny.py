"""Tiny random models in the published layout, in memory: what ours and the oracle are built from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from k2hybrid.cache.pages import LatentPages
from k2hybrid.cache.rows import Bf16Rows, Fp32Rows, RowFormat
from k2hybrid.checkpoint import int4
from k2hybrid.checkpoint.names import expected_tensors
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.experts.reference import ReferenceExperts
from k2hybrid.model.batch import Batch, Span
from k2hybrid.model.kimi import Kimi
from k2hybrid.model.layers import LinearKernels, TorchLinears
from k2hybrid.types import ExpertRef, ExpertSink, Int4Ref, RoutedExperts, TensorRef, Ticket

YARN = {
    "type": "yarn",
    "factor": 64.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 1.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

# Every dimension that the loader accepts differs somewhere; most sizes are no power of two.
CONFIGS: dict[str, dict[str, Any]] = {
    "k2": {},
    "no_q_lora_groups_3_dense_no_yarn": {
        "q_lora_rank": None,
        "n_routed_experts": 12,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 3,
        "num_hidden_layers": 5,
        "rope_scaling": None,
        "num_attention_heads": 3,
        "v_head_dim": 20,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.5,
    },
    "beta_fast_32_odd_sizes": {
        "rope_scaling": {**YARN, "beta_fast": 32.0, "factor": 8.0, "original_max_position_embeddings": 64},
        "hidden_size": 96,
        "num_attention_heads": 5,
        "n_routed_experts": 13,
        "num_experts_per_tok": 5,
        "q_lora_rank": 33,
        "kv_lora_rank": 27,
        "qk_nope_head_dim": 14,
        "qk_rope_head_dim": 10,
        "v_head_dim": 18,
        "intermediate_size": 77,
        "moe_intermediate_size": 96,
        "vocab_size": 101,
    },
    "mscales_differ_all_moe": {
        "rope_scaling": {**YARN, "mscale_all_dim": 0.707, "beta_fast": 4.0},
        "first_k_dense_replace": 0,
        "num_hidden_layers": 2,
        "num_experts_per_tok": 1,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
    },
    "groups_2_of_1_no_all_dim_mscale": {
        "rope_scaling": {**YARN, "mscale_all_dim": 0.0},
        "n_routed_experts": 10,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 4,
        "n_shared_experts": 3,
        "num_attention_heads": 1,
        "kv_lora_rank": 40,
        "routed_scaling_factor": 2.446,
    },
    "no_moe": {"first_k_dense_replace": 2, "num_hidden_layers": 2, "num_attention_heads": 7},
    "wide_latent": {
        "kv_lora_rank": 64,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 16,
        "v_head_dim": 8,
        "num_hidden_layers": 4,
        "first_k_dense_replace": 1,
        "n_routed_experts": 31,
        "num_experts_per_tok": 8,
        "rope_scaling": {**YARN, "beta_fast": 32.0},
        "rope_theta": 1e6,
    },
}


def config(**overrides: Any) -> dict[str, Any]:
    """A config.json as published, at a size for tests."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "kimi_k2",
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 80,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": overrides.get("num_attention_heads", 4),
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.827,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "rope_scaling": YARN,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "kv_cache_scheme": None,
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "input_activations": None,
                    "output_activations": None,
                    "weights": {
                        "num_bits": 4,
                        "type": "int",
                        "symmetric": True,
                        "strategy": "group",
                        "group_size": 32,
                        "dynamic": False,
                        "actorder": None,
                    },
                }
            },
            "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
        },
        **overrides,
    }


@dataclass(slots=True)
class TinyCheckpoint:
    """All tensors of a random model by their published names, and the two faces the model room asks for."""

    config: Mapping[str, Any]
    spec: ModelSpec
    tensors: dict[str, torch.Tensor]
    keys: dict[tuple[int | None, str, int | None], str] = field(default_factory=dict)

    def take(self, layer: int | None, role: str) -> torch.Tensor:
        """`types.WeightSource`; may be asked again, since several models are built from one checkpoint."""
        return self.tensors[self.keys[layer, role, None]]

    def fill(self, sink: ExpertSink) -> None:
        """Hand all experts to `sink`, pointing into this checkpoint's tensors."""
        for layer in self.spec.moe_layers:
            for expert in range(self.spec.num_experts):
                parts = [self._int4(layer, expert, part) for part in ("gate", "up", "down")]
                sink.add_expert(layer, expert, ExpertRef(*parts))

    def _int4(self, layer: int, expert: int, part: str) -> Int4Ref:
        return Int4Ref(
            *(self._ref(layer, expert, f"expert_{part}_proj.{kind}") for kind in ("packed", "scale"))
        )

    def _ref(self, layer: int, expert: int, role: str) -> TensorRef:
        name = self.keys[layer, role, expert]
        tensor = self.tensors[name]
        dtype = "I32" if tensor.dtype == torch.int32 else "BF16"
        return TensorRef(
            name, Path("memory"), 0, tensor.nbytes, dtype, tuple(tensor.shape), tensor.data_ptr()
        )


def tiny_checkpoint(name: str, seed: int = 1) -> TinyCheckpoint:
    """The random model of `CONFIGS[name]`.

    Activations stay near 1 and softmax, router and correction bias all matter, so that no part of the graph
    is invisible in the logits.
    """
    values = config(**CONFIGS[name])
    spec = ModelSpec.from_config(values)
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    tensors: dict[str, torch.Tensor] = {}
    keys: dict[tuple[int | None, str, int | None], str] = {}
    for want in expected_tensors(spec):
        role, shape = want.key.role, want.shape
        if role.endswith(".shape"):
            continue
        if role.endswith(".packed"):
            q = torch.randint(-8, 8, (shape[0], shape[1] * 8), generator=random, dtype=torch.int8)
            tensor = int4.pack(q)
        elif role.endswith(".scale"):
            tensor = normal(*shape).mul(0.5).exp() * (1 / 4.6 / math.sqrt(shape[1] * spec.group_size))
        elif role.endswith("norm"):
            tensor = 1 + 0.2 * normal(*shape)
        elif role == "router_bias":
            tensor = 0.3 * normal(*shape)
        elif role == "embed_tokens":
            tensor = normal(*shape)
        else:
            tensor = normal(*shape) * (1.5 / math.sqrt(shape[-1]))
        if tensor.is_floating_point() and role != "router_bias":
            tensor = tensor.bfloat16()
        tensors[want.name] = tensor
        keys[want.key.layer, role, want.key.expert] = want.name
    return TinyCheckpoint(values, spec, tensors, keys)


def folder_checkpoint(folder: Path) -> TinyCheckpoint:
    """A checkpoint folder read whole by the safetensors package, for models small enough."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    spec = ModelSpec.from_config(values)
    stored: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        stored |= load_file(shard)
    keys = {(want.key.layer, want.key.role, want.key.expert): want.name for want in expected_tensors(spec)}
    tensors = {name: stored[name] for (_, role, _), name in keys.items() if not role.endswith(".shape")}
    return TinyCheckpoint(values, spec, tensors, keys)


class RecordingExperts:
    """Passes on to other experts and keeps what was asked: ids and weights of each call."""

    def __init__(self, inner: RoutedExperts) -> None:
        self.inner = inner
        self.ids: list[torch.Tensor] = []
        self.weights: list[torch.Tensor] = []

    def submit(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Ticket:
        """`types.RoutedExperts`."""
        self.ids.append(ids.clone())
        self.weights.append(weights.clone())
        return self.inner.submit(layer, x, ids, weights)


@dataclass(frozen=True, slots=True)
class TinyModel:
    """A model over a tiny checkpoint, which it keeps alive, with pages of its own."""

    checkpoint: TinyCheckpoint
    model: Kimi
    pages: LatentPages
    experts: RecordingExperts

    def table(self, tokens: int) -> torch.Tensor:
        """A page table for a new sequence of `tokens` tokens."""
        return torch.tensor(self.pages.allocate(-(-tokens // LatentPages.PAGE_TOKENS)))

    def run(self, batch: Batch) -> torch.Tensor:
        """All layers; fp32 logits of the rows asked for."""
        return self.model.logits(self.model.forward(self.model.begin(batch)))

    def prefill(self, ids: torch.Tensor, sizes: list[int] | None = None) -> torch.Tensor:
        """One new sequence in chunks of `sizes` (default: at once); logits of every row, fp32 [T, vocab]."""
        table = self.table(len(ids))
        pieces = chunks(ids, sizes or [len(ids)])
        return torch.cat([self.run(batch_of([(piece, start, table)])) for piece, start in pieces])


def tiny_model(
    checkpoint: TinyCheckpoint,
    dtype: torch.dtype,
    *,
    kernels: LinearKernels | None = None,
    experts: RoutedExperts | None = None,
    rows: RowFormat | None = None,
    page_count: int = 64,
) -> TinyModel:
    """Built from torch products and reference experts unless others are given."""
    spec = checkpoint.spec
    if experts is None:
        experts = ReferenceExperts(dtype)
        checkpoint.fill(experts)
    if rows is None:
        rows = Fp32Rows(spec.latent_dim) if dtype == torch.float32 else Bf16Rows(spec.latent_dim)
    pages = LatentPages(spec.num_layers, page_count, rows)
    recording = RecordingExperts(experts)
    model = Kimi(spec, checkpoint, recording, kernels or TorchLinears(), pages, dtype=dtype)
    return TinyModel(checkpoint, model, pages, recording)


def batch_of(sequences: list[tuple[torch.Tensor, int, torch.Tensor]]) -> Batch:
    """A batch from (new ids, tokens before, page table) of each sequence; logits of every row."""
    ids = torch.cat([new for new, _, _ in sequences])
    positions = torch.cat([torch.arange(start, start + len(new)) for new, start, _ in sequences])
    spans = tuple(Span(start, len(new), table) for new, start, table in sequences)
    return Batch(ids, positions, spans, torch.arange(len(ids)))


def random_ids(spec: ModelSpec, count: int, seed: int = 7) -> torch.Tensor:
    """Token ids int64 [count]."""
    return torch.randint(0, spec.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def chunks(ids: torch.Tensor, sizes: list[int]) -> Iterator[tuple[torch.Tensor, int]]:
    """ids cut into pieces of the given sizes, the last size repeated: (piece, tokens before it)."""
    start = 0
    for i in range(len(ids)):
        if start == len(ids):
            return
        size = sizes[min(i, len(sizes) - 1)]
        yield ids[start : start + size], start
        start = min(start + size, len(ids))
