"""Writes SMBIOS tables as firmware does, for machines that are not here."""

from __future__ import annotations

import struct
from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """A memory slot; `size_mb` 0: empty."""

    name: str
    bank: str = ""
    size_mb: int = 65536
    mt_s: int = 4800
    rated_mt_s: int = 4800
    width_bits: int = 64
    kind: int = 0x22


def structure(kind: int, body: bytes, strings: tuple[str, ...] = ()) -> bytes:
    """Type, length, handle, body; then strings, and an empty one at the end."""
    texts = b"".join(text.encode() + b"\0" for text in strings) or b"\0"
    return struct.pack("<BBH", kind, 4 + len(body), 0x1100) + body + texts + b"\0"


def memory_device(slot: Slot, length: int = 0x5C) -> bytes:
    """Type 17, cut to `length` bytes as older firmware has it (0x15, 0x1B, 0x22, 0x28, 0x54, 0x5C)."""
    body = bytearray(0x5C)
    strings = [text for text in (slot.name, slot.bank) if text]
    extended = slot.size_mb >= 0x7FFF
    struct.pack_into("<HH", body, 0x08, slot.width_bits + 8, slot.width_bits)
    struct.pack_into("<H", body, 0x0C, 0x7FFF if extended else slot.size_mb)
    body[0x10] = strings.index(slot.name) + 1 if slot.name else 0
    body[0x11] = len(strings) if slot.bank else 0
    body[0x12] = slot.kind
    struct.pack_into("<H", body, 0x15, min(slot.rated_mt_s, 0xFFFF))
    struct.pack_into("<I", body, 0x1C, slot.size_mb if extended else 0)
    struct.pack_into("<H", body, 0x20, min(slot.mt_s, 0xFFFF))
    struct.pack_into("<II", body, 0x54, slot.rated_mt_s, slot.mt_s)
    return structure(17, bytes(body[4:length]), tuple(strings))


def table(slots: list[Slot]) -> bytes:
    """A table with other structures around the slots."""
    head = structure(0, bytes(0x14), ("Vendor", "1.0")) + structure(16, bytes(0x13))
    return head + b"".join(map(memory_device, slots)) + structure(127, b"")
