"""The folder a journal lies in: private, locked by one process, with a subfolder for each fingerprint."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from k2hybrid.cache.private_files import make_folder, open_file
from k2hybrid.errors import ConfigError

_LOCK = "lock"
_FINGERPRINT = re.compile(r"[0-9a-f]{8,128}")


def is_fingerprint(name: str) -> bool:
    """Whether `name` can be a fingerprint: 8 to 128 hex digits."""
    return _FINGERPRINT.fullmatch(name) is not None


def check_folder(folder: Path, *, create: bool) -> None:
    """ConfigError unless `folder` is a folder that only we may enter; `create` makes it, not its parents."""
    try:
        if create:
            make_folder(folder)
        status = folder.stat()
        owners = {status.st_uid, folder.lstat().st_uid}  # a link to it must be ours as well
    except FileNotFoundError:
        reason = f"its parent {folder.parent} does not exist" if create else "there is no such folder"
        raise ConfigError(f"cannot use the journal {folder}: {reason}") from None
    except OSError as error:
        raise ConfigError(f"cannot use the journal {folder}: {_reason(error)}") from None
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"cannot use the journal {folder}: it is not a folder")
    if owners != {os.geteuid()}:
        raise ConfigError(f"the journal {folder} belongs to another user; choose a folder of your own")
    if status.st_mode & 0o077:
        raise ConfigError(
            f"the journal {folder} can be entered by other users (mode {stat.S_IMODE(status.st_mode):o}); "
            f"run: chmod 700 {folder}"
        )


def fingerprints(folder: Path) -> list[str]:
    """The fingerprints that have a subfolder."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if is_fingerprint(e.name) and e.is_dir(follow_symlinks=False))


class FolderLock:
    """Holds `folder` for this process until `release` or the process's end. ConfigError if another has it."""

    def __init__(self, folder: Path) -> None:
        path = folder / _LOCK
        try:
            self._fd = open_file(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise ConfigError(f"cannot write in the journal {folder}: {_reason(error)}") from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            pid = os.pread(self._fd, 20, 0).strip().decode("ascii", "replace")
            os.close(self._fd)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                holder = f"the process {pid}" if pid.isdigit() else "another process"
                raise ConfigError(
                    f"the journal {folder} is in use by {holder}; stop it, or choose another folder"
                ) from None
            raise ConfigError(f"cannot lock the journal {folder}: {_reason(error)}") from None

    def release(self) -> None:
        """Let others have the folder; nothing happens if it is released."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True, slots=True)
class Foreign:
    """A subfolder of another fingerprint: known by its size and age alone."""

    path: Path
    size: int  # bytes
    used: float  # unix seconds

    def remove(self) -> None:
        """Delete it with all that is in it. OSError if something stays."""
        shutil.rmtree(self.path)


def measure_foreign(path: Path, now: float) -> Foreign:
    """Size and last use of all files below `path`; none of them is read."""
    size, used = 0, path.stat().st_mtime
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                status = os.lstat(os.path.join(folder, name))
            except FileNotFoundError:
                continue
            size += status.st_size
            used = max(used, status.st_mtime)
    return Foreign(path, size, min(used, now))


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
