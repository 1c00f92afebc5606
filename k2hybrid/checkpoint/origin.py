"""Where a checkpoint folder was downloaded from, and the command that goes on with the download.

A folder of the Hugging Face cache says it by its own place, `models--OWNER--NAME/snapshots/COMMIT`; one that
`k2hybrid pull --dir` fills has a record in it.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path

from k2hybrid.checkpoint.strict_json import parse_object, read_bounded
from k2hybrid.errors import CheckpointError

RECORD = ".cache/k2hybrid/pull.json"
_LIMIT_BYTES = 1 << 16

# The hub's own rules: no "--" (it parts owner and name in the cache), no "..", so nothing leads elsewhere.
_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPO = re.compile(rf"(?!.*(?:--|\.\.)){_NAME}/{_NAME}")
_REVISION = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_]|[./-](?!\.)){0,200}")
_SNAPSHOTS = re.compile(r"models--(.+)--(.+)")


@dataclass(frozen=True, slots=True)
class Origin:
    """A repository of a hub. `revision` None: its main branch; `endpoint` None: the default hub."""

    repo: str
    revision: str | None = None
    endpoint: str | None = None

    def command(self, folder: Path | None = None) -> str:
        """The command that downloads it, or goes on with that, into the cache or into `folder`."""
        words = ["k2hybrid", "pull", self.repo]
        for option, value in (
            ("--revision", self.revision),
            ("--dir", folder),
            ("--endpoint", self.endpoint),
        ):
            words += [option, str(value)] if value is not None else []
        return shlex.join(words)


def is_repo_name(text: str) -> bool:
    """Whether `text` is OWNER/NAME as a hub allows it."""
    return _REPO.fullmatch(text) is not None


def is_revision(text: str) -> bool:
    """Whether `text` can be a branch, a tag or a commit, and a path below `refs/`."""
    return _REVISION.fullmatch(text) is not None and not text.endswith(("/", ".lock")) and "//" not in text


def cache_name(repo: str) -> str:
    """The folder of `repo` in the cache."""
    return "models--" + repo.replace("/", "--")


def origin_of(folder: Path) -> tuple[Origin, Path | None] | None:
    """(where `folder` is from, itself if it is no part of the cache), or None where nothing says so."""
    snapshot = Path(folder).absolute()
    parts = _SNAPSHOTS.fullmatch(snapshot.parent.parent.name)
    if parts is not None and snapshot.parent.name == "snapshots" and is_repo_name("/".join(parts.groups())):
        return Origin("/".join(parts.groups()), _revision(snapshot)), None
    try:
        record = parse_object(
            read_bounded(snapshot / RECORD, _LIMIT_BYTES, CheckpointError), "", CheckpointError
        )
    except CheckpointError:
        return None
    repo, revision, endpoint = record.get("repo"), record.get("revision"), record.get("endpoint")
    if type(repo) is not str or not is_repo_name(repo):
        return None
    return Origin(
        repo,
        revision if type(revision) is str and is_revision(revision) else None,
        endpoint if type(endpoint) is str and endpoint.isprintable() else None,
    ), Path(folder)


def _revision(snapshot: Path) -> str | None:
    """What to ask for to get this snapshot: nothing where it is the main branch's, else the commit."""
    try:
        main = (snapshot.parent.parent / "refs" / "main").read_text("ascii")[:100].strip()
    except (OSError, ValueError):
        return None
    return None if main == snapshot.name or not is_revision(snapshot.name) else snapshot.name


def how_to_resume(folder: Path) -> str:
    """ ": COMMAND" for the end of a message, or nothing where `folder` does not say where it is from."""
    found = origin_of(folder)
    return "" if found is None else f": {found[0].command(found[1])}"


def write_record(folder: Path, origin: Origin) -> None:
    """Leave a record of `origin` in `folder`. OSError."""
    path = folder / RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(origin)) + "\n", "utf-8")
