"""Reasoning in an opaque string that a client keeps and gives back: nothing of it has to be kept here.

`k2s1.` + base64url(digest + zlib(text)). The digest tells damage from what came whole; it is no secret, since
a client may say anything about the past as it is. Strings that others sealed are told by their beginning.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import zlib

# Once unpacked: far beyond any context.
MAX_REASONING_BYTES = 16 << 20  # in one string
MAX_UNSEALED_BYTES = 32 << 20  # in all strings of a request; a body's limit
_PREFIX = "k2s1."
_DIGEST_BYTES = 8
_STEP_BYTES = 1 << 20  # unpacked at a time


def seal(reasoning: str) -> str:
    """`reasoning` as a string of URL-safe ASCII."""
    raw = reasoning.encode()
    packed = base64.urlsafe_b64encode(_digest(raw) + zlib.compress(raw))
    return _PREFIX + packed.decode().rstrip("=")


class Unsealing:
    """Reads back sealed reasoning, up to a size that a whole request has in common.

    What others sealed, what is damaged and what is too much counts as no reasoning. All that was unpacked
    counts against the size, whatever came of it.
    """

    def __init__(self, max_bytes: int = MAX_UNSEALED_BYTES) -> None:
        self._left = max_bytes

    def text(self, sealed: str | None) -> str:
        """The reasoning in a sealed string; "" if there is none to be had."""
        if not sealed or self._left <= 0 or not sealed.startswith(_PREFIX) or not sealed.isascii():
            return ""
        body = sealed[len(_PREFIX) :]
        try:
            data = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
            raw = self._unpacked(data[_DIGEST_BYTES:])
            return raw.decode() if raw and _digest(raw) == data[:_DIGEST_BYTES] else ""
        except (binascii.Error, zlib.error, UnicodeDecodeError):
            return ""

    def _unpacked(self, data: bytes) -> bytes | None:
        """All of `data`; None if it is too much or no whole stream."""
        unpacking = zlib.decompressobj()
        limit = min(self._left, MAX_REASONING_BYTES)
        pieces: list[bytes] = []
        while not unpacking.eof:
            if limit < 0:
                return None
            step = min(limit + 1, _STEP_BYTES)
            self._left -= step  # before it can fail
            piece = unpacking.decompress(data, step)
            self._left += step - len(piece)
            limit -= len(piece)
            pieces.append(piece)
            data = unpacking.unconsumed_tail
            if not piece and not data:  # it ends too early
                break
        whole = limit >= 0 and unpacking.eof and not unpacking.unused_data
        return b"".join(pieces) if whole else None


def _digest(raw: bytes) -> bytes:
    return hashlib.sha256(raw).digest()[:_DIGEST_BYTES]
