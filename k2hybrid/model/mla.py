"""Multi-head latent attention: projections around the attention core, and the rows it leaves in the pages.

Source: DeepSeek-V2 (arXiv 2405.04434, §2.1). Layouts as published: q_b rows per head [nope | rope]; kv_a rows
[latent | k_rope], where the norm covers the latent only and k_rope is shared by all heads; kv_b rows per head
[k_nope | v].
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from k2hybrid.cache.pages import LatentPages
from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.errors import EngineError
from k2hybrid.model import attention, flash, fused
from k2hybrid.model.attention import AttentionSizes, Context, LatentStep, LatentSteps, SpanAttention
from k2hybrid.model.batch import Batch, sent
from k2hybrid.model.layers import (
    HeadLinear,
    HeadLinearT,
    Linear,
    LinearKernels,
    RMSNorm,
    row_kernels,
    unquantized,
)
from k2hybrid.model.paged import PagedDecode, PagedSpans, paged_spans
from k2hybrid.model.rope import Rope, Rotation, rotate, softmax_scale
from k2hybrid.model.scratch import ABSORBED_ROWS, IN_RAM, ON_DEVICE, STEP_ROWS
from k2hybrid.types import LatentWeights, LinearWeight

# On a CPU the expanded form goes through the heads in so many groups, between which a pass may stop: over a
# long context attention takes most of a layer, and whoever decodes meanwhile waits for a piece of it only.
HEAD_GROUPS = 4


def attention_sizes(spec: ModelSpec, *, fused: bool = False) -> AttentionSizes:
    """The attention sizes of a model. `fused`: see `fused.serves`."""
    return AttentionSizes(
        heads=spec.num_heads,
        nope=spec.qk_nope_head_dim,
        rope=spec.qk_rope_head_dim,
        value=spec.v_head_dim,
        latent=spec.kv_lora_rank,
        scale=softmax_scale(spec),
        fused=fused,
    )


def head_groups(heads: int, *, on_device: bool) -> list[slice]:
    """Heads that the expanded form takes together; on a device all, since it does not wait in between."""
    size = heads if on_device else -(-heads // HEAD_GROUPS)
    return [slice(first, min(first + size, heads)) for first in range(0, heads, size)]


@dataclass(frozen=True, slots=True)
class Absorbed:
    """Spans whose queries are in latent space at the same time."""

    spans: tuple[int, ...]  # by number
    attended: tuple[tuple[torch.Tensor, int, int], ...]  # the same, as `SpanAttention.attend` takes them


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What all layers of a pass share: where new rows go, their angles, and which spans take which form."""

    batch: Batch
    slots: torch.Tensor  # int64 [T]
    rotation: Rotation
    absorbed: tuple[Absorbed, ...]  # groups of spans
    expanded: tuple[int, ...]
    few: Absorbed | None = None  # all spans, where they are absorbed and few rows
    paged: PagedSpans | None = None  # those of one token, where a device attends to them in one call
    tables: Mapping[int, torch.Tensor] = field(default_factory=dict)  # of the others by number, on a device


def plan_attention(
    batch: Batch, sizes: AttentionSizes, rope: Rope, pages: LatentPages, *, paged: bool = False
) -> AttentionPlan:
    """Made once per pass. The form of a span depends on its own length alone.

    Args:
        paged: spans of one token are attended to together.
    """
    single = [i for i, span in enumerate(batch.spans) if paged and span.count == 1]
    rest = [i for i in range(len(batch.spans)) if i not in single] if single else range(len(batch.spans))
    is_short = {i: batch.spans[i].count < sizes.absorbed_below for i in rest}
    rotation, device = rope.at(batch.positions), pages.device
    absorbed = tuple(_absorbed_together([i for i, short in is_short.items() if short], batch))
    whole = len(absorbed) == 1 and len(absorbed[0].spans) == len(batch.spans)
    return AttentionPlan(
        batch=batch,
        slots=sent(_slots(batch, pages), device),
        rotation=Rotation(sent(rotation.cos, device), sent(rotation.sin, device)),
        absorbed=absorbed,
        expanded=tuple(i for i, short in is_short.items() if not short),
        few=absorbed[0] if whole and batch.ids.numel() <= STEP_ROWS else None,
        paged=_paged(batch, single, device) if single else None,
        tables=_tables(batch, rest, device),
    )


