"""How one token's latent row lies in memory: plain numbers, or the latent in FP8 with scales of its own.

A row has two parts: the latent, and the rotated key part that all heads share. `Fp8Rows` stores

    latent values, one e4m3 byte each · an fp32 scale per 128 of them · the rotated key part in bf16

656 bytes at Kimi-K2's 512 + 64 values. A value is scale · e4m3. Scales are powers of two, so a value is exact
in bf16 (e4m3 has four significant bits), whoever decodes it: no kernel rounds where another does not.
"""

from __future__ import annotations

from typing import Protocol

import torch

from k2hybrid.cache.row_sizes import GROUP, fp8_groups, row_bytes
from k2hybrid.errors import ConfigError
from k2hybrid.kernels.rows import store_fp8

LARGEST_E4M3 = 448.0
# Of a scale's exponent. Above, a value no longer fits the factor of `decode`: 448 · 2⁷ is the largest latent.
# Below, e4m3's smallest number, 2⁻⁹, would become subnormal in bf16, which dot products may flush to zero.
_MAX_EXPONENT, _MIN_EXPONENT = 7, -117
_BIAS, _MANTISSA_BITS = 127, 23  # of fp32
_NAN_BITS = 0x7FC00000
_MANTISSA_ABOVE_448 = 0x1FFFFF  # added to fp32 bits, it carries where the mantissa exceeds 1.75
# e4m3's bits, moved to bf16's places, mean the same number times 2⁻¹²⁰: the biases are 7 and 127.
_BITS_TO_VALUE = 2.0**120


class RowFormat(Protocol):
    """How one token's latent row lies in memory. Bytes are opaque to `LatentPages`."""

    @property
    def name(self) -> str:
        """What options and figures call it."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""

    @property
    def latent_dim(self) -> int:
        """Values of one row."""

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [n, latent_dim], bf16 or fp32 -> uint8 [n, row_bytes]."""

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        """uint8 [n, row_bytes] -> [n, latent_dim]: a view where the format allows it."""

    def put(self, rows: torch.Tensor, slots: torch.Tensor, stored: torch.Tensor) -> None:
        """Encode rows [n, latent_dim] to `slots`, int64 [n], of `stored`, uint8 [·, row_bytes]."""


class _PlainRows:
    """Rows stored as plain numbers of one type."""

    def __init__(self, name: str, latent_dim: int, dtype: torch.dtype) -> None:
        self.name = name
        self.latent_dim = latent_dim
        self.row_bytes = row_bytes(name, latent_dim, 0)
        self.dtype = dtype

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.to(self.dtype).contiguous().view(torch.uint8)

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        return stored.view(self.dtype)

    def put(self, rows: torch.Tensor, slots: torch.Tensor, stored: torch.Tensor) -> None:
        stored.index_copy_(0, slots, self.encode(rows))


class Bf16Rows(_PlainRows):
    """The latent and the rotated key part in bf16: 1,152 bytes at Kimi-K2's 512 + 64 values."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__("bf16", latent_dim, torch.bfloat16)


class Fp32Rows(_PlainRows):
    """The same rows in fp32, for tests against a reference only."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__("fp32", latent_dim, torch.float32)


