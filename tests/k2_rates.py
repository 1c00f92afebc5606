"""Kimi-K2-Thinking's sizes and the rates of a made-up machine, for tests that count predictions by hand."""

from __future__ import annotations

from k2hybrid.checkpoint.presets import published_config
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.experts.prediction import ModelSizes, Rates

SPEC = ModelSpec.from_config(published_config())
K2 = ModelSizes.of(SPEC)
RATES = Rates(
    cores=8, ram_gb_s=100.0, dense_gb_s=90.0, mapped_gb_s=80.0, arena_gb_s=85.0, dense_ops=2e12,
    expert_ops=1.5e12, overlap=0.75, step_s=1e-4, sequence_s=2e-5, context_s=1e-7, chunk_s=0.02,
    chunk_context_s=1e-5, sample_s=1e-3,
)  # fmt: skip
