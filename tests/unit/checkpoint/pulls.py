"""What tests of downloads share: a published checkpoint, and jobs that fetch it."""

from __future__ import annotations

from typing import Any

from k2hybrid.checkpoint.origin import Origin
from k2hybrid.checkpoint.pull import Pull
from tests.hub_server import Hub

REPO = "owner/Small-Model"
PUBLISHED_BESIDE = {
    "README.md": b"# a model\n",
    "modeling_small.py": b"raise SystemExit('code of a checkpoint ran')\n",
    "figures/one.json": b"{}",
    "consolidated.safetensors": b"not in the index",
    "copy.json": b"{}",
    "twin.json": b"{}",
    "empty.json": b"",
}


class Watched:
    """A Progress that adds up."""

    def __init__(self) -> None:
        self.expected = self.present = self.added = 0

    def expect(self, nbytes: int, present: int) -> None:
        self.expected += nbytes
        self.present += present

    def add(self, nbytes: int) -> None:
        self.added += nbytes


def job(hub: Hub, *, revision: str | None = None, repo: str = REPO, **options: Any) -> Pull:
    return Pull(Origin(repo, revision, hub.url), **options)


def wanted(hub: Hub) -> dict[str, bytes]:
    """What a pull is to fetch of it."""
    left_out = {"README.md", "modeling_small.py", "figures/one.json", "consolidated.safetensors"}
    return {name: data for name, data in hub.files.items() if name not in left_out}


def shards(hub: Hub) -> list[str]:
    return sorted(name for name in hub.files if name.startswith("model-"))
