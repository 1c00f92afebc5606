"""Models by name: folders, and repositories in a cache laid out as huggingface_hub documents it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.utils
import pytest

from k2hybrid.checkpoint.hub import documented_cache, find_model, locate, model_name
from k2hybrid.checkpoint.index import INDEX_NAME
from k2hybrid.checkpoint.loader import open_checkpoint
from k2hybrid.checkpoint.origin import Origin, is_repo_name, is_revision, origin_of, write_record
from k2hybrid.errors import IncompleteError, ModelNotFoundError, ShardIndexError
from tests.hub_server import COMMIT, OTHER_COMMIT

REPO = "owner/Some-Model"


def cached(cache: Path, model: Path, commit: str = COMMIT, *, main: bool = True) -> Path:
    """A snapshot of `model` made of links to blobs."""
    repository = cache / "models--owner--Some-Model"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir(exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copyfile(path, repository / "blobs" / f"{commit[0]}{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/{commit[0]}{number}")
    if main:
        (repository / "refs" / "main").write_text(commit)
    return snapshot


def test_an_existing_folder_wins(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(tmp_path / "cache", small)
    monkeypatch.chdir(tmp_path)
    assert (
        find_model(REPO, tmp_path / "cache")
        == tmp_path / "cache/models--owner--Some-Model/snapshots" / COMMIT
    )
    shutil.copytree(small, tmp_path / REPO)
    assert find_model(REPO, tmp_path / "cache") == Path(REPO)
    assert find_model(Path(REPO), tmp_path / "cache") == Path(REPO)
    assert model_name(Path(REPO)) == "Some-Model"


def test_links_are_followed_down_to_the_tensors(small: Path, tmp_path: Path, sink: object) -> None:
    snapshot = cached(tmp_path / "cache", small)
    (tmp_path / "link").symlink_to(snapshot)
    for name in (REPO, tmp_path / "link"):
        with open_checkpoint(find_model(name, tmp_path / "cache"), sink) as checkpoint:  # type: ignore[arg-type]
            assert checkpoint.total_bytes > 0
        sink.refs.clear()  # type: ignore[attr-defined]


def test_main_counts_else_the_newest(small: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    older = cached(cache, small, main=False)
    newer = cached(cache, small, OTHER_COMMIT, main=False)
    os.utime(older, (1, 1))
    assert find_model(REPO, cache) == newer
    (cache / "models--owner--Some-Model/refs/main").write_text(COMMIT + "\n")
    assert find_model(REPO, cache) == older


@pytest.mark.parametrize("ref", ["", "main", "../../..", "/", "x" * 5000, "\xff", "0" * 39, COMMIT + "/.."])
def test_a_garbled_ref_leads_nowhere_else(small: Path, tmp_path: Path, ref: str) -> None:
    snapshot = cached(tmp_path, small)
    (tmp_path / "models--owner--Some-Model/refs/main").write_bytes(ref.encode("latin-1"))
    assert locate(REPO, tmp_path) == snapshot


def test_a_ref_whose_snapshot_is_gone(small: Path, tmp_path: Path) -> None:
    cached(tmp_path, small)
    (tmp_path / "models--owner--Some-Model/refs/main").write_text(OTHER_COMMIT)
    with pytest.raises(ModelNotFoundError, match=f"k2hybrid pull {REPO}"):
        locate(REPO, tmp_path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=f"no {REPO} in .*: k2hybrid pull {REPO}$"):
        find_model(REPO, tmp_path)
    for name in ("nothing", "/no/where", "a/b/c", "../x", "./x/y", ""):
        with pytest.raises(ModelNotFoundError, match="there is no folder"):
            find_model(name, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ModelNotFoundError, match="is no folder; name"):
        find_model(tmp_path / "file", tmp_path)
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("dangling", "loop"):
        with pytest.raises(ModelNotFoundError, match="leads nowhere"):
            find_model(tmp_path / name, tmp_path)


def test_a_half_downloaded_snapshot_is_refused(small: Path, tmp_path: Path, sink: object) -> None:
    snapshot = cached(tmp_path, small)
    names = sorted(path.name for path in snapshot.glob("*.safetensors"))
    (snapshot / names[0]).unlink()
    (snapshot / names[2]).resolve().unlink()  # the link dangles
    said = (
        f"lacks 2 of {len(names)} shards: {names[0]}, {names[2]}; finish the download: k2hybrid pull {REPO}"
    )
    with pytest.raises(IncompleteError) as caught:
        find_model(REPO, tmp_path)
    assert str(caught.value) == f"{snapshot} {said}"
    # The loader, asked for the folder directly, says the same.
    with pytest.raises(ShardIndexError) as loader:
        open_checkpoint(snapshot, sink)  # type: ignore[arg-type]
    assert str(loader.value) == str(caught.value)
    assert locate(REPO, tmp_path) == snapshot
    (snapshot / INDEX_NAME).unlink()
    with pytest.raises(IncompleteError, match=rf"lacks {INDEX_NAME}; finish the download: k2hybrid pull"):
        find_model(REPO, tmp_path)


def test_a_half_downloaded_folder_says_the_command_it_was_begun_with(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my models"
    shutil.copytree(small, folder)
    write_record(folder, Origin(REPO, "v1", "http://hub:8"))
    assert find_model(folder) == folder
    next(folder.glob("*.safetensors")).unlink()
    command = f"k2hybrid pull {REPO} --revision v1 --dir '{folder}' --endpoint http://hub:8"
    with pytest.raises(IncompleteError) as caught:
        find_model(folder)
    assert str(caught.value).endswith(f"finish the download: {command}")


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"[]",
        b'{"repo": 1}',
        b'{"repo": "../.."}',
        b'{"repo": "a/b;rm -rf"}',
        b"\xff",
        b"{" * 100_000,
        b" " * 100_000,
    ],
)
def test_records_that_say_nothing(tmp_path: Path, record: bytes) -> None:
    write_record(tmp_path, Origin(REPO))
    assert origin_of(tmp_path) is not None
    (tmp_path / ".cache/k2hybrid/pull.json").write_bytes(record)
    assert origin_of(tmp_path) is None


def test_records_keep_what_can_be_kept(tmp_path: Path) -> None:
    write_record(tmp_path, Origin(REPO))
    record = tmp_path / ".cache/k2hybrid/pull.json"
    record.write_text(json.dumps({"repo": REPO, "revision": "../x", "endpoint": "\x1b[2J"}))
    assert origin_of(tmp_path) == (Origin(REPO), tmp_path)


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("moonshotai/Kimi-K2-Thinking", True),
        ("a/b", True),
        ("_a/b.c_d-e", True),
        ("a", False),
        ("a/b/c", False),
        ("/a", False),
        ("a/", False),
        ("../a", False),
        ("a/..", False),
        ("a/.b", False),
        ("a--b/c", False),
        ("a/b--c", False),
        ("a/b..c", False),
        ("a/b\n", False),
        ("a/ä", False),
        ("a/b c", False),
        ("-a/b", False),
        ("a" * 97 + "/b", False),
        ("", False),
    ],
)
def test_names_of_repositories(name: str, good: bool) -> None:
    assert is_repo_name(name) is good
    if good:
        huggingface_hub.utils.validate_repo_id(name)  # type: ignore[attr-defined]


def test_revisions() -> None:
    assert all(map(is_revision, ("main", "v1.0", "refs/pr/3", COMMIT)))
    assert not any(map(is_revision, ("", ".", "..", "a/../b", "/a", "a/", "a//b", "-a", "a b", "a.lock")))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"HF_HOME": "/a/home"},
        {"HF_HUB_CACHE": "/a/cache", "HF_HOME": "/a/home"},
        {"HUGGINGFACE_HUB_CACHE": "/a/old", "HF_HOME": "/a/home"},
        {"XDG_CACHE_HOME": "/a/xdg"},
        {"HF_HOME": "~/x", "XDG_CACHE_HOME": "/a/xdg"},
        {"HF_HUB_CACHE": "$HOME/y"},
    ],
)
def test_the_documented_cache_is_the_one_huggingface_hub_uses(given: dict[str, str]) -> None:
    named = {"HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"}
    environment = {name: value for name, value in os.environ.items() if name not in named} | given
    code = (
        "from k2hybrid.checkpoint.hub import cache_folder, documented_cache\n"
        "from huggingface_hub.constants import HF_HUB_CACHE\n"
        "print(HF_HUB_CACHE, documented_cache(), cache_folder())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert len(set(done.stdout.split())) == 1, done.stdout


def test_without_huggingface_hub_the_documented_cache_is_used(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "from k2hybrid.checkpoint.hub import cache_folder\n"
        "print(cache_folder())"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(tmp_path)
    assert documented_cache()
