"""Checksums that are known of a checkpoint's files, and computing them.

Sources: the cache of huggingface_hub, whose blobs are named by their hash; the `.metadata` files it leaves in
a folder; and a list beside the files, as `sha256sum` writes it. Large files are known by sha256, small ones
by git's hash: sha1 of "blob SIZE\\0" and the content.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from k2hybrid.checkpoint.strict_json import read_bounded
from k2hybrid.errors import CheckpointError

if TYPE_CHECKING:
    from hashlib import _Hash

METADATA = ".cache/huggingface/download"
_LISTS = ("SHA256SUMS", "SHA256SUMS.txt", "sha256sums", "sha256sums.txt", "sha256sum.txt", "checksums.sha256")
_LIST_LINE = re.compile(r"\\?([0-9a-fA-F]{64}) [ *](?:\./)?(\S.*)")
_LIST_LIMIT_BYTES = 16 << 20
_METADATA_LIMIT_BYTES = 4096

_KINDS: dict[int, Literal["sha256", "git"]] = {64: "sha256", 40: "git"}


class Checksum(NamedTuple):
    """What the hash of a file should be. `source` says who knows it, for messages."""

    kind: Literal["sha256", "git"]
    digest: str
    source: str

    def started(self, nbytes: int) -> _Hash:
        """A hash object for a file of `nbytes` bytes, to be fed with all of them."""
        if self.kind == "sha256":
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % nbytes, usedforsecurity=False)


def checksum(digest: str, source: str) -> Checksum | None:
    """The checksum that a hub's hash of 40 or 64 hexadecimal digits stands for, or None for anything else."""
    kind = _KINDS.get(len(digest))
    if kind is None or not re.fullmatch("[0-9a-f]+", digest):
        return None
    return Checksum(kind, digest, source)


def known_checksums(folder: Path) -> dict[str, list[Checksum]]:
    """File of `folder` → what is known of it; files of which nothing is known are left out."""
    listed = _listed(folder)
    known: dict[str, list[Checksum]] = {}
    for name in sorted(os.listdir(folder)):
        found = [_of_link(folder / name), _of_metadata(folder, name), listed.get(name)]
        checksums = [one for one in found if one is not None]
        if checksums and (folder / name).is_file():
            # Two sources that say the same are one hash to compute.
            known[name] = list({one.digest: one for one in checksums}.values())
    return known


def _of_link(path: Path) -> Checksum | None:
    try:
        target = Path(os.readlink(path))
    except OSError:
        return None
    return checksum(target.name, "the cache's name of it") if target.parent.name == "blobs" else None


def _of_metadata(folder: Path, name: str) -> Checksum | None:
    found = download_metadata(folder, name)
    return None if found is None else found[0]


def download_metadata(folder: Path, name: str) -> tuple[Checksum, float] | None:
    """What huggingface_hub noted of a file it put into `folder`: its hash, and when (seconds since 1970)."""
    path = folder / METADATA / f"{name}.metadata"
    try:
        data = read_bounded(path, _METADATA_LIMIT_BYTES, CheckpointError)
        _, digest, seconds, *_ = data.decode("ascii").split("\n")
        found = checksum(digest.strip(), "its download's metadata")
        return None if found is None else (found, float(seconds))
    except (CheckpointError, ValueError):
        return None


def write_download_metadata(folder: Path, name: str, commit: str, digest: str) -> None:
    """Note it the same way. OSError."""
    path = folder / METADATA / f"{name}.metadata"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{commit}\n{digest}\n{time.time()}\n", "ascii")


def _listed(folder: Path) -> dict[str, Checksum]:
    found: dict[str, Checksum] = {}
    for name in _LISTS:
        try:
            text = read_bounded(folder / name, _LIST_LIMIT_BYTES, CheckpointError).decode("utf-8", "replace")
        except CheckpointError:
            continue
        for line in text.splitlines():
            if match := _LIST_LINE.fullmatch(line):
                found[match[2]] = Checksum("sha256", match[1].lower(), name)
    return found
