"""Downloads a checkpoint from a Hugging Face hub, or goes on with a download; nothing in it is executed.

Small files come first: a model that this runtime cannot run is refused before its weights are fetched, and
the index says which weights those are.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Protocol

from k2hybrid.checkpoint.hub import NEEDED, cache_folder
from k2hybrid.checkpoint.hub_files import HubFiles, RemoteFile, matches
from k2hybrid.checkpoint.index import INDEX_NAME, read_weight_map
from k2hybrid.checkpoint.origin import Origin
from k2hybrid.checkpoint.pull_target import CacheTarget, FolderTarget, Target
from k2hybrid.checkpoint.reading import Stopped
from k2hybrid.checkpoint.spec import read_spec
from k2hybrid.errors import CheckpointError, DownloadError

_SMALL = (".json", ".jinja", ".model")
_SPARE_BYTES = 64 << 20  # metadata, and others who write to the disk
_CONNECTIONS = 8


class Progress(Protocol):
    """Is told how far a download is, from several threads."""

    def expect(self, nbytes: int, present: int) -> None:
        """There are `nbytes` more bytes in all, of them `present` from before."""

    def add(self, nbytes: int) -> None:
        """So many came; negative: so many are given up."""


class Silent:
    """A Progress nobody watches."""

    def expect(self, nbytes: int, present: int) -> None:
        """Nothing."""

    def add(self, nbytes: int) -> None:
        """Nothing."""


def free_bytes(folder: Path) -> int:
    """Free on the disk of `folder`, for this user."""
    return shutil.disk_usage(folder).free


class Pull:
    """One download into the cache, or into `folder`."""

    def __init__(
        self,
        origin: Origin,
        folder: Path | None = None,
        *,
        cache: Path | None = None,
        progress: Progress | None = None,
        free: Callable[[Path], int] = free_bytes,
    ) -> None:
        """
        Args:
            cache: None: the one that huggingface_hub uses.
            free: bytes that can still be written below a folder.

        Raises:
            DownloadError: huggingface_hub is not installed, or `origin` is impossible.
        """
        self._hub = HubFiles(origin)
        self._folder = folder
        self._cache = cache
        self._progress = progress or Silent()
        self._free = free
        self._stop = Event()
        self.command = origin.command(folder)

    def run(self) -> Path:
        """Fetch what is missing; the checkpoint's folder.

        Raises:
            DownloadError: with what is wrong and, where that helps, the command that goes on.
            CheckpointError: the repository holds no model that this runtime can run.
        """
        commit, files = self._hub.listing()
        if lacking := [name for name in NEEDED if name not in files]:
            raise DownloadError(
                f"{self._hub.origin.repo} is no checkpoint in the published layout; it has no "
                f"{', '.join(lacking)}"
            )
        try:
            target = self._target(commit)
            self._fetch_all(target, commit, [file for file in files.values() if file.name.endswith(_SMALL)])
            read_spec(target.folder)
            shards = sorted(set(read_weight_map(target.folder / INDEX_NAME).values()))
            absent = [name for name in shards if name not in files]
            if absent:
                raise DownloadError(
                    f"{self._hub.origin.repo} has no {', '.join(absent[:8])}, which its index names; "
                    f"{len(absent)} of {len(shards)} shards are not there"
                )
            self._fetch_all(target, commit, [files[name] for name in shards])
        except OSError as error:
            raise DownloadError(f"{error}; go on with: {self.command}") from error
        return target.folder

    def _target(self, commit: str) -> Target:
        origin = self._hub.origin
        if self._folder is not None:
            return FolderTarget(self._folder, origin, commit)
        return CacheTarget(cache_folder() if self._cache is None else self._cache, origin, commit)

    def _fetch_all(self, target: Target, commit: str, files: Sequence[RemoteFile]) -> None:
        """All that `target` lacks of `files`, several at once."""
        wanted = [file for file in files if not target.has(file, self._stop)]
        # Two files of one content are one blob in the cache.
        missing = list({target.partial(file): file for file in wanted}.values())
        present = sum(_size(target.partial(file), file.nbytes) for file in missing)
        still = sum(file.nbytes for file in missing) - present
        free = self._free(target.folder)
        if missing and still + _SPARE_BYTES > free:
            raise DownloadError(
                f"{still / 1e9:.1f} GB are still missing, but {target.folder} has {free / 1e9:.1f} GB free; "
                f"make room, or choose another disk with --dir; go on with: {self.command}"
            )
        self._progress.expect(still + present, present)
        failures: list[str] = []
        pool = ThreadPoolExecutor(_CONNECTIONS)
        try:
            for name, reason in pool.map(lambda file: self._fetch(target, commit, file), missing):
                failures += [] if reason is None else [f"{name}: {reason}"]
        finally:
            # After an interruption nobody waits for what is on its way; connections end by themselves.
            self._stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
        self._stop.clear()
        if failures:
            raise DownloadError(_together(failures, len(missing), self.command))
        for file in files:
            target.show(file)

    def _fetch(self, target: Target, commit: str, file: RemoteFile) -> tuple[str, str | None]:
        """One file, until it is in its place; (name, why not)."""
        partial = target.partial(file)
        try:
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            with open(descriptor, "r+b", buffering=0) as out:
                if not _locked(descriptor, partial):
                    return file.name, "another process is fetching it"
                if os.fstat(descriptor).st_size > file.nbytes:
                    out.truncate(0)
                self._hub.fetch(file, commit, out, self._stop, self._progress.add)
                if not matches(partial, file, self._stop):
                    out.truncate(0)  # nothing of it can be trusted
                    self._progress.add(-file.nbytes)
                    return (
                        file.name,
                        f"its content does not have the hub's {file.checksum.kind} hash; thrown away",
                    )
                os.fsync(descriptor)  # its name will promise this content, after a power cut as well
                target.place(file)
        except Stopped:
            return file.name, "stopped"
        except (CheckpointError, OSError) as error:
            return file.name, str(error)
        return file.name, None


def _size(partial: Path, most: int) -> int:
    try:
        size = partial.stat().st_size
    except OSError:
        return 0
    return size if size <= most else 0


def _locked(descriptor: int, path: Path) -> bool:
    """Lock an open file against other downloads; False if one has it, or has just finished with it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _together(failures: Iterable[str], count: int, command: str) -> str:
    lines = list(failures)
    shown = "".join(f"\n  - {line}" for line in lines[:20]) + ("\n  …" if len(lines) > 20 else "")
    return f"{len(lines)} of {count} files could not be fetched:{shown}\ngo on with: {command}"
