"""Random inputs of the device kernels, their float64 results, and the bounds of docs/numerics.md.

What a kernel reads as bytes is decoded here by torch's own types and by `checkpoint.int4`, so that nothing of
the kernels is used to judge them. Benches and tests draw from it, on any device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from k2hybrid.checkpoint import int4
from k2hybrid.kernels.experts import int4_experts
from k2hybrid.kernels.linear8 import linear8
from k2hybrid.kernels.mla import GROUP, PAGE_TOKENS, mla_decode

U = 2.0**-8  # the largest relative error of a rounding to bf16


def fp8_bytes(shape: Sequence[int], g: torch.Generator) -> torch.Tensor:
    """uint8: codes of e4m3 but for the two of NaN, each equally often, so that one in 16 is subnormal."""
    codes = torch.randint(0, 254, tuple(shape), generator=g, device=g.device, dtype=torch.uint8)
    return codes + (codes >= 127).to(torch.uint8)


@dataclass(frozen=True)
class LatentCase:
    """One call of `mla_decode`, and what its rows mean: latent and rotary values [rows, …] in fp32."""

    q_latent: torch.Tensor
    q_rope: torch.Tensor
    rows: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor
    scale: float
    row_format: str
    latent: torch.Tensor
    rope: torch.Tensor

    def run(self) -> torch.Tensor:
        return mla_decode(
            self.q_latent,
            self.q_rope,
            self.rows,
            self.tables,
            self.lengths,
            scale=self.scale,
            row_format=self.row_format,
        )

    def rows_of(self, b: int) -> torch.Tensor:
        """Numbers of the rows of sequence b, in order."""
        token = torch.arange(int(self.lengths[b]), device=self.rows.device)
        return self.tables[b].long()[token // PAGE_TOKENS] * PAGE_TOKENS + token % PAGE_TOKENS

    def errors(self, got: torch.Tensor) -> tuple[float, float]:
        """Of `got` against float64: the largest error in units of its bound, and the norm's in its own.

        A weight is rounded to bf16, with its group's scale in fp8, and a score is a sum of fp32. So an output
        errs by at most (U + 2^-10) Σ w |v|; and since roundings are independent, of a root mean square of
        less than U/2, by a norm of no more than U √Σ w² v² but for scores' errors.
        """
        worst, error, sigma = 0.0, 0.0, 0.0
        for b in range(len(self.lengths)):
            if int(self.lengths[b]) == 0:
                worst = max(worst, math.inf if got[b].count_nonzero() else 0.0)
                continue
            at = self.rows_of(b)
            keys, rotary = self.latent[at].double(), self.rope[at].double()
            scores = self.q_latent[b].double() @ keys.T + self.q_rope[b].double() @ rotary.T
            weights = (scores * self.scale).softmax(-1)
            off = got[b].double() - weights @ keys
            magnitudes = weights @ keys.abs()
            largest = float((off.abs() / ((U + 2**-10) * magnitudes)).max())
            worst = worst if largest <= worst else largest  # NaN stays
            error += float(off.square().sum())
            sigma += float((weights.square() @ keys.square()).sum()) * U**2
            sigma += float(magnitudes.square().sum()) * 2.0**-26
        return worst, math.sqrt(error / sigma) if sigma else 0.0


def random_rows(
    row_format: str, n: int, latent: int, rope: int, g: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """n rows as they are stored, uint8 [n, row_bytes]; their latent and rotary values in fp32."""
    device = g.device
    rotary = torch.randn(n, rope, generator=g, device=device).bfloat16()
    if row_format == "bf16":
        values = torch.randn(n, latent, generator=g, device=device).bfloat16()
        parts = [values, rotary]
        decoded = values.float()
    else:
        codes = fp8_bytes((n, latent), g)
        groups = -(-latent // GROUP)
        # Of magnitudes that differ from group to group: a mixed-up scale is seen.
        scales = torch.exp2(torch.randn(n, groups, generator=g, device=device) - 9)
        parts = [codes, scales, rotary]
        decoded = codes.view(torch.float8_e4m3fn).float() * scales.repeat_interleave(GROUP, 1)[:, :latent]
    return torch.cat([part.view(torch.uint8) for part in parts], dim=1), decoded, rotary.float()


def latent_case(
    row_format: str,
    lengths: Sequence[int],
    *,
    heads: int,
    latent: int,
    rope: int,
    pages: int,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> LatentCase:
    """Sequences of these lengths over pages in no order; what no sequence reads is NaN."""
    batch = len(lengths)
    g = torch.Generator(device).manual_seed(seed)
    count = batch * pages + 2
    n = count * PAGE_TOKENS
    rows, decoded, rotary = random_rows(row_format, n, latent, rope, g)
    tables = torch.randperm(count, generator=g, device=device)[: batch * pages].view(batch, pages).int()
    read = torch.zeros(n, dtype=torch.bool, device=device)
    case = LatentCase(
        q_latent=torch.randn(batch, heads, latent, generator=g, device=device).bfloat16(),
        q_rope=torch.randn(batch, heads, rope, generator=g, device=device).bfloat16(),
        rows=rows,
        tables=tables,
        lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
        scale=1 / math.sqrt(latent + rope),
        row_format=row_format,
        latent=decoded,
        rope=rotary,
    )
    for b in range(batch):
        read[case.rows_of(b)] = True
    case.rows[~read] = 0xFF  # NaN in bf16, fp32 and e4m3
    return case


@dataclass(frozen=True)
class LinearCase:
    """One call of `linear8`; a weight itself."""

    x: torch.Tensor
    values: torch.Tensor
    scale: torch.Tensor
    kind: str

    def run(self) -> torch.Tensor:
        return linear8(self.x, self)

    def error(self, got: torch.Tensor) -> float:
        """Of `got` against float64: the norm, relative."""
        values = self.values if self.kind == "int8" else self.values.view(torch.float8_e4m3fn).float()
        want = self.x.double() @ (values.double() * self.scale.double()[:, None]).T
        return float((got.double() - want).norm() / want.norm())


def linear_case(
    kind: str, rows: int, outputs: int, inner: int, *, device: torch.device | str = "cpu", seed: int = 0
) -> LinearCase:
    """All codes of the kind, with scales that differ."""
    g = torch.Generator(device).manual_seed(seed)
    if kind == "int8":
        values = torch.randint(-128, 128, (outputs, inner), generator=g, device=device, dtype=torch.int8)
    else:
        values = fp8_bytes((outputs, inner), g)
    return LinearCase(
        x=torch.randn(rows, inner, generator=g, device=device).bfloat16(),
        values=values,
        scale=torch.exp2(torch.randn(outputs, generator=g, device=device) - 8),
        kind=kind,
    )


@dataclass(frozen=True)
class ExpertCase:
    """One call of `int4_experts`; `matrices` are the gate, up and down of each slot in fp32."""

    x: torch.Tensor
    slots: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor
    hidden: int
    inter: int
    matrices: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...]

    def run(self, choices: int | None = None) -> torch.Tensor:
        return int4_experts(
            self.x,
            self.slots,
            self.chosen,
            self.weights,
            hidden=self.hidden,
            inter=self.inter,
            choices=choices,
        )

    def error(self, got: torch.Tensor) -> float:
        """Of `got` against float64 without a rounding: the norm, relative."""
        want = torch.zeros(got.shape, dtype=torch.float64, device=got.device)
        for slot, (gate, up, down) in enumerate(self.matrices):
            row, column = (self.chosen == slot).nonzero(as_tuple=True)
            x = self.x[row].double()
            h = torch.nn.functional.silu(x @ gate.double().T) * (x @ up.double().T)
            y = (h @ down.double().T) * self.weights[row, column, None].double()
            want.index_add_(0, row, y)
        return float((got.double() - want).norm() / want.norm())


def expert_case(
    rows: int,
    top_k: int,
    slots: int,
    hidden: int,
    inter: int,
    *,
    absent: float = 0.3,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> ExpertCase:
    """Random experts; each row chooses distinct ones, and a share of the choices is not here (-1)."""
    g = torch.Generator(device).manual_seed(seed)

    def matrix(out: int, inner: int) -> tuple[torch.Tensor, torch.Tensor]:
        q = torch.randint(-8, 8, (out, inner), generator=g, device=device, dtype=torch.int8)
        scale = (torch.rand(out, inner // 32, generator=g, device=device) + 0.1) / (4.6 * math.sqrt(inner))
        return int4.pack(q), scale.bfloat16()

    held, matrices = [], []
    for _ in range(slots):
        pairs = matrix(inter, hidden), matrix(inter, hidden), matrix(hidden, inter)
        parts = [packed for packed, _ in pairs] + [scale for _, scale in pairs]
        held.append(torch.cat([part.view(torch.uint8).flatten() for part in parts]))
        gate, up, down = (int4.dequantize(packed, scale) for packed, scale in pairs)
        matrices.append((gate, up, down))
    draws = torch.rand(rows, max(slots, top_k), generator=g, device=device)
    chosen = draws.argsort(1)[:, :top_k]
    gone = torch.rand(rows, top_k, generator=g, device=device) < absent
    return ExpertCase(
        x=torch.randn(rows, hidden, generator=g, device=device).bfloat16(),
        slots=torch.stack(held),
        chosen=torch.where(gone | (chosen >= slots), -1, chosen).int(),
        weights=torch.rand(rows, top_k, generator=g, device=device),
        hidden=hidden,
        inter=inter,
        matrices=tuple(matrices),
    )
