"""One attention layer of Kimi-K2's true sizes over a long context; prints the peak of its scratch memory.

Run by test_long_context.py in a process of its own, so that the peak is this work's and nobody else's.
Usage: python -m tests.unit.model.long_context CONTEXT_TOKENS NEW_TOKENS bf16|fp8 [fused]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from k2hybrid.cache.pages import LatentPages
from k2hybrid.cache.rows import row_format
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.model.batch import Batch, Span
from k2hybrid.model.mla import MLA, attention_sizes, plan_attention
from k2hybrid.model.rope import Rope
from k2hybrid.native.machine import Machine
from tests.golden_model.tiny import config

SHAPES = {
    "q_a_proj": (1536, 7168),
    "q_b_proj": (12288, 1536),
    "kv_a_proj": (576, 7168),
    "kv_b_proj": (16384, 512),
    "o_proj": (7168, 8192),
}


def kimi_k2() -> ModelSpec:
    """The attention sizes of Kimi-K2."""
    return ModelSpec.from_config(
        config(
            hidden_size=7168,
            num_attention_heads=64,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            num_hidden_layers=1,
            max_position_embeddings=262144,
        )
    )


def memory_bytes(field: str) -> int:
    """A field of /proc/self/status: VmRSS now, VmHWM at its highest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


@torch.no_grad()
def main(context: int, count: int, rows_name: str, fused: bool) -> None:
    torch.manual_seed(0)
    spec, sizes, machine = kimi_k2(), attention_sizes(kimi_k2(), fused=fused), Machine()
    torch.set_num_threads(machine.threads)
    weights = {
        role: torch.empty(shape, dtype=torch.bfloat16).normal_(0, shape[1] ** -0.5)
        for role, shape in SHAPES.items()
    }
    weights |= {"q_a_layernorm": torch.ones(1536), "kv_a_layernorm": torch.ones(512)}
    needed = -(-(context + count) // LatentPages.PAGE_TOKENS)
    rows_format = row_format(rows_name, spec.kv_lora_rank, spec.qk_rope_head_dim)
    pages = LatentPages(1, needed, rows_format)
    # Every other page, then the rest: no two neighbours adjoin, so every block is gathered by a copy.
    order = pages.allocate(needed)
    table = torch.tensor(order[::2] + order[1::2])
    for start in range(0, context, 1024):
        rows = torch.empty((min(1024, context - start), spec.latent_dim), dtype=torch.bfloat16).normal_()
        pages.write(0, table, start, rows)
    mla = MLA(0, spec, sizes, weights.__getitem__, machine, pages, 1e-6, torch.bfloat16)

    def forward(start: int, tokens: int) -> torch.Tensor:
        positions = torch.arange(start, start + tokens)
        batch = Batch(positions, positions, (Span(start, tokens, table),), positions[:0])
        x = torch.empty((tokens, spec.hidden_size), dtype=torch.bfloat16).normal_()
        return mla(x, plan_attention(batch, sizes, Rope(spec), pages))

    forward(0, 1)  # what libraries allocate once is not scratch
    before = memory_bytes("VmRSS")
    setup_peak = memory_bytes("VmHWM")
    out = forward(context, count)
    print(
        json.dumps(
            {
                "scratch_bytes": memory_bytes("VmHWM") - before,
                "setup_bytes": setup_peak - before,
                "finite": bool(out.isfinite().all()),
                "absorbed": count < sizes.absorbed_below,
            }
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:] == ["fused"])