class Fp8Rows:
    """The latent in e4m3 with a scale per `GROUP` values, the rotated key part in bf16. Decoding copies.

    A group's scale is the smallest power of two under which its largest value is at most 448: a row's bytes
    depend on that row alone. Finite values beyond 57,344 saturate (a normed latent is at most √512 times its
    weight). A group that holds a NaN or an infinity decodes to NaN as a whole: what is broken stays visible,
    as it does in bf16. No byte is ever one of e4m3's NaNs.

    Args:
        latent: values of the latent; a last group may be short.
        rope: values of the rotated key part.
    """

    name = "fp8"

    def __init__(self, latent: int, rope: int) -> None:
        self.latent = latent
        self.rope = rope
        self.latent_dim = latent + rope
        self.groups = fp8_groups(latent)
        self.row_bytes = row_bytes(self.name, latent, rope)
        self._scales = slice(latent, self.row_bytes - 2 * rope)

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        n = rows.shape[0]
        stored = torch.empty((n, self.row_bytes), dtype=torch.uint8, device=rows.device)
        scales = torch.empty((n, self.groups), dtype=torch.float32, device=rows.device)
        values = rows[:, : self.latent].to(torch.float32, copy=True)
        for of_values, of_scales in self._grouped(values, scales):
            of_scales.copy_(_scale_of(of_values.abs().amax(-1, keepdim=True)))
            of_values.mul_(of_scales.reciprocal())
        # What is NaN here has a scale that says so.
        values.clamp_(-LARGEST_E4M3, LARGEST_E4M3).nan_to_num_(0.0)
        stored[:, : self.latent] = values.to(torch.float8_e4m3fn).view(torch.uint8)
        # As bytes: a row of odd sizes has its scales at any address.
        stored[:, self._scales] = scales.view(torch.uint8)
        rope = rows[:, self.latent :].to(torch.bfloat16).contiguous()
        stored[:, self._scales.stop :] = rope.view(torch.uint8)
        return stored

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        """uint8 [n, row_bytes] -> bf16 [n, latent_dim], a copy; scales are all it needs besides."""
        n = stored.shape[0]
        rows = torch.empty((n, self.latent_dim), dtype=torch.bfloat16, device=stored.device)
        rows.view(torch.uint8)[:, 2 * self.latent :] = stored[:, self._scales.stop :]
        # Bits are moved where they are wanted: torch's own conversion takes ten times as long on a CPU.
        bits = rows.view(torch.int16)[:, : self.latent]
        bits.copy_(stored[:, : self.latent].view(torch.int8))  # sign in bit 7 and, extended, all above
        bits.bitwise_left_shift_(4).bitwise_and_(~0x7800)  # sign, and bits 4 to 10
        scales = torch.empty((n, self.groups), dtype=torch.float32, device=stored.device)
        scales.view(torch.uint8).copy_(stored[:, self._scales])
        factors = scales.mul_(_BITS_TO_VALUE).to(torch.bfloat16)
        for of_values, of_factors in self._grouped(rows[:, : self.latent], factors):
            of_values.mul_(of_factors)
        return rows

    def put(self, rows: torch.Tensor, slots: torch.Tensor, stored: torch.Tensor) -> None:
        """See `RowFormat.put`. On a card one launch: a decode step has it in every layer."""
        if rows.is_cuda and rows.dtype == torch.bfloat16:
            exponents = _MIN_EXPONENT, _MAX_EXPONENT
            store_fp8(rows, slots, stored, latent=self.latent, group=GROUP, exponents=exponents)
        else:
            stored.index_copy_(0, slots, self.encode(rows))

    def _grouped(self, values: torch.Tensor, scales: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Views: values [n, latent] by group with scales [n, groups], [n, g, GROUP] with [n, g, 1]."""
        whole = self.latent // GROUP
        pairs = []
        if whole:
            pairs.append((values[:, : whole * GROUP].view(-1, whole, GROUP), scales[:, :whole, None]))
        if whole < self.groups:
            pairs.append((values[:, None, whole * GROUP :], scales[:, whole:, None]))
        return pairs


def _scale_of(largest: torch.Tensor) -> torch.Tensor:
    """Powers of two, fp32, by the largest magnitude of each group, fp32 ≥ 0; NaN where that is not finite."""
    bits = largest.view(torch.int32)
    broken = bits >= 255 << _MANTISSA_BITS
    exponent = ((bits + _MANTISSA_ABOVE_448) >> _MANTISSA_BITS) - _BIAS - 8
    exponent.clamp_(_MIN_EXPONENT, _MAX_EXPONENT)
    return ((exponent + _BIAS) << _MANTISSA_BITS).masked_fill_(broken, _NAN_BITS).view(torch.float32)


def row_format(name: str, latent: int, rope: int) -> RowFormat:
    """The format that options call `name`, for rows of `latent` + `rope` values; ConfigError."""
    if name == "fp8":
        return Fp8Rows(latent, rope)
    if name == "bf16":
        return Bf16Rows(latent + rope)
    raise ConfigError(f"latent rows are bf16 or fp8, not {name!r}")
