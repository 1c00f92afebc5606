"""The trainer's own definition of the model, with the built-in model's weights, against transformers'."""

from __future__ import annotations

import torch

from tests.golden_model import compare
from tests.golden_model.compare import checkpoint, oracle, prompt
from tools.mini.export import trainer_state
from tools.mini.model import MiniConfig, MiniModel
from tools.mini.packing import Batch, Segment


def test_the_trainers_logits_are_the_exported_ones() -> None:
    """fp32 both; the bf16 runtime is held to its own bound by `test_oracle`."""
    ids = prompt("mini")
    spec = checkpoint("mini").spec
    assert spec.q_lora_rank is not None
    config = MiniConfig(
        vocab_size=spec.vocab_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        q_lora_rank=spec.q_lora_rank,
        kv_lora_rank=spec.kv_lora_rank,
        v_head_dim=spec.v_head_dim,
        compute=torch.float32,
    )
    model = MiniModel(config)
    model.load_state_dict(trainer_state(checkpoint("mini").tensors, config))
    for layer in model.moe_layers:
        layer.quantized = False  # the values are the dequantized ones already
    every = torch.arange(len(ids))
    batch = Batch(ids, every, [Segment(len(ids))], every, torch.zeros_like(ids))
    with torch.no_grad():
        logits = model.eval()(batch)
    assert compare.largest_error(logits, oracle("mini").logits) <= compare.FP32_BOUND