def _tables(batch: Batch, spans: Sequence[int], device: torch.device) -> dict[int, torch.Tensor]:
    """Page tables on a device, in one copy: each layer reads them block by block. In RAM they are there."""
    if device.type == "cpu" or not spans:
        return {}
    tables = [batch.spans[i].page_table for i in spans]
    there = torch.split(sent(torch.cat(tables), device), [len(table) for table in tables])
    return dict(zip(spans, there, strict=True))


def _slots(batch: Batch, pages: LatentPages) -> torch.Tensor:
    """Where the rows go, int64 [T]."""
    slots: list[torch.Tensor] = []
    for alone, spans in itertools.groupby(batch.spans, lambda span: span.count == 1):
        if alone:
            slots.append(torch.tensor([pages.slot(span.page_table, span.start) for span in spans]))
        else:
            slots += [pages.slots(s.page_table, s.start, s.start + s.count) for s in spans]
    return slots[0] if len(slots) == 1 else torch.cat(slots)


def _absorbed_together(spans: Sequence[int], batch: Batch) -> Iterator[Absorbed]:
    """Groups of `ABSORBED_ROWS` rows at most, or one span."""
    while spans:
        taken, rows = 1, batch.spans[spans[0]].count
        while taken < len(spans) and rows + batch.spans[spans[taken]].count <= ABSORBED_ROWS:
            rows += batch.spans[spans[taken]].count
            taken += 1
        some, spans = tuple(spans[:taken]), spans[taken:]
        yield Absorbed(some, tuple((s.page_table, s.start, s.count) for s in (batch.spans[i] for i in some)))


def _paged(batch: Batch, single: list[int], device: torch.device) -> PagedSpans:
    row_slices = batch.row_slices()
    rows = None if len(single) == len(batch.spans) else [row_slices[i].start for i in single]
    return paged_spans([batch.spans[i] for i in single], rows, device)


@dataclass(frozen=True, slots=True)
class Attending:
    """Attention of one layer under way: queries [n, heads, nope + rope] of the expanded spans, and
    out [T, heads, value], in which the other spans are done. If it was done in one call, `result` is all."""

    plan: AttentionPlan
    queries: tuple[torch.Tensor, ...]
    out: torch.Tensor
    result: torch.Tensor | None = None  # fp32 [T, hidden]


@dataclass(frozen=True, slots=True)
class _HeadGroup:
    """Some heads: their sizes, and what makes their keys and values."""

    heads: slice
    sizes: AttentionSizes
    kv_b: Linear


