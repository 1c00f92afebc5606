"""Integers that stand for numbers, made into bf16 by bit operations alone: they run on every card.

A word is four bytes that lie side by side, little-endian; what comes out has them in their order.

Triton's interpreter keeps bf16 as integers, multiplies those, truncates where a card rounds, and misreads
subnormals. So in it, and only there, `dot`, `to_fp32` and `to_bf16` take other ways to what a card computes.
"""

from __future__ import annotations

import importlib
from typing import Any

triton: Any = importlib.import_module("triton")
tl: Any = importlib.import_module("triton.language")

E4M3_UNIT = tl.constexpr(2.0**120)  # `e4m3` gives its values divided by this

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def to_fp32(x):
    """bf16 -> fp32, exactly."""
    if INTERPRETED:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def to_bf16(x):
    """fp32 -> bf16, to nearest even."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def dot(a, b, acc):
    """acc + a b: bf16 [m, k] and [k, n], exact products, sums in fp32."""
    if INTERPRETED:
        return tl.dot(to_fp32(a), to_fp32(b), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def e4m3(words):
    """int32 [rows, n] -> bf16 [rows, 4 * n]: the values of four e4m3 bytes a word, times 2^-120, exactly.

    e4m3 and bf16 both end a sign and an exponent with the mantissa, so a byte's bits need only be moved to
    where bf16 has them; the exponents' biases, 7 and 127, differ by 120. Subnormals of e4m3 become subnormals
    of bf16 with the same mantissa: their exponents, too, are 2^-6 and 2^-126. The two codes of NaN come out
    as +-480 * 2^-120.
    """
    # Two bytes at a time: 0 and 2, then 1 and 3.
    even = ((words << 4) & 0x07F007F0) | ((words << 8) & -0x7FFF8000)
    odd = ((words >> 4) & 0x07F007F0) | (words & -0x7FFF8000)
    halves = in_order(
        even.to(tl.int16), odd.to(tl.int16), (even >> 16).to(tl.int16), (odd >> 16).to(tl.int16)
    )
    return halves.to(tl.bfloat16, bitcast=True)


@triton.jit
def in_order(a, b, c, d):
    """Four [rows, n] -> [rows, 4 * n]: a's first, b's first, c's first, d's first, a's second, …"""
    both = tl.permute(tl.join(tl.join(a, b), tl.join(c, d)), (0, 1, 3, 2))
    return tl.reshape(both, (a.shape[0], 4 * a.shape[1]))


@triton.jit
def int8(words):
    """int32 [rows, n] -> bf16 [rows, 4 * n]: the values of four int8 bytes a word, exactly."""
    return in_order(_int8(words), _int8(words >> 8), _int8(words >> 16), _int8(words >> 24))


@triton.jit
def _int8(words):
    # The low byte plus 128 as the last bits of a mantissa of 2^23: conversions proper are slow on some cards.
    shifted = ((words & 0xFF) ^ 0x80) | 0x4B000000
    return to_bf16(shifted.to(tl.float32, bitcast=True) - (2.0**23 + 128))


@triton.jit
def int4(words):
    """int32 [rows, n] -> bf16 [rows, 8 * n]: nibble - 8 of eight nibbles a word, least significant first."""
    # Nibbles 0, 2, 4, 6 and 1, 3, 5, 7 are four a word each, like bytes; then every even before its odd.
    even = in_order(_int4(words), _int4(words >> 8), _int4(words >> 16), _int4(words >> 24))
    odd = in_order(_int4(words >> 4), _int4(words >> 12), _int4(words >> 20), _int4(words >> 28))
    return tl.reshape(tl.join(even, odd), (words.shape[0], 8 * words.shape[1]))


@triton.jit
def _int4(words):
    shifted = (words & 0xF) | 0x4B000000
    return to_bf16(shifted.to(tl.float32, bitcast=True) - (2.0**23 + 8))
