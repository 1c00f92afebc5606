"""What the memory modules promise: SMBIOS structures of type 17 ("Memory Device"), as firmware tells them.

Offsets are those of DMTF's DSP0134 (SMBIOS 3.7), section 7.18. Firmware is careless: fields may be absent or
senseless, and which channel a module sits on is told only by free text, if at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

TABLE = "sys/firmware/dmi/tables/DMI"
MEMORY_DEVICE, END_OF_TABLE = 17, 127
_TYPES = {0x18: "DDR3", 0x1A: "DDR4", 0x1B: "LPDDR", 0x1C: "LPDDR2", 0x1D: "LPDDR3", 0x1E: "LPDDR4",
          0x20: "HBM", 0x21: "HBM2", 0x22: "DDR5", 0x23: "LPDDR5", 0x24: "HBM3"}  # fmt: skip
_NO_RAM = (0x08, 0x09, 0x0A, 0x0B, 0x0C)  # ROM, flash, EEPROM, FEPROM, EPROM
_MOST_MT_S = 100_000
# "P0 CHANNEL A", "ChannelB-DIMM0", "NODE 0 CHANNEL 3 DIMM 0"
_BY_CHANNEL = re.compile(r"(.*?channel[ _-]?(?:[a-l](?![a-z])|[0-9]{1,2}))", re.IGNORECASE)
# "CPU1_DIMM_A2", "P1-DIMMA1", "DIMM_P0_A0": a letter names the channel, the number behind it the slot
_BY_LETTER = re.compile(r"(.*dimm[ _-]?(?:p[0-9][_-]?)?[a-l])[ _-]?[0-9]$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Module:
    """A slot for memory, with a module or without.

    Attributes:
        slot: the firmware's name of it.
        channel: what slots on one channel share; None if no name tells.
        size_bytes: 0 if the slot is empty.
        kind: "DDR5", …; empty if not told.
        width_bits: of data, without error correction; 0 if not told.
        mt_s: million transfers a second that it runs at; 0 if not told.
        rated_mt_s: that it is capable of; 0 if not told.
    """

    slot: str
    channel: str | None
    size_bytes: int
    kind: str
    width_bits: int
    mt_s: int
    rated_mt_s: int


@dataclass(frozen=True, slots=True)
class Promise:
    """What all modules together can deliver.

    Attributes:
        gb_s: 10⁹ bytes a second: transfers times width, over all channels that have a module.
        channels: of those.
        certain: every populated channel is known. Otherwise each module counts as a channel of its own, and
            two modules that share one are counted twice.
        empty: names of channels without a module, or of empty slots where the channels are not known.
    """

    gb_s: float
    channels: int
    certain: bool
    empty: tuple[str, ...]


def read_modules(root: Path = Path("/")) -> tuple[Module, ...] | None:
    """The memory slots of this machine; None where the firmware's table is not there.

    Raises:
        PermissionError: only root may read it.
    """
    try:
        table = (root / TABLE).read_bytes()
    except PermissionError:
        raise
    except OSError:
        return None
    return parse_modules(table)


def parse_modules(table: bytes) -> tuple[Module, ...]:
    """All memory slots in an SMBIOS table; structures that are cut off end it."""
    modules = (_module(data, strings) for kind, data, strings in _structures(table) if kind == MEMORY_DEVICE)
    return tuple(module for module in modules if module is not None)


def promised(modules: Sequence[Module]) -> Promise | None:
    """What `modules` can deliver; None if the speed or width of one is not told."""
    present = [module for module in modules if module.size_bytes]
    if not present or any(not module.mt_s or not module.width_bits for module in present):
        return None
    certain = all(module.channel for module in modules)
    channels: dict[str, list[Module]] = {}
    for at, module in enumerate(modules):
        name = module.channel if certain and module.channel else f"{module.slot} #{at}"
        channels.setdefault(name, []).append(module)
    gb_s = 0.0
    empty = []
    for name, members in channels.items():
        filled = [module for module in members if module.size_bytes]
        if filled:
            width = max(module.width_bits for module in filled)
            gb_s += min(module.mt_s for module in filled) * width / 8 / 1000
        else:
            empty.append(name if certain else members[0].slot)
    return Promise(gb_s, len(channels) - len(empty), certain, tuple(empty))


def _structures(table: bytes) -> Iterator[tuple[int, bytes, list[str]]]:
    """(type, formatted area, strings) of every whole structure."""
    at = 0
    while at + 4 <= len(table):
        kind, length = table[at], table[at + 1]
        end = table.find(b"\0\0", at + length)
        if length < 4 or end < 0 or kind == END_OF_TABLE:
            return
        texts = table[at + length : end].split(b"\0")
        yield kind, table[at : at + length], [text.decode("latin-1").strip() for text in texts]
        at = end + 2


def _module(data: bytes, strings: list[str]) -> Module | None:
    def number(offset: int, size: int) -> int:
        return int.from_bytes(data[offset : offset + size], "little") if offset + size <= len(data) else 0

    def text(offset: int) -> str:
        index = number(offset, 1)
        return strings[index - 1] if 1 <= index <= len(strings) else ""

    if number(0x12, 1) in _NO_RAM:
        return None
    slot, bank = text(0x10), text(0x11)
    width = number(0x0A, 2)
    rated = _speed(number(0x15, 2), number(0x54, 4))
    return Module(
        slot=slot or bank or "unnamed slot",
        channel=_channel(slot, bank),
        size_bytes=_size(number(0x0C, 2), number(0x1C, 4)),
        kind=_TYPES.get(number(0x12, 1), ""),
        width_bits=width if 8 <= width <= 4096 else 0,
        mt_s=_speed(number(0x20, 2), number(0x58, 4)) or rated,
        rated_mt_s=rated,
    )


def _size(size: int, extended: int) -> int:
    """Bytes; 0 for an empty slot, and for a size that the firmware calls unknown (0xFFFF)."""
    if size == 0xFFFF:
        return 0
    if size == 0x7FFF:
        return (extended & 0x7FFFFFFF) << 20
    return (size & 0x7FFF) << (10 if size & 0x8000 else 20)


def _speed(speed: int, extended: int) -> int:
    found = extended & 0x7FFFFFFF if speed == 0xFFFF else speed
    return found if found <= _MOST_MT_S else 0


def _channel(slot: str, bank: str) -> str | None:
    for text, pattern in ((bank, _BY_CHANNEL), (slot, _BY_CHANNEL), (slot, _BY_LETTER), (bank, _BY_LETTER)):
        match = pattern.match(text)
        if match:
            return match[1].strip()
    return None
