"""Hostile hubs, caches and files: nothing leads outside, nothing hangs, all ends in a named error."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k2hybrid.checkpoint.checksums import known_checksums
from k2hybrid.checkpoint.hub import find_model, locate
from k2hybrid.checkpoint.index import INDEX_NAME
from k2hybrid.checkpoint.origin import Origin
from k2hybrid.checkpoint.pull import Pull
from k2hybrid.checkpoint.survey import survey
from k2hybrid.checkpoint.verify import DeepCheck
from k2hybrid.errors import (
    CheckpointError,
    DownloadError,
    IncompleteError,
    ModelNotFoundError,
    ShardIndexError,
)
from tests.hub_server import COMMIT, Hub, content_of, etag, serving

REPO = "owner/Tiny"


def everything_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def sibling(listing: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(one for one in listing["siblings"] if one["rfilename"] == name)
    return found


def pull(hub: Hub, cache: Path, **options: Any) -> Path:
    return Pull(Origin(REPO, None, hub.url), cache=cache, **options).run()


@pytest.mark.parametrize("plain", [False, True])
def test_file_names_that_lead_elsewhere_are_left_out(target: Any, tmp_path: Path, plain: bool) -> None:
    evil = [
        "../escaped.json", "../../../../escaped.json", "/escaped.json", "a/../../escaped.json", "..", ".",
        ".hidden.json", "sub/escaped.json", "a\\..\\escaped.json", "escaped.json\n", "escaped\0.json", "",
        " .json", "~/escaped.json", "-escaped.json", "x" * 300 + ".json",
    ]  # fmt: skip
    hub = Hub(REPO, content_of(target.folder) | dict.fromkeys(evil, b"{}"))
    inside = tmp_path / "in" / "side"
    with serving(hub):
        folder = pull(hub, inside / "cache", folder=inside / "plain" if plain else None)
    assert {path.name for path in folder.iterdir()} - {".cache"} == set(content_of(target.folder))
    assert not [name for name in everything_below(tmp_path) if "escaped" in name]
    assert set(tmp_path.iterdir()) == {tmp_path / "in", target.folder}


@pytest.mark.parametrize("digest", ["../../../escaped", "a" * 39, "g" * 40, "A" * 64, "", None, 7, ["a"]])
def test_hashes_become_no_paths(target: Any, tmp_path: Path, digest: Any) -> None:
    def change(listing: dict[str, Any]) -> None:
        sibling(listing, "config.json")["blobId"] = digest

    hub = Hub(REPO, content_of(target.folder), change=change)
    with serving(hub), pytest.raises(DownloadError, match=r"has no\s+config\.json"):
        pull(hub, tmp_path / "cache")
    assert hub.log == []
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda listing: listing.update(sha="../../escaped"),
        lambda listing: listing.update(sha=None),
        lambda listing: listing.update(sha=["a"]),
        lambda listing: listing.update(siblings=None),
        lambda listing: listing.update(siblings=[]),
        lambda listing: listing.update(siblings=[{}]),
        lambda listing: listing.update(siblings=7),
        lambda listing: listing.update(siblings=[{"rfilename": ["config.json"]}]),
        lambda listing: sibling(listing, "config.json").update(size=-1),
        lambda listing: sibling(listing, "config.json").update(size="9"),
        lambda listing: sibling(listing, "config.json").update(size=1 << 60),
        lambda listing: sibling(listing, "tiktoken.model").update(lfs={"sha256": "x"}),
        lambda listing: sibling(listing, "tiktoken.model")["lfs"].update(sha256="../x"),
        lambda listing: sibling(listing, "tiktoken.model")["lfs"].update(size=True),
        lambda listing: [listing],
        lambda listing: "listing",
    ],
)
def test_listings_that_are_garbled(
    target: Any, tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    def garbled(listing: dict[str, Any]) -> Any:
        changed = change(listing)
        return changed if isinstance(changed, list | str) else None

    hub = Hub(REPO, content_of(target.folder), change=garbled)
    with serving(hub), pytest.raises(DownloadError) as caught:
        pull(hub, tmp_path / "cache")
    assert str(caught.value).count("\n") == 0
    assert not (tmp_path / "cache").exists()


def test_a_listing_that_promises_more_than_the_disk_has(target: Any, tmp_path: Path) -> None:
    def change(listing: dict[str, Any]) -> None:
        sibling(listing, "tokenizer_config.json")["size"] = 1 << 49

    hub = Hub(REPO, content_of(target.folder), change=change)
    with serving(hub), pytest.raises(DownloadError, match="GB are still missing"):
        pull(hub, tmp_path / "cache")
    assert hub.log == []


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"[" * 100_000,
        b'{"weight_map": {"a": "../escaped.safetensors"}}',
        b'{"weight_map": {"a": "/etc/passwd"}}',
        b'{"weight_map": {}}',
        json.dumps({"weight_map": {f"t{i}": f"s{i}.safetensors" for i in range(5000)}}).encode(),
    ],
)
def test_an_index_from_the_hub_that_is_garbled(target: Any, tmp_path: Path, index: bytes) -> None:
    hub = Hub(REPO, content_of(target.folder) | {INDEX_NAME: index})
    with serving(hub):
        with pytest.raises(ShardIndexError):
            pull(hub, tmp_path / "cache")
        assert target.shard.name not in {name for _, name, _ in hub.log}
    # By name it is found, and it is the loader that says what is wrong with it.
    folder = find_model(REPO, tmp_path / "cache")
    target.index.write_bytes(index)
    with pytest.raises(ShardIndexError):
        target.open()
    assert survey(folder).problems


def test_a_link_in_place_of_a_partial_file_is_not_written_through(target: Any, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("precious")
    files = content_of(target.folder)
    blobs = tmp_path / "cache" / "models--owner--Tiny" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{etag('config.json', files['config.json'])}.incomplete").symlink_to(outside)
    with serving(Hub(REPO, files)) as hub, pytest.raises(DownloadError, match=r"config\.json: "):
        pull(hub, tmp_path / "cache")
    assert outside.read_text() == "precious"


def test_a_link_in_place_of_a_file_is_replaced_not_written_through(target: Any, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("precious")
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "config.json").symlink_to(outside)
    with serving(Hub(REPO, content_of(target.folder))) as hub:
        pull(hub, tmp_path / "cache", folder=folder)
    assert outside.read_text() == "precious"
    assert (folder / "config.json").read_bytes() == (target.folder / "config.json").read_bytes()


@pytest.mark.parametrize(
    "name", ["../../etc", "a/../b", "..", "a/..", "models--a--b", "a--b/c", "/a/b", "a/b\0"]
)
def test_names_of_repositories_lead_nowhere_else(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "one" / "two"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    with pytest.raises(DownloadError, match="is no repository"):
        Pull(Origin(name), cache=tmp_path)
    if not os.path.isdir(name.replace("\0", "")):
        with pytest.raises(ModelNotFoundError):
            locate(name, tmp_path)


def test_loops_and_dangling_links_in_a_cache(target: Any, tmp_path: Path) -> None:
    repository = tmp_path / "cache" / "models--owner--Tiny"
    snapshots = repository / "snapshots"
    snapshots.mkdir(parents=True)
    (snapshots / COMMIT).symlink_to(COMMIT)
    with pytest.raises(ModelNotFoundError):
        locate(REPO, tmp_path / "cache")
    (repository / "refs").symlink_to("refs")
    (snapshots / COMMIT).unlink()
    shutil.copytree(target.folder, snapshots / COMMIT)
    for name in (target.shard.name, "config.json"):
        (snapshots / COMMIT / name).unlink()
        (snapshots / COMMIT / name).symlink_to(name)
    with pytest.raises(IncompleteError, match=r"lacks config\.json; finish the download: k2hybrid pull"):
        find_model(REPO, tmp_path / "cache")
    found = survey(snapshots / COMMIT)
    assert found.missing_shards == [target.shard.name]
    assert {link.name: link.target for link in found.links} == {target.shard.name: None, "config.json": None}
    (repository / "snapshots" / COMMIT / target.shard.name).unlink()
    shutil.rmtree(snapshots)
    snapshots.symlink_to("snapshots")
    with pytest.raises(ModelNotFoundError):
        locate(REPO, tmp_path / "cache")


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "socket", "unreadable"])
@pytest.mark.parametrize(
    "name",
    [
        "shard", INDEX_NAME, "config.json", "generation_config.json", "SHA256SUMS", "extra.safetensors",
        f".cache/huggingface/download/{INDEX_NAME}.metadata", ".cache/k2hybrid/pull.json",
    ],
)  # fmt: skip
def test_things_that_are_no_files(target: Any, name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = target.shard if name == "shard" else target.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "socket":
        monkeypatch.chdir(path.parent)  # a socket's path has 108 bytes at most
        import socket

        try:
            socket.socket(socket.AF_UNIX).bind(path.name)
        except OSError:
            pytest.skip("a socket's name has 108 bytes at most")
    else:
        path.write_bytes(b"\xff" * 100)
    find_model(target.folder)
    found = survey(target.folder)
    deep = DeepCheck(found).run()
    needed = name in ("shard", INDEX_NAME, "config.json", "generation_config.json")
    assert bool(found.problems) is needed
    assert deep.problems == ()


def test_a_link_to_a_blob_that_is_no_file(target: Any) -> None:
    blobs = target.folder.parent / "blobs"
    blobs.mkdir()
    os.mkfifo(blobs / ("0" * 64))
    (blobs / ("1" * 64)).mkdir()
    (target.folder / "README.md").symlink_to(f"../blobs/{'0' * 64}")
    (target.folder / "figures").symlink_to(f"../blobs/{'1' * 64}")
    (target.folder / "gone").symlink_to(f"../blobs/{'2' * 64}")
    assert known_checksums(target.folder) == {}
    assert DeepCheck(survey(target.folder)).run().problems == ()


def test_a_folder_with_nothing_in_it(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError):
            survey(folder)
