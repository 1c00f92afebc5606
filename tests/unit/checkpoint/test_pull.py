"""Downloads from a hub on this machine: whole, wrong, refused, too large."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache

from k2hybrid.checkpoint.hub import find_model, model_name
from k2hybrid.checkpoint.origin import Origin
from k2hybrid.checkpoint.pull import Pull
from k2hybrid.checkpoint.survey import survey
from k2hybrid.checkpoint.verify import DeepCheck
from k2hybrid.errors import DownloadError, IncompleteError, SpecError
from tests.hub_server import COMMIT, OTHER_COMMIT, Hub, content_of, serving
from tests.unit.checkpoint.pulls import REPO, Watched, job, shards, wanted


def test_into_the_cache(hub: Hub, cache: Path) -> None:
    watched = Watched()
    folder = job(hub, cache=cache, progress=watched).run()
    assert content_of(folder) == wanted(hub)
    assert all((folder / name).is_symlink() for name in wanted(hub))
    assert find_model(REPO, cache) == folder
    assert model_name(folder) == "Small-Model"
    distinct = sum(map(len, set(wanted(hub).values())))
    assert (watched.expected, watched.present, watched.added) == (distinct, 0, distinct)
    # A second time nothing is asked for but the list.
    hub.log.clear()
    assert job(hub, cache=cache).run() == folder
    assert hub.log == []


def test_huggingface_hub_finds_it_and_takes_it_for_its_own(hub: Hub, cache: Path) -> None:
    folder = job(hub, cache=cache).run()
    found = try_to_load_from_cache(REPO, "config.json", cache_dir=cache)
    assert found == str(folder / "config.json")
    offline = snapshot_download(REPO, cache_dir=cache, local_files_only=True)
    assert Path(offline).resolve() == folder.resolve()


def test_what_huggingface_hub_downloaded_is_taken_as_it_is(hub: Hub, cache: Path, tmp_path: Path) -> None:
    def by_hub(**options: Any) -> None:
        for name in wanted(hub):
            hf_hub_download(REPO, name, endpoint=hub.url, **options)

    by_hub(cache_dir=cache)
    by_hub(cache_dir=tmp_path / "other", local_dir=tmp_path / "plain")
    hub.log.clear()
    assert content_of(job(hub, cache=cache).run()) == wanted(hub)
    job(hub, folder=tmp_path / "plain").run()
    assert hub.log == []


def test_into_a_folder(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    assert job(hub, folder=folder).run() == folder
    assert content_of(folder) == wanted(hub)
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert find_model(folder) == folder
    assert model_name(folder) == "Small-Model"
    contents = DeepCheck(survey(folder)).run()
    assert contents.problems == ()
    assert set(contents.checked) == set(wanted(hub))


def test_a_folder_that_was_filled_by_other_means_is_read_not_fetched(
    hub: Hub, small: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(small, folder)
    damaged = shards(hub)[1]
    content = bytearray((folder / damaged).read_bytes())
    content[-1] ^= 1
    (folder / damaged).write_bytes(content)
    job(hub, folder=folder).run()
    assert content_of(folder) == wanted(hub)
    assert {name for _, name, _ in hub.log} == {damaged, "copy.json", "twin.json"}


def test_a_file_changed_since_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    job(hub, folder=folder).run()
    shard = folder / shards(hub)[0]
    shard.write_bytes(bytes(shard.stat().st_size))
    later = shard.stat().st_mtime + 10
    os.utime(shard, (later, later))
    hub.log.clear()
    job(hub, folder=folder).run()
    assert content_of(folder) == wanted(hub)
    assert [name for _, name, _ in hub.log] == [shard.name]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", ["config.json", "model-00002"])
def test_wrong_content_never_takes_its_place(
    hub: Hub, cache: Path, tmp_path: Path, name: str, plain: bool
) -> None:
    options: dict[str, Any] = {"folder": tmp_path / "m"} if plain else {"cache": cache}
    name = next(full for full in hub.files if full.startswith(name))
    hub.sent[name] = hub.files[name][:-1] + bytes([hub.files[name][-1] ^ 1])
    with pytest.raises(DownloadError) as caught:
        job(hub, **options).run()
    assert f"{name}: its content does not have the hub's" in str(caught.value)
    assert "go on with: k2hybrid pull owner/Small-Model" in str(caught.value)
    assert not any(path.name == name for path in tmp_path.rglob("*"))
    hub.sent.clear()
    assert content_of(job(hub, **options).run()) == wanted(hub)


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_file_the_hub_refuses(hub: Hub, cache: Path, status: int) -> None:
    name = shards(hub)[1]
    hub.statuses[name] = status
    with pytest.raises(DownloadError) as caught:
        job(hub, cache=cache).run()
    assert "1 of" in str(caught.value)
    assert name in str(caught.value)
    # The others came nevertheless.
    folder = cache / "models--owner--Small-Model/snapshots" / COMMIT
    assert set(content_of(folder)) == set(wanted(hub)) - {name}
    with pytest.raises(IncompleteError, match=f"lacks 1 of {len(shards(hub))} shards: {name}; finish the"):
        find_model(REPO, cache)


def test_what_the_hub_does_not_have(hub: Hub, cache: Path) -> None:
    with pytest.raises(DownloadError, match=r"there is no owner/Other at http.*, or it is private"):
        job(hub, repo="owner/Other", cache=cache).run()
    with pytest.raises(DownloadError, match="has no revision 'v9'"):
        job(hub, revision="v9", cache=cache).run()
    hub.gated = True
    with pytest.raises(DownloadError, match=r"is gated; ask for access"):
        job(hub, cache=cache).run()
    assert not cache.exists()


def test_nobody_answers(hub: Hub, cache: Path, small: Path) -> None:
    with serving(Hub(REPO, {})) as gone:
        pass
    with pytest.raises(DownloadError, match=r"owner/Small-Model at http://127\.0\.0\.1"):
        job(gone, cache=cache).run()


def test_a_disk_that_is_too_small_is_told_before_anything_is_fetched(hub: Hub, cache: Path) -> None:
    weights = sum(len(hub.files[name]) for name in shards(hub))
    spare = 64 << 20
    with pytest.raises(DownloadError, match=r"GB are still missing, but .* has 0\.0 GB free; make room"):
        job(hub, cache=cache, free=lambda _: 10).run()
    assert hub.log == []
    with pytest.raises(DownloadError, match="make room"):
        job(hub, cache=cache, free=lambda _: weights + spare - 1).run()
    assert not any(name in shards(hub) for _, name, _ in hub.log)
    assert content_of(job(hub, cache=cache, free=lambda _: weights + spare).run()) == wanted(hub)
    # What is there needs no room.
    job(hub, cache=cache, free=lambda _: 0).run()


def test_another_revision_beside_the_main_one(hub: Hub, cache: Path) -> None:
    hub.revisions |= {"v1.0": OTHER_COMMIT, OTHER_COMMIT: OTHER_COMMIT}
    main = job(hub, cache=cache).run()
    hub.log.clear()
    other = job(hub, revision="v1.0", cache=cache).run()
    assert other.name == OTHER_COMMIT
    assert hub.log == []  # the same content
    assert content_of(other) == content_of(main)
    assert find_model(REPO, cache) == main
    (other / shards(hub)[0]).unlink()
    with pytest.raises(IncompleteError, match=f"k2hybrid pull {REPO} --revision {OTHER_COMMIT}$"):
        find_model(other)


def test_a_model_that_cannot_run_is_refused_before_its_weights_come(hub: Hub, cache: Path) -> None:
    hub.files["config.json"] = hub.files["config.json"].replace(b'"kimi_k2"', b'"llama"')
    with pytest.raises(SpecError, match="llama"):
        job(hub, cache=cache).run()
    assert not any(name in shards(hub) for _, name, _ in hub.log)
    del hub.files["tiktoken.model"]
    with pytest.raises(
        DownloadError, match=r"no checkpoint in the published layout; it has no tiktoken\.model"
    ):
        job(hub, cache=cache).run()


def test_shards_of_the_index_that_the_hub_lacks(hub: Hub, cache: Path) -> None:
    name = shards(hub)[-1]
    del hub.files[name]
    with pytest.raises(DownloadError, match=f"has no {name}, which its index names; 1 of"):
        job(hub, cache=cache).run()


@pytest.mark.parametrize("revision", ["../x", "a..b", "/a", "-x", "a b", "a\n", "a//b", "a/", ""])
def test_impossible_revisions(hub: Hub, cache: Path, revision: str) -> None:
    with pytest.raises(DownloadError, match="is no revision"):
        job(hub, revision=revision, cache=cache)


@pytest.mark.parametrize("endpoint", ["ftp://x", "hub.example", "http://", "https://a b", "file:///etc"])
def test_impossible_endpoints(endpoint: str) -> None:
    with pytest.raises(DownloadError, match="is no address of a hub"):
        Pull(Origin(REPO, None, endpoint))


def test_without_huggingface_hub_the_message_says_how_to_get_it() -> None:
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "from k2hybrid.cli import main; sys.exit(main(['pull', 'owner/name']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "k2hybrid pull: downloads need huggingface_hub, which is not installed: pip install 'k2hybrid[hub]'\n"
    )
