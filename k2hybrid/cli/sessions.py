"""`k2hybrid sessions`: what a journal holds, under all fingerprints, and deleting it."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

from k2hybrid.cache.journal_folder import FolderLock, check_folder, fingerprints
from k2hybrid.cache.journal_index import SessionInfo
from k2hybrid.cache.journal_store import Store
from k2hybrid.errors import ConfigError
from k2hybrid.server.options import Parser


def add_sessions_options(parser: argparse.ArgumentParser) -> None:
    """`list` and `delete`, each with its own options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Parser)
    listing = actions.add_parser("list", help="show the sessions in a journal, also while a server uses it")
    delete = actions.add_parser("delete", help="delete sessions, and all pages that no other one reaches")
    for action in (listing, delete):
        action.set_defaults(parser=action)
        action.add_argument("--journal", type=Path, required=True, metavar="DIR", help="the journal's folder")
    delete.add_argument("sessions", nargs="*", metavar="SESSION", help="ids, as `list` shows them")
    delete.add_argument("--all", action="store_true", help="all sessions and everything else in the journal")


def sessions(args: argparse.Namespace) -> int:
    """Do as `args` say; the exit code. ConfigError if the journal cannot be used or a session is unknown."""
    check_folder(args.journal, create=False)
    if args.action == "list":
        return _list(args.journal)
    if args.all == bool(args.sessions):
        args.parser.error("name the sessions to delete, or give --all")
    lock = FolderLock(args.journal)
    try:
        return _delete_all(args.journal) if args.all else _delete(args.journal, set(args.sessions))
    finally:
        lock.release()


def _list(journal: Path) -> int:
    rows = [("SESSION", "ANSWERS", "TOKENS", "SIZE", "CREATED", "LAST USED", "MODEL")]
    unreachable = 0
    for fingerprint in fingerprints(journal):
        index = Store(journal / fingerprint, None, repair=False).index
        rows += [(*_row(info), fingerprint[:8]) for info in index.sessions()]
        unreachable += index.unreachable_bytes()
    if len(rows) > 1:
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for row in rows:
            # Numbers to the right, all else to the left.
            cells = [
                f"{cell:>{width}}" if 1 <= column <= 3 else f"{cell:<{width}}"
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            print("  ".join(cells).rstrip())
    else:
        print("no sessions")
    if unreachable:
        rest = "of requests that still run, or were interrupted, and of turns computed ahead"
        print(f"and {_size(unreachable)} {rest}")
    return 0


def _delete(journal: Path, names: set[str]) -> int:
    stores = [Store(journal / name, None, repair=True) for name in fingerprints(journal)]
    unknown = sorted(name for name in names if not any(name in store.index for store in stores))
    if unknown:
        raise ConfigError(f"the journal {journal} has no session {', '.join(unknown)}; nothing is deleted")
    for store in stores:
        for name in sorted(names):
            if name in store.index:
                store.remove(store.index.alone(name))
        # Of a request that was interrupted, a page may lie where the session has no answer.
        store.remove(store.index.unreached())
    print(f"deleted {len(names)} session{'s' if len(names) > 1 else ''}", file=sys.stderr)
    return 0


def _delete_all(journal: Path) -> int:
    for name in fingerprints(journal):
        shutil.rmtree(journal / name)
    print("deleted everything in the journal", file=sys.stderr)
    return 0


def _row(info: SessionInfo) -> tuple[str, str, str, str, str, str]:
    numbers = (f"{info.exchanges:,}", f"{info.tokens:,}", _size(info.size))
    return (info.id, *numbers, _date(info.created), _date(info.last_used))


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _size(size: int) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"
