"""What INT4 experts cost: perplexity on held-out lessons with and without their rounding.

python -m tools.mini.perplexity --published-vocab TIKTOKEN_MODEL --out k2hybrid/mini
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")

import torch
import torch.nn.functional as F

from k2hybrid.mini_eval.words import published_words
from tools.mini import vocab
from tools.mini.data import STAGES, Lessons
from tools.mini.model import MiniConfig, MiniModel
from tools.mini.packing import Lesson, pack


@torch.no_grad()
def perplexity(model: MiniModel, lessons: list[Lesson], pad_id: int, *, quantized: bool) -> float:
    """exp of the mean loss of a learnt token; `quantized` rounds the routed experts to INT4 as exported."""
    for layer in model.moe_layers:
        layer.quantized = quantized
    total, count = 0.0, 0
    for at in range(0, len(lessons), 4):
        batch = pack(lessons[at : at + 4], pad_id)
        losses = F.cross_entropy(model(batch).float(), batch.labels, reduction="sum")
        total += float(losses)
        count += batch.n_learnt
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--published-vocab", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("k2hybrid/mini"))
    parser.add_argument("--state", type=Path, default=Path(".cache/mini/state.pt"))
    parser.add_argument("--lessons", type=int, default=400)
    parser.add_argument("--seed", type=int, default=13)
    args = parser.parse_args()
    encoding = vocab.load_encoding(args.out / "tiktoken.model")
    model = MiniModel(MiniConfig(vocab_size=encoding.n_vocab))
    model.load_state_dict(torch.load(args.state, weights_only=False)["average"])
    model.eval()
    source = Lessons(encoding, published_words(args.published_vocab), args.seed, "test")
    lessons = [source.draw(STAGES["full mix"]) for _ in range(args.lessons)]
    rounded, plain = (perplexity(model, lessons, encoding.n_vocab - 1, quantized=q) for q in (True, False))
    print(
        f"perplexity on {args.lessons} lessons of the test side: "
        f"INT4 {rounded:.4f}, unquantized {plain:.4f}, ratio {rounded / plain:.4f}"
    )


if __name__ == "__main__":
    main()
