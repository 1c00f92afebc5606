"""Pages as files, one each, named by their key. A file is whole or it is not there.

    magic[8] version:u32 tokens:u32 payload_bytes:u64 parent[16] payload_crc:u32 header_crc:u32
    the page's token ids, int32 · the payload                                    (little-endian)

The header's checksum covers the header and the ids, so that a scan need not read the payload. A file is
written under a temporary name and renamed. It is not synced: what a killed process wrote is in the kernel's
hands, and after a power cut the checksums tell. Knows nothing of sessions or limits, and does not lock.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from k2hybrid.cache.page_keys import ID_BYTES, KEY_BYTES, next_key
from k2hybrid.cache.private_files import (
    Bytes,
    create_file,
    make_folder,
    open_file,
    read_all,
    views_of,
    write_all,
)

_MAGIC = b"K2PAGE\r\n"
_VERSION = 1
_HEADER = struct.Struct(f"<8sIIQ{KEY_BYTES}sII")
_CRC_BYTES = 4
_SUFFIX = ".page"
_TEMPORARY = ".tmp"


class Damaged(Exception):  # noqa: N818 - a finding, not a failure: the page counts as absent
    """A file is not what its name or its reader says; the message is the reason."""


@dataclass(slots=True)
class PageFile:
    """What is known of a page on disk without its payload."""

    parent: bytes
    packed: bytes  # its token ids
    size: int  # bytes of the file
    used: float  # unix seconds


class _Header(NamedTuple):
    parent: bytes
    packed: bytes
    payload_bytes: int
    payload_crc: int
    size: int
    modified: float


class PageFiles:
    """The page files of one folder, which is created if it is not there and `create` is set.

    Args:
        page_bytes: the largest payload; None where no payload is read or written.
    """

    def __init__(self, folder: Path, page_bytes: int | None, *, create: bool) -> None:
        self._folder = folder
        self._page_bytes = page_bytes
        self._serial = 0
        if create:
            make_folder(folder)

    def scan(self, now: float) -> Iterator[tuple[str, bytes, PageFile | str]]:
        """(file name, key, page or what is wrong with it) for every file that is there.

        Remains of interrupted writes and foreign names come with an empty key.
        """
        try:
            names = sorted(os.listdir(self._folder))
        except FileNotFoundError:
            return
        for name in names:
            key = _key_of(name)
            if not key:
                reason = "its write was interrupted" if name.endswith(_TEMPORARY) else "its name is no page's"
                yield name, b"", reason
                continue
            try:
                fd = open_file(self._folder / name)
                try:
                    header = self._header(fd, key)
                finally:
                    os.close(fd)
            except FileNotFoundError:  # deleted meanwhile
                continue
            except Damaged as damage:
                yield name, key, str(damage)
            except OSError as error:
                yield name, key, str(error)
            else:
                # A clock that went back must not keep a page forever.
                yield (
                    name,
                    key,
                    PageFile(header.parent, header.packed, header.size, min(header.modified, now)),
                )

    def stored_bytes(self, packed: bytes, payload: Bytes | Sequence[Bytes]) -> int:
        """Size of the file that would hold this page."""
        return _HEADER.size + len(packed) + sum(len(view) for view in views_of(payload))

    def prepare(self, key: bytes, parent: bytes, packed: bytes, payload: Bytes | Sequence[Bytes]) -> Path:
        """Write a page under a temporary name, which `publish` takes. OSError leaves nothing behind."""
        views = views_of(payload)
        payload_bytes = sum(len(view) for view in views)
        if self._page_bytes is None or not 0 < payload_bytes <= self._page_bytes:
            raise ValueError(f"a page has up to {self._page_bytes} bytes, not {payload_bytes}")
        tokens = len(packed) // ID_BYTES
        fields = (_MAGIC, _VERSION, tokens, payload_bytes, parent, _checksum(views))
        header = _HEADER.pack(*fields, 0)[:-_CRC_BYTES]
        header += zlib.crc32(packed, zlib.crc32(header)).to_bytes(_CRC_BYTES, "little")
        self._serial += 1
        path = self._folder / f"{key.hex()}.{self._serial}{_TEMPORARY}"
        fd = create_file(path)
        try:
            write_all(fd, [memoryview(header + packed), *views])
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        return path

    def publish(self, prepared: Path, key: bytes) -> None:
        """Give a prepared page its name."""
        try:
            prepared.rename(self._path(key))
        except BaseException:
            prepared.unlink(missing_ok=True)
            raise

    def read(self, key: bytes, parent: bytes, packed: bytes, out: Bytes | Sequence[Bytes]) -> None:
        """Fill `out`, whose size must be the payload's. Damaged or OSError; `out` is undefined then."""
        views = views_of(out)
        fd = open_file(self._path(key))
        try:
            header = self._header(fd, key)
            if header.parent != parent:
                raise Damaged("it follows another page")
            if header.packed != packed:
                raise Damaged("it is of other tokens")
            if header.payload_bytes != sum(len(view) for view in views):
                raise Damaged(
                    f"its payload has {header.payload_bytes:,} bytes, which is not what is read here"
                )
            if not read_all(fd, header.size - header.payload_bytes, views):
                raise Damaged("it became shorter")
            if _checksum(views) != header.payload_crc:
                raise Damaged("the checksum of its payload is wrong")
        finally:
            os.close(fd)

    def touch(self, key: bytes) -> None:
        """Note on disk that the page was used now."""
        os.utime(self._path(key))

    def remove(self, key: bytes) -> None:
        """Delete the file; nothing happens if it is gone."""
        self._path(key).unlink(missing_ok=True)

    def remove_name(self, name: str) -> None:
        """The same for a name that `scan` gave."""
        (self._folder / name).unlink(missing_ok=True)

    def _path(self, key: bytes) -> Path:
        return self._folder / (key.hex() + _SUFFIX)

    def _header(self, fd: int, key: bytes) -> _Header:
        status = os.fstat(fd)
        head = os.pread(fd, _HEADER.size, 0)
        if len(head) < _HEADER.size:
            raise Damaged("it is shorter than a header")
        magic, version, tokens, payload_bytes, parent, payload_crc, header_crc = _HEADER.unpack(head)
        if magic != _MAGIC:
            raise Damaged("it is no page file")
        if version != _VERSION:
            raise Damaged(f"its version is {version}, not {_VERSION}")
        if _HEADER.size + ID_BYTES * tokens + payload_bytes != status.st_size:
            raise Damaged(f"its {status.st_size:,} bytes are not as many as its header says")
        packed = os.pread(fd, ID_BYTES * tokens, _HEADER.size)
        if zlib.crc32(packed, zlib.crc32(head[:-_CRC_BYTES])) != header_crc:
            raise Damaged("the checksum of its header is wrong")
        if next_key(parent, packed) != key:
            raise Damaged("its name is not that of its tokens")
        if self._page_bytes is not None and not 0 < payload_bytes <= self._page_bytes:
            raise Damaged(f"its payload has {payload_bytes:,} bytes; a page has up to {self._page_bytes:,}")
        return _Header(parent, packed, payload_bytes, payload_crc, status.st_size, status.st_mtime)


def _key_of(name: str) -> bytes:
    """The key in a page's file name; empty if it is none."""
    stem = name.removesuffix(_SUFFIX)
    try:
        key = bytes.fromhex(stem)
    except ValueError:
        return b""
    return key if name == key.hex() + _SUFFIX and len(key) == KEY_BYTES else b""


def _checksum(views: Sequence[memoryview]) -> int:
    crc = 0
    for view in views:
        crc = zlib.crc32(view, crc)
    return crc
