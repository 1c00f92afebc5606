"""Absorbed attention of single tokens over paged contexts, many sequences in one call: how a device decodes.

A recorded step replays the same call whatever the lengths, so tables and lengths are data: the shapes of a
call depend on how many sequences there are and how long a context may become, never on how long one is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from k2hybrid.cache.pages import LatentPages
from k2hybrid.model.batch import Span, sent


class PagedDecode(Protocol):
    """What attends: a kernel of the device, or `TorchDecode`."""

    def __call__(
        self,
        q_latent: torch.Tensor,
        q_rope: torch.Tensor,
        rows: torch.Tensor,
        tables: torch.Tensor,
        lengths: torch.Tensor,
        *,
        scale: float,
        row_format: str,
    ) -> torch.Tensor:
        """One token of each of B sequences over its first `lengths[b]` rows.

        Args:
            q_latent: bf16 [B, heads, latent], kv_b's key half folded in.
            q_rope: bf16 [B, heads, rope].
            rows: of one layer as stored, uint8 [pages · 64, row_bytes].
            tables: int32 [B, P]; token t of sequence b lies in page `tables[b, t // 64]` at `t % 64`.
            lengths: int32 [B].
            scale: of the scores.
            row_format: the format's name.

        Returns:
            fp32 [B, heads, latent].
        """


@dataclass(frozen=True, slots=True)
class PagedSpans:
    """The spans of a pass that have one token each. rows int64 [B] of the pass; None: they are all of it."""

    rows: torch.Tensor | None
    tables: torch.Tensor  # int32 [B, P]
    lengths: torch.Tensor  # int32 [B]


def paged_spans(spans: Sequence[Span], rows: Sequence[int] | None, device: torch.device) -> PagedSpans:
    """Spans of one token each, the token itself counted into its context."""
    pages = max(len(span.page_table) for span in spans)
    tables = torch.zeros((len(spans), pages), dtype=torch.int32)
    for table, span in zip(tables, spans, strict=True):
        table[: len(span.page_table)] = span.page_table
    lengths = torch.tensor([span.start + 1 for span in spans], dtype=torch.int32)
    picked = None if rows is None else sent(torch.tensor(rows, dtype=torch.int64), device)
    return PagedSpans(picked, sent(tables, device), sent(lengths, device))


class TorchDecode:
    """The same by plain torch operations, in fp32, up to the longest context: it plays a device's kernel."""

    def __init__(self, pages: LatentPages) -> None:
        self._pages = pages

    def __call__(
        self,
        q_latent: torch.Tensor,
        q_rope: torch.Tensor,
        rows: torch.Tensor,
        tables: torch.Tensor,
        lengths: torch.Tensor,
        *,
        scale: float,
        row_format: str,
    ) -> torch.Tensor:
        """See `PagedDecode`."""
        size = self._pages.PAGE_TOKENS
        tables = tables[:, : -(-int(lengths.max()) // size)]  # a table has room for the longest there may be
        batch, latent = tables.shape[0], q_latent.shape[-1]
        within = torch.arange(size, dtype=torch.int64, device=tables.device)
        at = (tables.long()[:, :, None] * size + within).view(batch, -1)
        context = self._pages.format.decode(rows[at.flatten()]).float().view(batch, at.shape[1], -1)
        queries = torch.cat((q_latent, q_rope), dim=-1).float()
        scores = torch.einsum("bhd,btd->bht", queries, context).mul_(scale)
        token = torch.arange(at.shape[1], device=lengths.device)
        scores.masked_fill_((token >= lengths[:, None])[:, None], -torch.inf)
        # Rows behind a length may hold anything, even what is no number.
        values = context[..., :latent].masked_fill((token >= lengths[:, None])[..., None], 0.0)
        return torch.einsum("bht,btl->bhl", scores.softmax(-1), values)
