"""Names of pages outside the pool: a key stands for a page's tokens, all before them, and their scope.

Keys form a chain: `root_key(scope)`, then `next_key(parent, tokens of the page)`. Whoever derives a key
therefore knows the whole prefix, and a page is found for the prefix and the scope it was computed for alone.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

KEY_BYTES = 16
ID_BYTES = 4


class PageKey(NamedTuple):
    """One page of a history: its tokens are `ids[start:stop]`."""

    key: bytes
    parent: bytes
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Found:
    """A page on disk or in RAM, of which the first `rows` tokens, at least one, are those of a history."""

    key: bytes
    parent: bytes
    ids: tuple[int, ...]  # all its tokens, as reading wants them
    rows: int


def pack_ids(ids: Sequence[int]) -> bytes:
    """Token ids as little-endian int32. ValueError if one does not fit."""
    try:
        return struct.pack(f"<{len(ids)}i", *ids)
    except struct.error as error:
        raise ValueError(f"not a list of token ids: {error}") from None


def unpack_ids(packed: bytes) -> tuple[int, ...]:
    """The reverse of `pack_ids`. ValueError if `packed` is not a whole number of ids."""
    if len(packed) % ID_BYTES:
        raise ValueError(f"{len(packed)} bytes are not a whole number of token ids")
    return struct.unpack(f"<{len(packed) // ID_BYTES}i", packed)


def root_key(scope: str) -> bytes:
    """The parent of a scope's first pages; no page has it as its own key."""
    scope_bytes = scope.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(scope_bytes, digest_size=KEY_BYTES, person=b"k2hybrid scope").digest()


def next_key(parent: bytes, packed: bytes) -> bytes:
    """The key of the page that holds the tokens `packed` (see `pack_ids`) after the page `parent`."""
    return hashlib.blake2b(parent + packed, digest_size=KEY_BYTES, person=b"k2hybrid page").digest()


def page_keys(scope: str, ids: Sequence[int], page_tokens: int) -> list[PageKey]:
    """The pages of a history, first to last. A partly filled last page has a key of its own."""
    packed = pack_ids(ids)
    keys = []
    parent = root_key(scope)
    for start in range(0, len(ids), page_tokens):
        stop = min(start + page_tokens, len(ids))
        key = next_key(parent, packed[start * ID_BYTES : stop * ID_BYTES])
        keys.append(PageKey(key, parent, start, stop))
        parent = key
    return keys


def common_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    if one == other:
        return len(one)
    rows = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        rows += 1
    return rows
