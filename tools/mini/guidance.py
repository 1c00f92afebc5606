"""Some heads are told where to look: the trainer knows what each copied token is a copy of.

A head that finds by itself what to look at sees a useful gradient only once it looks there by chance. Here
the logarithm of its share on the right position joins the loss, for these kinds of guides (`pieces.Piece`):

    previous   a name in a declaration → the end of the name before it
    current    where the next name is to be said → the end of the declared name that was dealt with
    word       a word of a name → the same word in the request; the first token of all where it was not said
    copy       a token to be said → the token that it copies
    value      where a value begins → the verdict on its parameter, which looked at its first token
    free       a token to be said that is no copy → the first token of all
    gather     a verdict → the word of the name that decides it
    evidence   a verdict → what in the request decides it; the first token of all where nothing does

The heads of a kind share the work: what counts is the mean of their shares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tools.mini.packing import Segment

ROWS = 32
# Kind → layer, and the heads from … to.
HEADS: dict[str, tuple[int, int, int]] = {
    "previous": (1, 0, 1),
    "current": (2, 0, 2),
    "word": (2, 2, 4),
    "copy": (3, 0, 3),
    "free": (3, 0, 3),
    "gather": (3, 3, 5),
    "evidence": (4, 0, 2),
    "value": (5, 0, 3),
}
COPIERS = HEADS["copy"][0]
WEIGHTS = {"free": 0.3}


@dataclass
class Guidance:
    """Sums of −ln(share) over the guided positions of a batch, and their numbers, by kind.

    `kinds`: those that count (None: all). `says`: whether the head of the model is to say copies right behind
    the heads that copy, too.
    """

    says: bool = False
    kinds: tuple[str, ...] | None = None
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def of_layer(self, index: int) -> Guided | None:
        """What guides the heads of a layer; None where nothing does."""
        heads = {
            kind: (first, end)
            for kind, (layer, first, end) in HEADS.items()
            if layer == index and (self.kinds is None or kind in self.kinds)
        }
        return Guided(self, heads) if heads else None

    def add(self, kind: str, loss: Tensor, count: int) -> None:
        """Add a sum over `count` positions."""
        self.sums[kind] = self.sums[kind] + loss if kind in self.sums else loss
        self.counts[kind] = self.counts.get(kind, 0) + count

    def loss(self) -> Tensor:
        """The sum over kinds of the mean −ln(share)."""
        return torch.stack(
            [WEIGHTS.get(kind, 1.0) * self.sums[kind] / self.counts[kind] for kind in self.sums]
        ).sum()

    def means(self) -> dict[str, float]:
        """The mean −ln(share) by kind."""
        return {kind: float(total.detach()) / self.counts[kind] for kind, total in self.sums.items()}


@dataclass
class Guided:
    """The guided heads of one layer."""

    guidance: Guidance
    heads: dict[str, tuple[int, int]]

    def add(self, q: Tensor, k: Tensor, segments: list[Segment], scale: float) -> None:
        """Queries and keys [heads, T, D] of the segments, which lie end to end."""
        for kind, (first, end) in self.heads.items():
            if not any(segment.guides.get(kind) for segment in segments):
                continue
            lengths = [segment.length for segment in segments]
            queries, keys = (torch.split(t[first:end], lengths, 1) for t in (q, k))
            for segment, own_q, own_k in zip(segments, queries, keys, strict=True):
                if not (pairs := segment.guides.get(kind)):
                    continue
                before = 0
                if segment.after is not None:
                    before = lengths[segment.after]
                    own_k = torch.cat((keys[segment.after], own_k), 1)
                loss = _minus_log_shares(own_q, own_k, pairs, before, scale)
                self.guidance.add(kind, loss, len(pairs))


def _minus_log_shares(
    q: Tensor, k: Tensor, pairs: list[tuple[int, int]], before: int, scale: float
) -> Tensor:
    n = len(pairs)
    # In bfloat16 the matrix library compiles a kernel per shape, so both sides are padded to multiples.
    wanted = torch.tensor(pairs + pairs[:1] * (-n % ROWS))
    rows, columns = wanted.unbind(1)
    m = k.shape[1]
    k = torch.nn.functional.pad(k, (0, 0, 0, -m % ROWS))
    scores = torch.bmm(q.index_select(1, rows - before), k.mT).float() * scale
    scores = scores.masked_fill(torch.arange(k.shape[1]) > rows.unsqueeze(1), float("-inf"))
    shares = scores.log_softmax(-1).gather(2, columns.expand(len(q), -1).unsqueeze(2)).squeeze(2)
    return -(shares.logsumexp(0) - math.log(len(q)))[:n].sum()
