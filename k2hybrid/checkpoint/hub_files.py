"""What a Hugging Face hub says about a repository, and fetching one file of it; through huggingface_hub.

A hub's answers are not trusted: only plain file names with a size and a hash are taken from them.
"""

from __future__ import annotations

import errno
import importlib
import re
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, NamedTuple

from k2hybrid.checkpoint.checksums import Checksum, checksum
from k2hybrid.checkpoint.origin import Origin, is_repo_name, is_revision
from k2hybrid.checkpoint.reading import Reader, Stopped
from k2hybrid.errors import DownloadError

if TYPE_CHECKING:
    from collections.abc import Iterable

_TIMEOUT_S = 30
_MAX_BYTES = 1 << 50
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_INSTALL = "pip install 'k2hybrid[hub]'"


class RemoteFile(NamedTuple):
    """A file at the top of a repository."""

    name: str
    nbytes: int
    checksum: Checksum


class Listing(NamedTuple):
    """What a revision of a repository holds: files in its folders, and strange ones, are left out."""

    commit: str
    files: dict[str, RemoteFile]


class HubFiles:
    """One repository at a hub.

    Raises:
        DownloadError: huggingface_hub is not installed, or `origin` is impossible.
    """

    def __init__(self, origin: Origin) -> None:
        if not is_repo_name(origin.repo):
            raise DownloadError(f"{origin.repo!r} is no repository; name it OWNER/NAME")
        if origin.revision is not None and not is_revision(origin.revision):
            raise DownloadError(f"{origin.revision!r} is no revision; name a branch, a tag or a commit")
        if origin.endpoint is not None and not re.fullmatch(r"https?://[^\s/]+(/\S*)?", origin.endpoint):
            raise DownloadError(f"{origin.endpoint!r} is no address of a hub; it begins with https://")
        try:
            self._hub: Any = importlib.import_module("huggingface_hub")
            self._errors: Any = importlib.import_module("huggingface_hub.errors")
            self._http_get: Any = importlib.import_module("huggingface_hub.file_download").http_get
            utils: Any = importlib.import_module("huggingface_hub.utils")
        except ImportError:
            raise DownloadError(
                f"downloads need huggingface_hub, which is not installed: {_INSTALL}"
            ) from None
        utils.disable_progress_bars("huggingface_hub.http_get")  # there is one bar for all files
        # As a file is on disk, not as it could be packed for the way: ranges count bytes of the file.
        self._headers = {**utils.build_hf_headers(library_name="k2hybrid"), "Accept-Encoding": "identity"}
        # The hub's own error is derived from its HTTP library's, and from OSError.
        self._failures: tuple[type[BaseException], ...] = (
            *self._errors.HfHubHTTPError.__bases__,
            OSError,
            ValueError,
        )
        self.origin = origin
        endpoint = None if origin.endpoint is None else origin.endpoint.rstrip("/")
        self._api = self._hub.HfApi(endpoint=endpoint, library_name="k2hybrid")
        self._place = f"{origin.repo} at {self._api.endpoint}"

    def listing(self) -> Listing:
        """Ask for commit and files. DownloadError if the hub cannot be reached, or has no such repository."""
        try:
            found = self._api.model_info(
                self.origin.repo, revision=self.origin.revision, files_metadata=True, timeout=_TIMEOUT_S
            )
            commit, siblings = found.sha, found.siblings or ()
        except self._failures as error:
            raise DownloadError(self._reason(error)) from error
        except (TypeError, KeyError, AttributeError) as error:
            raise DownloadError(f"{self._place}: the answer is no hub's ({error})") from error
        if type(commit) is not str or not _COMMIT.fullmatch(commit):
            raise DownloadError(f"{self._place}: the answer names no commit")
        return Listing(commit, {file.name: file for file in _usable(siblings)})

    def fetch(
        self, file: RemoteFile, commit: str, out: FileIO, stop: Event, progress: Callable[[int], object]
    ) -> None:
        """Append what `out` lacks of the file. Broken connections are taken up again while bytes come.

        Raises:
            DownloadError: the hub failed, or the disk is full.
            Stopped: `stop` was set.
        """
        url = self._hub.hf_hub_url(self.origin.repo, file.name, revision=commit, endpoint=self._api.endpoint)
        counted = _Counted(out, stop, progress)
        have = counted.size()
        while have < file.nbytes:
            try:
                self._http_get(
                    url,
                    counted,
                    resume_size=have,
                    headers=self._headers,
                    expected_size=file.nbytes,
                    displayed_filename=file.name,
                )
            except self._failures as error:
                had, have = have, counted.size()
                if not had < have < file.nbytes or getattr(error, "errno", None) == errno.ENOSPC:
                    raise DownloadError(self._reason(error)) from error
            else:
                have = counted.size()

    def _reason(self, error: BaseException) -> str:
        if isinstance(error, self._errors.GatedRepoError):
            return f"{self._place} is gated; ask for access on its page, then `hf auth login`"
        if isinstance(error, self._errors.RepositoryNotFoundError):
            return f"there is no {self._place}, or it is private (then `hf auth login`)"
        if isinstance(error, self._errors.RevisionNotFoundError):
            return f"{self._place} has no revision {self.origin.revision!r}"
        if getattr(error, "errno", None) == errno.ENOSPC:
            return "the disk is full"
        text = str(error).strip() or type(error).__name__
        return f"{self._place}: {text.splitlines()[0]}"


class _Counted:
    """An unbuffered file: what huggingface_hub calls of it, with progress, and with an end on demand."""

    def __init__(self, out: FileIO, stop: Event, progress: Callable[[int], object]) -> None:
        self._out = out
        self._stop = stop
        self._progress = progress
        self.seek, self.tell = out.seek, out.tell
        out.seek(0, 2)

    def size(self) -> int:
        """Bytes there are."""
        return self._out.seek(0, 2)

    def write(self, data: bytes) -> int:
        """Append."""
        if self._stop.is_set():
            raise Stopped
        rest = memoryview(data)
        while rest:
            count = self._out.write(rest)
            self._progress(count)
            rest = rest[count:]
        return len(data)

    def truncate(self) -> int:
        """Cut off behind the position: a server that cannot resume begins again."""
        at = self._out.tell()
        self._progress(at - self.size())
        self._out.seek(at)
        return self._out.truncate()


def _usable(siblings: Iterable[Any]) -> Iterable[RemoteFile]:
    for one in siblings:
        name, lfs = one.rfilename, getattr(one, "lfs", None)
        nbytes = one.size if lfs is None else lfs.size
        digest = one.blob_id if lfs is None else lfs.sha256
        if type(name) is not str or not _FILE_NAME.fullmatch(name):
            continue
        known = checksum(digest, "the hub") if type(digest) is str else None
        if known is not None and type(nbytes) is int and 0 <= nbytes <= _MAX_BYTES:
            yield RemoteFile(name, nbytes, known)


def matches(path: Path, file: RemoteFile, stop: Event) -> bool:
    """Whether the content of `path` has the hash of `file`. CheckpointError if it cannot be read."""
    with Reader(path) as reader:
        running = file.checksum.started(reader.nbytes)
        for _, chunk in reader.chunks(stop, lambda _: None):
            running.update(chunk)
    return running.hexdigest() == file.checksum.digest