class MLA:
    """Attention of one layer. `take(role)` hands out its weights; `decode` serves paged spans.

    It is called at once, or in pieces: `begin`, `attend` for each of `groups` in order, `end`.
    """

    def __init__(
        self,
        layer: int,
        spec: ModelSpec,
        sizes: AttentionSizes,
        take: Callable[[str], LinearWeight],
        kernels: LinearKernels,
        pages: LatentPages,
        latent_norm_eps: float,
        dtype: torch.dtype,
        decode: PagedDecode | None = None,
    ) -> None:
        self.layer = layer
        self.sizes = sizes
        self.kernels = kernels
        self.pages = pages
        self.dtype = dtype
        self.decode = decode
        self._rows = row_kernels(kernels, dtype)
        stored = pages.format.name in ("bf16", "fp8") and dtype == torch.bfloat16
        self.attention: SpanAttention | None = None
        if isinstance(kernels, SpanAttention) and stored and sizes.latent % 16 == 0:
            self.attention = kernels
        if spec.q_lora_rank is None:
            self.q_a: Linear | None = None
            self.q = Linear(kernels, take("q_proj"))
        else:
            self.q_a = Linear(kernels, take("q_a_proj"))
            self.q_norm = RMSNorm(unquantized(take("q_a_layernorm")), latent_norm_eps, dtype, self._rows)
            self.q = Linear(kernels, take("q_b_proj"))
        self.kv_a = Linear(kernels, take("kv_a_proj"))
        self.latent_norm = RMSNorm(unquantized(take("kv_a_layernorm")), latent_norm_eps, dtype)
        self.kv_b = Linear(kernels, unquantized(take("kv_b_proj")))
        by_head = unquantized(self.kv_b.weight).view(sizes.heads, sizes.nope + sizes.value, sizes.latent)
        self.groups = [
            _HeadGroup(
                heads,
                replace(sizes, heads=heads.stop - heads.start),
                Linear(kernels, by_head[heads].reshape(-1, sizes.latent)),  # a view
            )
            for heads in head_groups(sizes.heads, on_device=decode is not None)
        ]
        self.key_to_latent = HeadLinearT(kernels, by_head[:, : sizes.nope])
        self.latent_to_value = HeadLinear(kernels, by_head[:, sizes.nope :])
        self._form = fused if sizes.fused else attention
        self.o = Linear(kernels, take("o_proj"))
        self._step: LatentStep | None = None
        if self.attention is not None and isinstance(kernels, LatentSteps) and pages.format.name == "bf16":
            self._step = kernels.latent_step(
                self._weights(), rope=sizes.rope, eps=latent_norm_eps, scale=sizes.scale
            )

    def __call__(self, x: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """x [T, hidden] -> fp32 [T, hidden]; stores the rows' latents on the way."""
        attending = self.begin(x, plan)
        for group in range(len(self.groups)):
            self.attend(attending, group)
        return self.end(attending)

    def begin(self, x: torch.Tensor, plan: AttentionPlan) -> Attending:
        """x [T, hidden]: stores the rows' latents, and attends for all spans but the expanded ones."""
        sizes = self.sizes
        if self._step is not None and plan.few is not None:
            cos, sin = plan.rotation.cos, plan.rotation.sin
            stored = self.pages.rows(self.layer)
            done = self._step(x, stored, plan.slots, plan.few.attended, cos, sin)
            return Attending(plan, (), done, done)
        q_nope, q_rope, latents = self._prepared(self._queries(x), x, plan.rotation)
        self.pages.put(self.layer, plan.slots, latents)
        del latents
        out = torch.empty((len(x), sizes.heads, sizes.value), dtype=self.dtype, device=x.device)
        if plan.paged is not None:
            self._paged(q_nope, q_rope, plan.paged, out)
        for some in plan.absorbed:
            self._absorbed(q_nope, q_rope, plan, some, out)
        rows = [plan.batch.row_slices()[i] for i in plan.expanded]
        queries = tuple(torch.cat((q_nope[span], q_rope[span]), dim=-1) for span in rows)
        return Attending(plan, queries, out)

    def attend(self, attending: Attending, group: int) -> None:
        """Some heads of the expanded spans."""
        part, plan = self.groups[group], attending.plan
        rows = plan.batch.row_slices()
        for i, queries in zip(plan.expanded, attending.queries, strict=True):
            context, out = self._context(plan, i), attending.out[rows[i], part.heads]
            q = queries[:, part.heads]
            if self.decode is not None:
                flash.expanded(q, context, part.sizes, part.kv_b, out)
            else:
                out.copy_(self._form.expanded(q, context, part.sizes, self.kernels, part.kv_b))

    def end(self, attending: Attending) -> torch.Tensor:
        """fp32 [T, hidden], after the last group."""
        return self.o(attending.out.flatten(1)) if attending.result is None else attending.result

    def _weights(self) -> LatentWeights:
        return LatentWeights(
            q_a=None if self.q_a is None else self.q_a.weight,
            q_norm=None if self.q_a is None else self.q_norm.weight,
            q=self.q.weight,
            kv_a=self.kv_a.weight,
            latent_norm=self.latent_norm.weight,
            key_to_latent=self.key_to_latent.weight,
            latent_to_value=self.latent_to_value.weight,
            o=self.o.weight,
        )

    def _queries(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, hidden] -> fp32 [T, heads, nope + rope]."""
        q = self.q(x if self.q_a is None else self.q_norm(self.q_a(x)))
        return q.view(len(x), self.sizes.heads, self.sizes.nope + self.sizes.rope)

    def _prepared(
        self, q: torch.Tensor, x: torch.Tensor, rotation: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [T, heads, nope + rope], x [T, hidden] -> both parts of the queries, and rows for the pages."""
        norm, nope, heads = self.latent_norm, self.sizes.nope, self.sizes.heads
        if self._rows is not None:
            kv = self.kv_a(x)
            return self._rows.prepare_attention(q, kv, norm.weight, norm.eps, rotation.cos, rotation.sin)
        latent, k_rope = self.compress(x)
        # The key's rotary part is rotated as one more head.
        rotary = rotate(torch.cat((q[..., nope:], k_rope[:, None]), dim=1), rotation).to(self.dtype)
        return (
            q[..., :nope].to(self.dtype),
            rotary[:, :heads],
            torch.cat((latent, rotary[:, heads]), dim=-1),
        )

    def compress(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, hidden] -> normed latent [T, latent] in the model's dtype, unrotated k_rope fp32."""
        kv = self.kv_a(x)
        return self.latent_norm(kv[:, : self.sizes.latent]), kv[:, self.sizes.latent :]

    def _paged(
        self, q_nope: torch.Tensor, q_rope: torch.Tensor, paged: PagedSpans, out: torch.Tensor
    ) -> None:
        if self.decode is None:
            raise EngineError("this network has no decode kernel; its plans cannot have paged spans")
        if paged.rows is not None:
            q_nope, q_rope = q_nope.index_select(0, paged.rows), q_rope.index_select(0, paged.rows)
        mixed = self.decode(
            self.key_to_latent(q_nope).to(self.dtype),
            q_rope,
            self.pages.rows(self.layer),
            paged.tables,
            paged.lengths,
            scale=self.sizes.scale,
            row_format=self.pages.format.name,
        )
        values = self.latent_to_value(mixed.to(self.dtype)).to(self.dtype)
        if paged.rows is None:
            out.copy_(values)
        else:
            out.index_copy_(0, paged.rows, values)

    def _absorbed(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        plan: AttentionPlan,
        some: Absorbed,
        out: torch.Tensor,
    ) -> None:
        # kv_b is read once for all these spans; only the attention itself goes span by span.
        all_rows = plan.batch.row_slices()
        rows = [all_rows[i] for i in some.spans]
        q_latent = self.key_to_latent(_pick(q_nope, rows)).to(self.dtype)
        mixed = self._mixed(q_latent, q_rope, rows, plan, some)
        values = self.latent_to_value(mixed)
        if len(rows) == len(all_rows):
            out.copy_(values)
            return
        first = 0
        for span_rows in rows:
            last = first + span_rows.stop - span_rows.start
            out[span_rows] = values[first:last]
            first = last

    def _mixed(
        self,
        q_latent: torch.Tensor,
        q_rope: torch.Tensor,
        rows: list[slice],
        plan: AttentionPlan,
        some: Absorbed,
    ) -> torch.Tensor:
        """Weighed latents of absorbed spans, in the model's dtype, as `q_latent` has their queries."""
        if self.attention is not None:
            q = torch.cat((q_latent, _pick(q_rope, rows)), dim=-1)
            return self.attention.attend(
                q,
                self.pages.rows(self.layer),
                some.attended,
                latent=self.sizes.latent,
                row_format=self.pages.format.name,
                scale=self.sizes.scale,
            ).to(self.dtype)
        mixed = torch.empty_like(q_latent)
        first = 0
        for i, span_rows in zip(some.spans, rows, strict=True):
            last = first + span_rows.stop - span_rows.start
            mixed[first:last] = attention.absorbed(
                q_latent[first:last], q_rope[span_rows], self._context(plan, i), self.sizes, self.kernels
            )
            first = last
        return mixed

    def _context(self, plan: AttentionPlan, span: int) -> Context:
        cut = IN_RAM if self.decode is None else ON_DEVICE
        return Context(self.pages, self.layer, plan.batch.spans[span], cut, plan.tables.get(span))


def _pick(x: torch.Tensor, rows: list[slice]) -> torch.Tensor:
    """The rows of some spans, together; no copy where that is all of x."""
    if sum(r.stop - r.start for r in rows) == x.shape[0]:
        return x
    return torch.cat([x[r] for r in rows])
