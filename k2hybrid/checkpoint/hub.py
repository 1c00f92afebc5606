"""Models by name: an existing folder, or OWNER/NAME in the Hugging Face cache. Nothing here goes online.

The cache's layout (huggingface_hub's guide to it): `models--OWNER--NAME/refs/main` holds a commit,
`snapshots/COMMIT/` has links into `blobs/`.
"""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import Any

from k2hybrid.checkpoint.index import INDEX_NAME, lacking, missing_shards, read_weight_map
from k2hybrid.checkpoint.origin import cache_name, how_to_resume, is_repo_name, origin_of
from k2hybrid.errors import IncompleteError, ModelNotFoundError, ShardIndexError

# What `k2hybrid serve` reads beside the shards and the files a checkpoint may lack.
NEEDED = ("config.json", INDEX_NAME, "tiktoken.model", "tokenizer_config.json")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def cache_folder() -> Path:
    """The cache that huggingface_hub uses, as it says itself where it is installed."""
    try:
        constants: Any = importlib.import_module("huggingface_hub.constants")
    except ImportError:
        return Path(documented_cache())
    return Path(constants.HF_HUB_CACHE)


def documented_cache() -> str:
    """The same by its documentation: HF_HUB_CACHE, or `hub` in HF_HOME, or in the user's cache."""
    home = os.environ.get("HF_HOME")
    if home is None:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    hub = os.path.join(_expanded(home), "hub")
    return _expanded(os.environ.get("HF_HUB_CACHE", os.environ.get("HUGGINGFACE_HUB_CACHE", hub)))


def _expanded(path: str) -> str:
    return os.path.expandvars(os.path.expanduser(path))


def find_model(text: str | os.PathLike[str], cache: Path | None = None) -> Path:
    """The whole checkpoint that `text` names: see `locate`.

    Raises:
        ModelNotFoundError: there is no such folder, and no such repository in the cache.
        IncompleteError: its download was begun and not finished; names what is missing, and the command.
    """
    folder = locate(text, cache)
    if origin_of(folder) is not None:
        refuse_partial(folder)
    return folder


def locate(text: str | os.PathLike[str], cache: Path | None = None) -> Path:
    """The folder that `text` names, whole or not: an existing folder wins, then OWNER/NAME in the cache.

    In the cache it is the snapshot of the main branch, or else the newest one.

    Raises:
        ModelNotFoundError: there is no such folder, and no such repository in the cache.
    """
    name = os.fspath(text)
    if os.path.isdir(name):
        return Path(name)
    if os.path.lexists(name):
        kind = "leads nowhere" if os.path.islink(name) else "is no folder"
        raise ModelNotFoundError(f"{name} {kind}; name a checkpoint's folder, or a repository OWNER/NAME")
    if not is_repo_name(name):
        raise ModelNotFoundError(
            f"there is no folder {name!r}; name a checkpoint's folder, or a repository OWNER/NAME"
        )
    cache = cache_folder() if cache is None else cache
    repository = cache / cache_name(name)
    found = _main_snapshot(repository) or _newest(repository / "snapshots")
    if found is None or not found.is_dir():
        raise ModelNotFoundError(
            f"there is no folder {name}, and no {name} in {cache}; download it with: k2hybrid pull {name}"
        )
    return found


def refuse_partial(folder: Path) -> None:
    """Raise IncompleteError if files that every checkpoint needs, or shards of its index, are not there."""
    missing = [name for name in NEEDED if not os.path.exists(folder / name)]
    if missing:
        raise IncompleteError(
            f"{folder} lacks {', '.join(missing)}; finish the download{how_to_resume(folder)}"
        )
    try:
        absent, names = missing_shards(folder, read_weight_map(folder / INDEX_NAME))
    except ShardIndexError:
        return  # not a matter of missing files: the loader says what is wrong with the index
    if absent:
        raise IncompleteError(lacking(folder, absent, len(names)))


def _main_snapshot(repository: Path) -> Path | None:
    try:
        with open(repository / "refs" / "main", "rb") as file:
            commit = file.read(100).decode("ascii").strip()
    except (OSError, ValueError):
        return None
    snapshot = repository / "snapshots" / commit
    return snapshot if _COMMIT.fullmatch(commit) else None


def _newest(snapshots: Path) -> Path | None:
    try:
        with os.scandir(snapshots) as entries:
            found = [(e.stat().st_mtime, e.name) for e in entries if _COMMIT.fullmatch(e.name) and e.is_dir()]
    except OSError:
        return None
    return snapshots / max(found)[1] if found else None


def model_name(folder: Path) -> str:
    """What to call the model in `folder`: a repository's name, not the commit its snapshot is called by."""
    found = origin_of(folder)
    return folder.resolve().name if found is None else found[0].repo.partition("/")[2]
