"""Reasoning in an opaque string that a client keeps and gives back: nothing of it has to be kept here.

`k2s1.` + base64url(digest + zlib(text)). The digest tells damage from what came whole; it is no secret, since
a client may say anything about the past as it is. Strings that others sealed are told by their beginning.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import zlib

MAX_REASONING_BYTES = 16 << 20  # once unpacked: half a body's limit, and far beyond any context
_PREFIX = "k2s1."
_DIGEST_BYTES = 8


def seal(reasoning: str) -> str:
    """`reasoning` as a string of URL-safe ASCII."""
    raw = reasoning.encode()
    packed = base64.urlsafe_b64encode(_digest(raw) + zlib.compress(raw))
    return _PREFIX + packed.decode().rstrip("=")


def unseal(text: str) -> str | None:
    """The reasoning in a sealed string; None if it is not one of ours, damaged, or too large."""
    if not text.startswith(_PREFIX) or not text.isascii():
        return None
    body = text[len(_PREFIX) :]
    try:
        data = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        unpacking = zlib.decompressobj()
        raw = unpacking.decompress(data[_DIGEST_BYTES:], MAX_REASONING_BYTES + 1)
        whole = unpacking.eof and not unpacking.unused_data
        if len(raw) > MAX_REASONING_BYTES or not whole or _digest(raw) != data[:_DIGEST_BYTES]:
            return None
        return raw.decode()
    except (binascii.Error, zlib.error, UnicodeDecodeError):
        return None


def _digest(raw: bytes) -> bytes:
    return hashlib.sha256(raw).digest()[:_DIGEST_BYTES]
