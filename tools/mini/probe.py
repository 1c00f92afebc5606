"""Teacher-forced figures on held-out lessons.

Where every likeliest token is the right one, greedy decoding says exactly what is expected.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from tools.mini.data import Lessons
from tools.mini.model import MiniModel
from tools.mini.packing import pack
from tools.mini.vocab import special_tokens

# Lessons of a look, by kind: some seconds in all.
_LESSONS = {
    "repeat": 48,
    "look_up": 24,
    "member": 24,
    "declared": 16,
    "served": 8,
    "first_tool": 40,
    "few_tools": 16,
    "tools": 16,
    "talk": 20,
}


@dataclass(frozen=True)
class Figures:
    """Shares of learnt tokens, whole branches and tool calls that greedy decoding gets right.

    `sampled` is the mean probability of a whole branch at temperature 1, `loss` the mean loss of a token.
    """

    tokens: float
    whole: float
    calls: float
    sampled: float
    loss: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@torch.no_grad()
def probe(model: MiniModel, lessons: Lessons, pad_id: int) -> dict[str, Figures]:
    """Figures by kind of lesson."""
    model.eval()
    end = special_tokens(lessons.encoding.n_vocab - 256)["<|tool_calls_section_end|>"]
    figures = {}
    for kind in _LESSONS:
        hits: list[bool] = []
        whole = calls = called = branches = 0
        sampled = loss = 0.0
        drawn = [lessons.lesson(kind) for _ in range(_LESSONS[kind])]
        for at in range(0, len(drawn), 4):
            part = drawn[at : at + 4]
            batch = pack(part, pad_id)
            logits = model(batch).float()
            losses = F.cross_entropy(logits, batch.labels, reduction="none")
            right = (logits.argmax(-1) == batch.labels).tolist()
            labels = batch.labels.tolist()
            start = 0
            for branch in (b for lesson in part for b in lesson.branches):
                n = sum(branch.learn[1:])
                mine = right[start : start + n]
                hits += mine
                whole += all(mine)
                ends = [i for i, label in enumerate(labels[start : start + n]) if label == end]
                if ends:
                    called += 1
                    calls += all(mine[: ends[-1] + 1])
                sampled += float(losses[start : start + n].sum().neg().exp())
                loss += float(losses[start : start + n].sum())
                branches += 1
                start += n
        figures[kind] = Figures(
            sum(hits) / len(hits),
            whole / branches,
            calls / max(called, 1),
            sampled / branches,
            loss / len(hits),
        )
    model.train()
    return figures
