"""Random tensor content, generated at memory speed, reproducible from (seed, tensor name) alone.

The numbers keep a random model well-behaved at any depth: a linear layer maps rows of root mean square 1 to
about 1, so activations neither vanish nor blow up, and the router's scores differ from token to token.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from k2hybrid.checkpoint.names import ExpectedTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CHUNK_BYTES = 1 << 18  # generated and written while it lies in the L2 cache
_SIGN = 0x8000
_ONE = 0x3F80  # bf16 1.0
_Q_RMS = math.sqrt(17.5)  # of q in −7…7 as `_nibbles` draws it: zero twice as often as any other
_BIAS_STD = 0.02  # of the router's correction bias: reorders close scores only


def content(tensor: ExpectedTensor, seed: int) -> Iterator[NDArray[np.generic]]:
    """The bytes of `tensor` in pieces."""
    role = tensor.key.role
    if role.endswith(".shape"):
        raise KeyError(f"{tensor.name} is not random")
    count = math.prod(tensor.shape)
    if role == "router_bias":
        normal = np.random.Generator(_bits(tensor.name, seed)).standard_normal(count, dtype=np.float32)
        yield normal * np.float32(_BIAS_STD)
    elif role.endswith(".packed"):
        for words in _words(tensor.name, seed, count * 4):
            yield _nibbles(words)
    elif role.endswith(".scale"):
        # The codes of [low, 2·low): their root mean square is 1.53 · low.
        low = 1 / (1.53 * _Q_RMS * math.sqrt(tensor.shape[1] * 32))
        yield from _codes(tensor.name, seed, count, 0x007F, _code(low))
    elif len(tensor.shape) == 1:
        yield from _codes(tensor.name, seed, count, 0x001F, _ONE - 16)  # norms: 0.94 … 1.12
    else:
        rms = 1.0 if role == "embed_tokens" else 1 / math.sqrt(tensor.shape[1])
        # The codes of ±[low, 4·low): their root mean square is 2.41 · low.
        yield from _codes(tensor.name, seed, count, _SIGN | 0x00FF, _code(rms / 2.41))


def _bits(name: str, seed: int) -> np.random.BitGenerator:
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    return np.random.SFC64(
        np.random.SeedSequence(seed, spawn_key=tuple(np.frombuffer(digest, "<u4").tolist()))
    )


def _words(name: str, seed: int, nbytes: int) -> Iterator[NDArray[np.uint64]]:
    """Random words, the last piece cut to a whole word that may hold up to 7 bytes too many."""
    bits = _bits(name, seed)
    for start in range(0, nbytes, _CHUNK_BYTES):
        yield bits.random_raw(-(-min(_CHUNK_BYTES, nbytes - start) // 8))


def _codes(name: str, seed: int, count: int, mask: int, base: int) -> Iterator[NDArray[np.uint16]]:
    """`count` bf16 codes, `base` plus random bits under `mask`; consecutive codes are consecutive floats."""
    left = count
    for words in _words(name, seed, count * 2):
        codes = words.view(np.uint16)[:left]
        codes &= np.uint16(mask)
        codes += np.uint16(base)
        left -= codes.size
        yield codes


def _nibbles(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Nibbles 1…15 (q −7…7) from random words, in place: 0 becomes 8, so that q = 0 is twice as likely."""
    used = words | words >> np.uint64(1)
    used |= used >> np.uint64(2)
    np.invert(used, out=used)
    used &= np.uint64(0x1111_1111_1111_1111)
    words |= used << np.uint64(3)
    return words


def _code(value: float) -> int:
    """The bf16 code of a positive number, rounded down."""
    return int(np.float32(value).view(np.uint32)) >> 16
