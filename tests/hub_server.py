"""A Hugging Face hub on this machine, as far as huggingface_hub asks one; it misbehaves on demand."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".model"))


def etag(name: str, data: bytes) -> str:
    return sha256(data) if is_lfs(name) else git_hash(data)


@dataclass
class Hub:
    """What the server holds, how it misbehaves, and what it was asked.

    Attributes:
        files: path in the repository → content.
        sent: path → content that is sent in its place, under the true hash.
        cuts: path → after how many bytes the connection breaks, one answer after the other.
        stalls: path → after how many bytes the answer stops and nothing more comes; then `stalled` is set.
        change: alters the listing before it is sent.
        store: another hub's address, from which large files come.
        tokens: what was given as Authorization, of every request.
        log: (method, path in the repository, Range header) of every request for a file.
    """

    repo: str
    files: dict[str, bytes]
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, COMMIT: COMMIT})
    sent: dict[str, bytes] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    stalls: dict[str, int] = field(default_factory=dict)
    stalled: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    statuses: dict[str, int] = field(default_factory=dict)
    change: Callable[[dict[str, Any]], Any] = lambda listing: None
    with_ranges: bool = True
    gated: bool = False
    store: str | None = None
    tokens: list[str | None] = field(default_factory=list)
    log: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""

    def fetched(self, name: str) -> list[str | None]:
        """Ranges that were asked of a file."""
        return [given for method, path, given in self.log if (method, path) == ("GET", name)]

    def listing(self, commit: str) -> dict[str, Any]:
        siblings = []
        for name, data in self.files.items():
            sibling: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git_hash(data)}
            if is_lfs(name):
                sibling["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 134}
            siblings.append(sibling)
        found = {"id": self.repo, "modelId": self.repo, "sha": commit, "siblings": siblings}
        return self.change(found) or found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        """The log is `Hub.log`."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.tokens.append(self.headers.get("Authorization"))
        api, resolve = f"/api/models/{hub.repo}", f"/{hub.repo}/resolve/"
        if hub.gated:
            self._refuse(403, "GatedRepo")
        elif path == api or path.startswith(api + "/revision/"):
            self._list(path[len(api) + len("/revision/") :] or "main")
        elif path.startswith(resolve):
            revision, _, name = path[len(resolve) :].partition("/")
            self._send_file(revision, name, with_body)
        else:
            self._refuse(401, "RepoNotFound")

    def _list(self, revision: str) -> None:
        if revision not in self.hub.revisions:
            self._refuse(404, "RevisionNotFound")
            return
        body = json.dumps(self.hub.listing(self.hub.revisions[revision])).encode()
        self._begin(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self.wfile.write(body)

    def _send_file(self, revision: str, name: str, with_body: bool) -> None:
        hub = self.hub
        given = self.headers.get("Range")
        hub.log.append((self.command, name, given))
        if hub.store is not None and is_lfs(name):
            self._begin(302, {"Location": f"{hub.store}{self.path}?signed=1", "Content-Length": "0"})
            return
        if name in hub.statuses:
            self._refuse(hub.statuses[name], None)
            return
        if revision not in hub.revisions or name not in hub.files:
            self._refuse(404, "EntryNotFound")
            return
        true, data = hub.files[name], hub.sent.get(name, hub.files[name])
        headers = {
            "ETag": f'"{etag(name, true)}"',
            "X-Repo-Commit": hub.revisions[revision],
            "Content-Type": "application/octet-stream",
        }
        if is_lfs(name):
            headers |= {"X-Linked-Etag": f'"{sha256(true)}"', "X-Linked-Size": str(len(true))}
        status, begin = 200, 0
        if given is not None and hub.with_ranges:
            status, begin = 206, int(given.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        body = data[begin:]
        self._begin(status, {**headers, "Content-Length": str(len(body))})
        if with_body:
            cuts = hub.cuts.get(name, [])
            cut = cuts.pop(0) if cuts else len(body)
            if name in hub.stalls:
                self.wfile.write(body[: hub.stalls[name]])
                hub.stalled.set()
                hub.ended.wait()
                cut = 0
            self.wfile.write(body[:cut])
            if cut < len(body):
                self.close_connection = True

    def _begin(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _refuse(self, status: int, code: str | None) -> None:
        headers = {"Content-Length": "0"} | ({} if code is None else {"X-Error-Code": code})
        self._begin(status, headers)


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """`hub` at `hub.url`, on a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


def content_of(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint, to be published."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
