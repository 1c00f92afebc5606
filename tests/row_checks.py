"""What the kernels between a device's products must give: asked of a card, and of Triton's interpreter.

Bounds are those of docs/numerics.md, "Kernels of the device".
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from k2hybrid.cache.rows import Fp8Rows
from k2hybrid.errors import KernelError
from k2hybrid.experts.compute import plain_experts
from k2hybrid.experts.device_slots import DeviceSlots
from k2hybrid.experts.hybrid import HybridExperts
from k2hybrid.experts.reference import ReferenceExperts
from k2hybrid.experts.split import SplitRates
from k2hybrid.kernels import rows
from k2hybrid.kernels.split import MOST_CHOICES, split

BF16 = 2.0**-8  # one rounding to bf16, relative
FP32 = 2.0**-24
TINY = 2.0**-126  # below it a rounding is no longer relative
NORM = 21 * FP32
SCORES = 32 * FP32  # of two biased scores, the difference of their errors

# Kimi-K2's, the built-in model's, those of the golden models, and what is no multiple of anything.
WIDTHS = [1, 24, 27, 33, 192, 512, 1536, 7168]
CHOICES = [(1, 1), (7, 3), (13, 5), (16, 4), (100, 64), (384, 8)]
ATTENTIONS = [(1, 1, 2, 1), (3, 24, 8, 40), (5, 14, 10, 27), (4, 0, 8, 32), (64, 128, 64, 512)]
LATENTS = [(512, 64), (32, 8), (1, 2), (7, 2), (27, 10), (129, 64), (300, 10), (512, 0)]
# Experts, rows, choices of a row.
SPLITS = [(7, 1, 3), (7, 9, 3), (1, 4, 1), (384, 1, 8), (384, 8, 8), (40, 32, 8)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def within(
    got: torch.Tensor, want: torch.Tensor, relative: float | torch.Tensor, absolute: float = 0.0
) -> None:
    got, want = got.cpu().double(), want.cpu().double()
    assert got.shape == want.shape
    assert bool(((got - want).abs() <= relative * want.abs() + absolute + TINY).all())


def of_exp(x: torch.Tensor, others: int) -> torch.Tensor:
    """Relative error of 1 / (1 + e^-x) and what is multiplied with it: `others` roundings."""
    return (2 * (-x.double()).clamp(min=0) + others) * FP32


def norm_of(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def check_rms_norm(device: str, n: int) -> None:
    x, weight = random(5, n + 3)[:, :n] * 3, random(n, seed=1)
    x[3] *= 1e-4
    x[4] = 0
    on_device = torch.zeros(5, n + 3, device=device)[:, :n].copy_(x)  # its rows are strided
    got = rows.rms_norm(on_device, weight.to(device), 1e-6)
    assert got.dtype == torch.bfloat16
    within(got, norm_of(x, weight, 1e-6), BF16 + NORM)
    assert not got[4].any()
    assert torch.equal(rows.rms_norm(on_device.contiguous(), weight.to(device), 1e-6), got)
    x[1, n // 2] = torch.nan
    broken = rows.rms_norm(x.to(device), weight.to(device), 1e-6).cpu()
    assert broken[1].isnan().all()
    assert torch.equal(broken[2:], got[2:].cpu())


def check_swiglu(device: str, n: int) -> None:
    gate, up = random(4, n) * 10, random(4, n, seed=1)
    gate[0, 0], gate[1, 0], gate[2, 0] = 100.0, -80.0, 0.0
    gate[3] = -88.6 - torch.arange(n) / n  # e^-x leaves fp32 on the way
    got = rows.swiglu(gate.to(device), up.to(device))
    assert got.dtype == torch.bfloat16
    want = gate.double() / (1 + (-gate.double()).exp()) * up.double()
    within(got, want, BF16 + of_exp(gate, 11), 4e-37 * float(up.abs().max()))
    gate[1, n - 1] = torch.nan
    broken = rows.swiglu(gate.to(device), up.to(device)).isnan()
    assert broken[1, n - 1]
    assert broken.sum() == 1


def check_choose(device: str, experts: int, top_k: int, normalize: bool) -> None:
    logits, bias = random(9, experts) * 2, random(experts, seed=1) * 0.1
    logits[3] -= 40
    on_device = logits.to(device), bias.to(device)
    ids, weights = rows.choose(*on_device, top_k, normalize=normalize, scale=2.5)
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
    ids = ids.cpu().long()
    scores = logits.double().sigmoid()
    biased = scores + bias.double()
    want = biased.topk(top_k).indices
    # Within the error of the scores any order is right.
    assert bool(((biased.gather(1, ids) - biased.gather(1, want)).abs() <= SCORES).all())
    assert all(len(set(row)) == top_k for row in ids.tolist())
    chosen = scores.gather(1, ids)
    expected = 2.5 * (chosen / (chosen.sum(1, keepdim=True) + 1e-20) if normalize else chosen)
    lowest = logits.gather(1, ids).amin(1, keepdim=True)
    within(weights, expected, 2 * of_exp(lowest, 10) + (top_k + 6) * FP32)
    # A row alone has the same bits.
    for row in (0, 8):
        alone = rows.choose(on_device[0][row : row + 1], on_device[1], top_k, normalize=normalize, scale=2.5)
        assert torch.equal(alone[0][0].cpu().long(), ids[row])
        assert torch.equal(alone[1][0], weights[row])


def check_ties(device: str) -> None:
    """Equal scores go to the lower expert, whatever their sign."""
    for experts in (20, 384):
        logits, bias = torch.zeros(4, experts), torch.zeros(experts)
        logits[1, 12:15] = 1.0
        logits[2] = -200.0  # a score of zero
        logits[3, 1::2] = 3.0
        for below in (0.0, -1.0, -torch.inf):
            ids, weights = rows.choose(
                logits.to(device), (bias + below).to(device), 5, normalize=True, scale=1.0
            )
            first = [0, 1, 2, 3, 4]
            every = below == -torch.inf
            assert ids.tolist() == [
                first,
                first if every else [12, 13, 14, 0, 1],
                first,
                first if every else [1, 3, 5, 7, 9],
            ]
            assert weights[0].tolist() == pytest.approx([0.2] * 5)


def check_lost_logits(device: str) -> None:
    """A row that holds what is no number still chooses different experts, and has weights that say so."""
    logits = torch.zeros(4, 24)
    logits[0] = torch.nan
    logits[1, 20] = torch.nan
    logits[2, 3] = torch.inf
    for normalize in (True, False):
        ids, weights = rows.choose(
            logits.to(device), torch.zeros(24, device=device), 6, normalize=normalize, scale=1.0
        )
        assert all(len(set(row)) == 6 and set(row) <= set(range(24)) for row in ids.tolist())
        assert weights[:2].isnan().all()
        assert ids[2, 0] == 3
        assert weights[3].tolist() == pytest.approx([1 / 6 if normalize else 0.5] * 6)


def check_prepare_attention(device: str, heads: int, nope: int, rope: int, latent: int) -> None:
    count = 3
    q, kv, norm = random(count, heads, nope + rope), random(count, latent + rope), random(latent, seed=1)
    angles = random(count, 1, rope // 2, seed=2) * 50
    cos, sin = angles.cos(), angles.sin()

    def prepared(some: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        of_q, of_kv, of_cos, of_sin = (x[some].to(device) for x in (q, kv, cos, sin))
        return rows.prepare_attention(of_q, of_kv, norm.to(device), 1e-6, of_cos, of_sin)

    q_nope, q_rope, latents = prepared(slice(None))
    assert torch.equal(q_nope.cpu(), q[..., :nope].bfloat16())
    within(latents[:, :latent], norm_of(kv[:, :latent], norm, 1e-6), BF16 + NORM)
    for got, x in ((q_rope, q[..., nope:]), (latents[:, None, latent:], kv[:, None, latent:])):
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        turned = torch.view_as_real(pairs * torch.complex(cos.double(), sin.double())).flatten(-2)
        # Two products and their sum, each rounded: relative to the pair, since the sum may cancel.
        length = pairs.abs().repeat_interleave(2, dim=-1)
        off = (got.cpu().double() - turned).abs()
        assert bool((off <= BF16 * turned.abs() + 4 * FP32 * length).all())
    alone = prepared(slice(2, None))
    for one, all_ in zip(alone, (q_nope, q_rope, latents), strict=True):
        assert torch.equal(one[0], all_[2])


def check_fp8_rows(device: str, latent: int, rope: int) -> None:
    """The bytes of `Fp8Rows`, whatever the values: all magnitudes, both zeros, and what no scale can hold."""
    g = torch.Generator().manual_seed(latent)
    form = Fp8Rows(latent, rope)
    bits = torch.randint(-(2**15), 2**15, (16, latent + rope), generator=g, dtype=torch.int16)
    any_bits = bits.view(torch.bfloat16)
    values = torch.randn(24, latent + rope, generator=g)
    values *= torch.exp2(torch.randint(-150, 30, (24, 1), generator=g).float())
    small = torch.randn(8, latent + rope, generator=g) * torch.exp2(
        -torch.randint(0, 24, (8, latent + rope), generator=g).float()
    )
    broken = torch.randn(4, latent + rope, generator=g)
    for row, bad in enumerate((torch.nan, torch.inf, -torch.inf, -torch.nan)):
        broken[row, (latent - 1) * (row % 2)] = bad
    zeros = torch.zeros(2, latent + rope)
    zeros[1] = -0.0
    given = torch.cat([any_bits, *(x.bfloat16() for x in (values, small, broken, zeros))])
    slots = torch.randperm(len(given) + 7, generator=g)[: len(given)]
    stored = torch.full((len(given) + 7, form.row_bytes), 0x5A, dtype=torch.uint8)
    want = stored.index_copy(0, slots, form.encode(given))
    got = stored.to(device)
    rows.store_fp8(given.to(device), slots.to(device), got, latent=latent, group=128, exponents=(-117, 7))
    assert torch.equal(got.cpu(), want)


def check_split(device: str, experts: int, count: int, top_k: int) -> None:
    """What `HybridExperts` does in torch, to any set of experts on the card."""
    assert count * top_k <= MOST_CHOICES
    rates = SplitRates(expert_bytes=4, card=4, ram=2, bus=1)
    g = torch.Generator().manual_seed(experts + count)
    for here in (0, 1, experts // 3, experts):
        padded = torch.full((2, experts + 1), -1, dtype=torch.int32)
        padded[1, 1 + torch.randperm(experts, generator=g)[:here]] = torch.randperm(here, generator=g).int()
        slots = SimpleNamespace(padded=padded, experts=experts, counts=torch.zeros(2, experts), count=here)
        for kept in (None, rates):
            hybrid = HybridExperts(
                ReferenceExperts(), cast(DeviceSlots, slots), plain_experts, kept, use_weight=0.5
            )
            hybrid.prepare(count, top_k)
            limits = hybrid._limits[count, top_k].to(device)
            counts = slots.counts[1].clone().to(device)
            for absent in (0.0, 0.3, 1.0):
                ids = torch.rand(count, experts, generator=g).argsort(1)[:, :top_k].int()
                ids[torch.rand(ids.shape, generator=g) < absent] = -1
                want = hybrid.split(1, ids)
                got = split(ids.to(device), padded[1].to(device), limits, counts, 0.5)
                for ours, theirs in zip(got, want, strict=True):
                    assert ours.dtype == torch.int32
                    assert torch.equal(ours.cpu(), theirs)
            assert torch.equal(counts.cpu(), slots.counts[1])


def check_no_rows(device: str) -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    assert rows.rms_norm(empty(0, 8), empty(8), 1e-6).shape == (0, 8)
    assert rows.swiglu(empty(0, 8), empty(0, 8)).shape == (0, 8)
    chosen = rows.choose(empty(0, 8), empty(8), 3, normalize=True, scale=1.0)
    assert [x.shape for x in chosen] == [(0, 3), (0, 3)]
    angles = empty(0, 1, 2)
    made = rows.prepare_attention(empty(0, 3, 6), empty(0, 9), empty(5), 1e-6, angles, angles)
    assert [x.shape for x in made] == [(0, 3, 2), (0, 3, 4), (0, 9)]
    rows.store_fp8(
        empty(0, 9, dtype=torch.bfloat16),
        empty(0, dtype=torch.int64),
        empty(4, 17, dtype=torch.uint8),
        latent=5,
        group=128,
        exponents=(-117, 7),
    )
    none = split(
        empty(0, 3, dtype=torch.int32),
        empty(8, dtype=torch.int32),
        empty(1, dtype=torch.int32),
        empty(7),
        1.0,
    )
    assert none[0].shape == (0, 3)


def check_refusals(device: str) -> None:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device)

    x, angles = zeros(2, 8), zeros(2, 1, 2)
    ids, bf16 = x.int(), x.bfloat16()
    fp8: dict[str, Any] = {"latent": 4, "group": 128, "exponents": (-117, 7)}
    for call in (
        lambda: rows.rms_norm(x, zeros(7), 1e-6),
        lambda: rows.rms_norm(bf16, zeros(8), 1e-6),
        lambda: rows.rms_norm(x.T, zeros(2), 1e-6),
        lambda: rows.rms_norm(zeros(1, 40_000), zeros(40_000), 1e-6),
        lambda: rows.swiglu(x, zeros(2, 7)),
        lambda: rows.swiglu(x[:, :4], x[:, 4:]),
        lambda: rows.choose(x, zeros(7), 2, normalize=True, scale=1.0),
        lambda: rows.choose(x, zeros(8), 9, normalize=True, scale=1.0),
        lambda: rows.choose(x, zeros(8), 0, normalize=True, scale=1.0),
        lambda: rows.choose(zeros(2, 99), zeros(99), 65, normalize=True, scale=1.0),
        lambda: rows.choose(zeros(1, 5000), zeros(5000), 8, normalize=True, scale=1.0),
        lambda: rows.prepare_attention(x.view(2, 1, 8), x, zeros(5), 1e-6, angles, angles),
        lambda: rows.prepare_attention(x.view(2, 1, 8), x, zeros(4), 1e-6, angles, angles[:1]),
        lambda: rows.prepare_attention(x.view(2, 4, 2), x, zeros(4), 1e-6, angles, angles),
        lambda: rows.store_fp8(bf16, zeros(2).long(), zeros(3, 15).to(torch.uint8), **fp8),
        lambda: rows.store_fp8(x, zeros(2).long(), zeros(3, 16).to(torch.uint8), **fp8),
        lambda: rows.store_fp8(bf16, zeros(2).int(), zeros(3, 16).to(torch.uint8), **fp8),
        lambda: split(zeros(40, 8).int(), zeros(9).int(), zeros(9).int(), zeros(8), 1.0),
        lambda: split(ids, zeros(9).int(), zeros(8).int(), zeros(8), 1.0),
        lambda: split(ids, zeros(8).int(), zeros(9).int(), zeros(8), 1.0),
        lambda: split(ids.long(), zeros(9).int(), zeros(9).int(), zeros(8), 1.0),
    ):
        with pytest.raises(KernelError):
            call()
