"""Reading /proc and /sys: whatever is missing, refused or garbled reads as "not told", never as a crash."""

from __future__ import annotations

import os
import re
from pathlib import Path

MOST_IDS = 1 << 16  # no machine numbers CPUs or nodes beyond; a garbled range must not fill the memory


def read_text(path: Path) -> str:
    """The file's text without surrounding blanks; empty if it cannot be read."""
    return _read(path) or ""


def read_int(path: Path) -> int | None:
    """The file's one whole number; None if it holds something else."""
    return whole_number(read_text(path))


def whole_number(text: str) -> int | None:
    """`text` as a decimal number, perhaps negative; None if it is none."""
    return int(text) if re.fullmatch(r"-?[0-9]{1,20}", text) else None


def parse_ids(text: str) -> tuple[int, ...] | None:
    """The kernel's list format, `0-3,8,10-11`, ascending and without repetition; None if garbled.

    An empty text is an empty list: nodes without CPUs say so.
    """
    found: set[int] = set()
    for part in text.strip().split(",") if text.strip() else ():
        match = re.fullmatch(r"\s*([0-9]{1,9})(?:-([0-9]{1,9}))?\s*", part)
        if match is None:
            return None
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= MOST_IDS:
            return None
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def read_ids(path: Path) -> tuple[int, ...] | None:
    """The file's list of ids; None if it is missing or garbled."""
    text = _read(path)
    return None if text is None else parse_ids(text)


def format_ids(ids: tuple[int, ...]) -> str:
    """The inverse of `parse_ids`: `0-3,8`."""
    parts: list[str] = []
    start = 0
    for at in range(1, len(ids) + 1):
        if at == len(ids) or ids[at] != ids[at - 1] + 1:
            first, last = ids[start], ids[at - 1]
            parts.append(str(first) if first == last else f"{first}-{last}")
            start = at
    return ",".join(parts)


def field(text: str, key: str) -> str:
    """The value of a line `key : value`; empty if there is none."""
    match = re.search(rf"^{re.escape(key)}[ \t]*:[ \t]*(.*)$", text, re.MULTILINE)
    return match[1].strip() if match else ""


def kb_field(text: str, key: str) -> int | None:
    """Bytes of a line `key: N kB`, as in /proc/meminfo and, behind `Node N`, in a node's meminfo."""
    match = re.search(rf"^(?:Node\s+[0-9]+\s+)?{re.escape(key)}:\s*([0-9]{{1,20}}) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def chosen_word(text: str) -> str:
    """The word in brackets of a choice such as `always [madvise] never`; empty if there is none."""
    match = re.search(r"\[(\w+)\]", text)
    return match[1] if match else ""


def entries(folder: Path) -> list[str]:
    """Names in a folder, ascending; none if it cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def numbered(folder: Path, prefix: str) -> dict[int, Path]:
    """Entries `prefix` + number of a folder, by number, ascending."""
    found = {}
    for name in entries(folder):
        number = whole_number(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if number is not None and 0 <= number < MOST_IDS:
            found[number] = folder / name
    return dict(sorted(found.items()))


def parse_size(text: str) -> int | None:
    """Bytes of a cache's size, `32768K`; None if garbled."""
    match = re.fullmatch(r"([0-9]{1,12})([KMG]?)", text)
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]] if match else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", "replace").strip()
    except (OSError, ValueError):
        return None
