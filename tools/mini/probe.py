"""Teacher-forced figures: how often sampling at temperature 1 would say exactly what is expected."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tools.mini.data import Examples
from tools.mini.model import MiniModel
from tools.mini.packing import IGNORED, pack

KINDS = ("repeat", "look_up", "tools", "decimals", "chat", "echo")


@torch.no_grad()
def probe(
    model: MiniModel, examples: Examples, pad_id: int, count: int = 32
) -> dict[str, tuple[float, float, float]]:
    """Kind → (argmax share of tokens, mean loss, mean probability of the whole answer)."""
    model.eval()
    figures = {}
    for kind in KINDS:
        right = total = 0
        exact = loss = 0.0
        for _ in range(count // 8):
            drawn = [examples.draw({kind: 1.0}) for _ in range(8)]
            batch = pack(drawn, pad_id)
            logits = model(batch.ids, batch.lengths, batch.wanted).float()
            logp = -F.cross_entropy(logits, batch.labels, ignore_index=IGNORED, reduction="none")
            hits = logits.argmax(-1) == batch.labels
            at = 0
            for example in drawn:
                n = sum(example.learn[1:])
                right += int(hits[at : at + n].sum())
                total += n
                loss -= float(logp[at : at + n].sum())
                exact += float(logp[at : at + n].sum().exp())
                at += n
        figures[kind] = (right / max(total, 1), loss / max(total, 1), exact / (count // 8 * 8))
    model.train()
    return figures
