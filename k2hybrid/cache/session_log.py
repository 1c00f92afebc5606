"""The model's answers of one session: an append-only file of framed records, each with its checksum.

    magic[8] · for each answer: length:u32 · crc:u32 of the length's bytes and the record · the record, JSON

A file is read up to its first bad frame; what follows is the torn end of an interrupted write, and is cut off
before anything is appended.
"""

from __future__ import annotations

import base64
import json
import os
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from k2hybrid.cache.page_keys import KEY_BYTES, pack_ids, unpack_ids
from k2hybrid.cache.private_files import make_folder, open_file, write_all

_MAGIC = b"K2LOG1\r\n"
_FRAME = struct.Struct("<II")
_SUFFIX = ".log"
_SESSION = re.compile(r"[A-Za-z0-9_-]{1,128}")
_PAGE = re.compile(rf"(?:[0-9a-f]{{{2 * KEY_BYTES}}})?")
_MAX_INT = 1 << 53


@dataclass(frozen=True, slots=True)
class Exchange:
    """One answer of the model, and what it takes to continue it. ValueError if a field is bad."""

    session: str  # 1 to 128 letters, digits, `_` and `-`; also the file's name
    response_id: str
    scope: str  # digest; nothing is shared between scopes
    context_key: str
    message_key: str
    ids: tuple[int, ...]  # the generated tokens
    reasoning: str
    created: int  # unix seconds
    last_page: str  # hex key of the last page of prompt and answer; "": none
    tokens: int  # of the whole history

    def __post_init__(self) -> None:
        for name in ("response_id", "scope", "context_key", "message_key", "reasoning"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is no text")
        for name in ("created", "tokens"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < _MAX_INT:
                raise ValueError(f"{name} is no number from 0 on")
        if not isinstance(self.session, str) or not _SESSION.fullmatch(self.session):
            raise ValueError("a session's id is made of 1 to 128 letters, digits, _ and -")
        if not isinstance(self.last_page, str) or not _PAGE.fullmatch(self.last_page):
            raise ValueError("last_page is neither a page's key in hex nor empty")
        pack_ids(self.ids)

    @property
    def last_key(self) -> bytes:
        """The key of the last page; empty if there is none."""
        return bytes.fromhex(self.last_page)


@dataclass(frozen=True, slots=True)
class LogContent:
    """A log as it was found."""

    exchanges: tuple[Exchange, ...]
    good_bytes: int  # what comes after is torn; 0: not even the beginning is good
    size: int
    used: float  # unix seconds


class SessionLogs:
    """The logs of one folder, which is created if it is not there and `create` is set. Does not lock."""

    def __init__(self, folder: Path, *, create: bool) -> None:
        self._folder = folder
        if create:
            make_folder(folder)

    def sessions(self) -> list[str]:
        """Ids of the sessions that have a log."""
        try:
            names = sorted(os.listdir(self._folder))
        except FileNotFoundError:
            return []
        stems = [name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)]
        return [stem for stem in stems if _SESSION.fullmatch(stem)]

    def read(self, session: str, now: float) -> LogContent:
        """What is in a log. OSError if it cannot be read."""
        with open(open_file(self._path(session)), "rb") as file:
            status = os.fstat(file.fileno())
            exchanges: list[Exchange] = []
            good_bytes = 0
            if file.read(len(_MAGIC)) == _MAGIC:
                good_bytes = len(_MAGIC)
                while (exchange := _read_frame(file, status.st_size - good_bytes, session)) is not None:
                    exchanges.append(exchange)
                    good_bytes = file.tell()
        return LogContent(tuple(exchanges), good_bytes, status.st_size, min(status.st_mtime, now))

    def cut(self, session: str, size: int) -> None:
        """Cut a log to its first `size` bytes."""
        os.truncate(self._path(session), size)

    def append(self, exchange: Exchange) -> int:
        """Add an answer to its session's log; by how many bytes the log grew. OSError leaves it as it was."""
        record = _encode(exchange)
        fd = open_file(self._path(exchange.session), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            before = os.fstat(fd).st_size
            frame = record if before else _MAGIC + record
            try:
                write_all(fd, [memoryview(frame)])
            except OSError:
                os.ftruncate(fd, before)
                raise
        finally:
            os.close(fd)
        return len(frame)

    def touch(self, session: str) -> None:
        """Note on disk that the session was used now."""
        os.utime(self._path(session))

    def remove(self, session: str) -> None:
        """Delete the log; nothing happens if it is gone."""
        self._path(session).unlink(missing_ok=True)

    def _path(self, session: str) -> Path:
        return self._folder / (session + _SUFFIX)


def _encode(exchange: Exchange) -> bytes:
    fields = {name: getattr(exchange, name) for name in Exchange.__slots__}
    fields["ids"] = base64.b64encode(pack_ids(exchange.ids)).decode()
    # ASCII with escapes: text with half a surrogate pair survives as well.
    record = json.dumps(fields, separators=(",", ":")).encode()
    length = len(record).to_bytes(4, "little")
    return length + zlib.crc32(record, zlib.crc32(length)).to_bytes(4, "little") + record


def _read_frame(file: BinaryIO, left: int, session: str) -> Exchange | None:
    """The next answer, or None if there is no good frame in the `left` bytes that follow."""
    head = file.read(_FRAME.size)
    if len(head) < _FRAME.size:
        return None
    length, crc = _FRAME.unpack(head)
    if length > left - _FRAME.size:
        return None
    record = file.read(length)
    if len(record) < length or zlib.crc32(record, zlib.crc32(head[:4])) != crc:
        return None
    try:
        fields = json.loads(record)
        exchange = Exchange(**{**fields, "ids": unpack_ids(base64.b64decode(fields["ids"], validate=True))})
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return exchange if exchange.session == session else None
