"""Where a download puts its files: the Hugging Face cache, or a plain folder, laid out as huggingface_hub's.

In both a file is written under a name of its own, `….incomplete`, that a later run finds again, and takes its
place when its hash is right.
"""

from __future__ import annotations

import os
from pathlib import Path
from threading import Event
from typing import Protocol

from k2hybrid.checkpoint.checksums import METADATA, download_metadata, write_download_metadata
from k2hybrid.checkpoint.hub_files import RemoteFile, matches
from k2hybrid.checkpoint.origin import Origin, cache_name, write_record


class Target(Protocol):
    """`folder` is what will be the checkpoint. OSError where the disk fails."""

    folder: Path

    def has(self, file: RemoteFile, stop: Event) -> bool:
        """Whether the file is there, with this hash."""

    def partial(self, file: RemoteFile) -> Path:
        """Where it is while it is not whole."""

    def place(self, file: RemoteFile) -> None:
        """Put the partial file, which is whole by now, into its place."""

    def show(self, file: RemoteFile) -> None:
        """Make the file that is in its place part of the checkpoint."""


class CacheTarget:
    """`blobs/HASH`, `snapshots/COMMIT/NAME` → blob, `refs/REVISION` = commit."""

    def __init__(self, cache: Path, origin: Origin, commit: str) -> None:
        repository = cache / cache_name(origin.repo)
        self.folder = repository / "snapshots" / commit
        self._blobs = repository / "blobs"
        for folder in (self.folder, self._blobs):
            folder.mkdir(parents=True, exist_ok=True)
        revision = origin.revision or "main"
        if revision != commit:
            ref = repository / "refs" / revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            beside = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
            beside.write_text(commit, "ascii")
            beside.replace(ref)

    def has(self, file: RemoteFile, stop: Event) -> bool:
        """By name and size: a blob is named by its hash, and only put there when that was right."""
        blob = self._blobs / file.checksum.digest
        return blob.is_file() and blob.stat().st_size == file.nbytes

    def partial(self, file: RemoteFile) -> Path:
        """Beside the blobs."""
        return self._blobs / f"{file.checksum.digest}.incomplete"

    def place(self, file: RemoteFile) -> None:
        """Rename to the blob, then link to it."""
        self.partial(file).replace(self._blobs / file.checksum.digest)
        self.show(file)

    def show(self, file: RemoteFile) -> None:
        """Link to the blob."""
        link, target = self.folder / file.name, os.path.join("..", "..", "blobs", file.checksum.digest)
        if not (link.is_symlink() and os.readlink(link) == target):
            beside = self.folder / f".{file.name}.{os.getpid()}.tmp"
            beside.unlink(missing_ok=True)
            beside.symlink_to(target)
            beside.replace(link)


class FolderTarget:
    """Files by their names, and `.cache/huggingface/download/NAME.metadata` with the hash of each."""

    def __init__(self, folder: Path, origin: Origin, commit: str) -> None:
        self.folder = folder
        self._commit = commit
        (folder / METADATA).mkdir(parents=True, exist_ok=True)
        write_record(folder, origin)

    def has(self, file: RemoteFile, stop: Event) -> bool:
        """By size and metadata; where there is none, the file is read. CheckpointError if it cannot be."""
        path = self.folder / file.name
        if not path.is_file() or path.stat().st_size != file.nbytes:
            return False
        known = download_metadata(self.folder, file.name)
        # A second of tolerance, as huggingface_hub has: not every file system keeps finer times.
        if known is not None and path.stat().st_mtime - 1 <= known[1]:
            return known[0].digest == file.checksum.digest
        return matches(path, file, stop)

    def partial(self, file: RemoteFile) -> Path:
        """Beside the metadata: a folder with nothing but whole files looks finished too early."""
        return self.folder / METADATA / f"{file.name}.{file.checksum.digest}.incomplete"

    def place(self, file: RemoteFile) -> None:
        """Rename, then note the hash."""
        self.partial(file).replace(self.folder / file.name)
        self.show(file)

    def show(self, file: RemoteFile) -> None:
        """Note the hash."""
        write_download_metadata(self.folder, file.name, self._commit, file.checksum.digest)
