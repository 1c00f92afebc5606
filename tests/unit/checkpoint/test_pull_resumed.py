"""Downloads that are cut off, and taken up where they were."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from io import FileIO
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from k2hybrid.checkpoint.hub import find_model
from k2hybrid.checkpoint.hub_files import HubFiles
from k2hybrid.checkpoint.origin import Origin
from k2hybrid.errors import DownloadError, IncompleteError
from tests.hub_server import COMMIT, Hub, content_of, etag, serving
from tests.unit.checkpoint.pulls import REPO, Watched, job, shards, wanted


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub: Hub, cache: Path) -> None:
    name = shards(hub)[0]
    hub.cuts[name] = [1000, 500]
    assert content_of(job(hub, cache=cache).run()) == wanted(hub)
    assert hub.fetched(name) == [None, "bytes=1000-", "bytes=1500-"]


@pytest.mark.parametrize(
    ("plain", "signalled", "code"),
    [(False, signal.SIGINT, 130), (True, signal.SIGTERM, 130), (True, signal.SIGKILL, -9)],
)
def test_a_later_run_goes_on_in_the_middle_of_a_file(
    hub: Hub, tmp_path: Path, plain: bool, signalled: signal.Signals, code: int
) -> None:
    name = shards(hub)[0]
    hub.stalls[name] = 1000
    cache = tmp_path / "hf" / "hub"
    folder = tmp_path / "m" if plain else cache / "models--owner--Small-Model/snapshots" / COMMIT
    where = ["--dir", str(folder)] if plain else []
    program = (  # what runs behind a shell's & inherits SIGINT ignored
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys; from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 500\n"
        "from k2hybrid.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "pull", REPO, *where, "--endpoint", hub.url],
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DOWNLOAD_TIMEOUT": "2"},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not hub.stalled.wait(0.1):
        assert process.poll() is None, process.communicate()
    digest = etag(name, hub.files[name])
    while not any(path.stat().st_size >= 1000 for path in tmp_path.rglob(f"*{digest}.incomplete")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signalled)
    hub.stalls.clear()
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    if code == 130:
        resume = " ".join(["k2hybrid pull", REPO, *where, "--endpoint", hub.url])
        assert f"k2hybrid pull: interrupted; go on with: {resume}\n" in said

    with pytest.raises(IncompleteError) as refused:
        find_model(folder)
    assert name in str(refused.value)
    known = f" --dir {folder} --endpoint {hub.url}" if plain else ""
    assert str(refused.value).endswith(f"finish the download: k2hybrid pull {REPO}{known}")

    hub.log.clear()
    watched = Watched()
    options: dict[str, Any] = {"folder": folder} if plain else {"cache": cache}
    assert content_of(job(hub, progress=watched, **options).run()) == wanted(hub)
    assert hub.fetched(name) == ["bytes=1000-"]
    assert watched.present >= 1000  # others may have begun as well
    assert not list(tmp_path.rglob("*.incomplete"))


def test_large_files_come_from_another_host_which_never_sees_the_token(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serving(Hub(REPO, hub.files, cuts={shards(hub)[0]: [1000]})) as store:
        hub.store = store.url
        assert content_of(job(hub, cache=cache).run()) == wanted(hub)
    assert {name for _, name, _ in store.log} == {*shards(hub), "tiktoken.model"}
    assert store.fetched(shards(hub)[0]) == [None, "bytes=1000-"]
    assert set(store.tokens) == {None}
    assert set(hub.tokens) == {"Bearer hf_secret"}


def test_a_server_that_cannot_resume_begins_again(hub: Hub, cache: Path) -> None:
    name = shards(hub)[0]
    hub.cuts[name] = [1000]
    hub.with_ranges = False
    watched = Watched()
    assert content_of(job(hub, cache=cache, progress=watched).run()) == wanted(hub)
    assert hub.fetched(name) == [None, "bytes=1000-"]
    assert watched.added == watched.expected


def test_a_partial_file_that_is_longer_than_the_file_is_thrown_away(hub: Hub, cache: Path) -> None:
    name = shards(hub)[0]
    blobs = cache / "models--owner--Small-Model" / "blobs"
    blobs.mkdir(parents=True)
    partial = blobs / f"{etag(name, hub.files[name])}.incomplete"
    partial.write_bytes(bytes(len(hub.files[name]) + 1))
    assert content_of(job(hub, cache=cache).run()) == wanted(hub)
    assert hub.fetched(name) == [None]


def test_a_file_that_ends_too_early_or_too_late(hub: Hub, cache: Path) -> None:
    name = shards(hub)[0]
    hub.sent[name] = hub.files[name] + b"more"
    with pytest.raises(DownloadError, match=name):
        job(hub, cache=cache).run()
    hub.sent[name] = hub.files[name][:-4]
    with pytest.raises(DownloadError, match=name):
        job(hub, cache=cache).run()
    hub.sent.clear()
    assert content_of(job(hub, cache=cache).run()) == wanted(hub)


def test_a_disk_that_fills_up(hub: Hub) -> None:
    """/dev/full takes nothing, as a full disk does."""
    files = HubFiles(Origin(REPO, None, hub.url))
    found = files.listing()
    with FileIO("/dev/full", "r+") as out, pytest.raises(DownloadError, match=r"^the disk is full$"):
        files.fetch(found.files[shards(hub)[0]], found.commit, out, Event(), lambda _: None)
    assert len(hub.fetched(shards(hub)[0])) == 1


def test_two_downloads_do_not_write_one_file(hub: Hub, cache: Path) -> None:
    name = shards(hub)[0]
    blobs = cache / "models--owner--Small-Model" / "blobs"
    blobs.mkdir(parents=True)
    with (blobs / f"{etag(name, hub.files[name])}.incomplete").open("wb") as partial:
        fcntl.flock(partial, fcntl.LOCK_EX)
        with pytest.raises(DownloadError, match=f"{name}: another process is fetching it"):
            job(hub, cache=cache).run()
    assert hub.fetched(name) == []
    assert content_of(job(hub, cache=cache).run()) == wanted(hub)
