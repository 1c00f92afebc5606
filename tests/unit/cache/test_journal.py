"""The journal: what was written is found again, for its prefix and scope alone; limits and deletions hold."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import shutil
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from k2hybrid.cache import journal_index
from k2hybrid.cache.journal import Journal
from k2hybrid.cache.journal_health import FIRST_PAUSE_S
from k2hybrid.cache.journal_index import JournalIndex
from k2hybrid.cache.page_files import PageFile, PageFiles
from k2hybrid.cache.page_keys import Found, PageKey, next_key, pack_ids, page_keys, root_key, unpack_ids
from k2hybrid.cache.session_log import Exchange, SessionLogs
from k2hybrid.errors import ConfigError

FINGERPRINT = "0123456789abcdef"
OTHER = "fedcba9876543210"
TOKENS = 4  # of a page
PAGE_BYTES = 64
FILE_BYTES = 48 + 4 * TOKENS + PAGE_BYTES


def opened(
    folder: Path, fingerprint: str = FINGERPRINT, max_bytes: int | None = None, max_age_s: float | None = None
) -> Journal:
    return Journal(folder, fingerprint, PAGE_BYTES, max_bytes, max_age_s)


def payload_of(page: PageKey) -> bytes:
    """Bytes that only this page has."""
    return (page.key * 4)[: PAGE_BYTES * (page.stop - page.start) // TOKENS]


def write(journal: Journal, ids: Sequence[int], scope: str = "s") -> list[PageKey]:
    pages = page_keys(scope, ids, TOKENS)
    for page in pages:
        assert journal.write_page(page.key, page.parent, ids[page.start : page.stop], payload_of(page))
    return pages


def read(journal: Journal, page: PageKey, ids: Sequence[int]) -> bytes | None:
    out = bytearray(len(payload_of(page)))
    return bytes(out) if journal.read_page(page.key, page.parent, ids[page.start : page.stop], out) else None


def match(journal: Journal, scope: str, ids: Sequence[int]) -> list[Found]:
    """Pages with the longest prefix of `ids` on disk, first to last; the last may agree in part."""
    parent, chain = root_key(scope), []
    for start in range(0, len(ids), TOKENS):
        found = journal.closest(parent, ids[start : start + TOKENS])
        if found is None:
            break
        chain.append(found)
        if found.rows < TOKENS:
            break
        parent = found.key
    return chain


def exchange(session: str, ids: Sequence[int], *, scope: str = "s", created: int = 1000) -> Exchange:
    """An answer that ends a history of `ids`."""
    last = page_keys(scope, ids, TOKENS)[-1].key.hex() if ids else ""
    return Exchange(
        session, f"r-{created}", scope, "c", "m", tuple(ids[-2:]), "Hm \ud800 …", created, last, len(ids)
    )


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def age(folder: Path, seconds: float, pattern: str = "*") -> None:
    for path in (folder, *folder.rglob(pattern)):
        os.utime(path, (time.time() - seconds,) * 2)


# --- keys -----------------------------------------------------------------------------------------


def test_keys_form_a_chain_over_the_tokens() -> None:
    ids = list(range(10))
    pages = page_keys("s", ids, TOKENS)
    assert [(page.start, page.stop) for page in pages] == [(0, 4), (4, 8), (8, 10)]
    assert [page.parent for page in pages] == [root_key("s"), pages[0].key, pages[1].key]
    assert pages[2].key == next_key(pages[1].key, pack_ids([8, 9]))
    assert page_keys("s", ids[:8], TOKENS) == pages[:2]
    assert page_keys("s", [], TOKENS) == []
    assert unpack_ids(pack_ids([0, -1, 2**31 - 1])) == (0, -1, 2**31 - 1)


def test_keys_differ_by_scope_and_by_every_token_before() -> None:
    ids = list(range(12))
    keys = {page.key for page in page_keys("s", ids, TOKENS)}
    assert keys.isdisjoint(page.key for page in page_keys("t", ids, TOKENS))
    assert keys.isdisjoint(page.key for page in page_keys("s", [9, *ids[1:]], TOKENS))


@pytest.mark.parametrize("ids", [[2**31], [1.5], ["a"]])
def test_what_is_no_token_id_is_refused(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="token ids"):
        pack_ids(ids)


# --- pages and answers ----------------------------------------------------------------------------


def test_pages_and_answers_come_back_after_a_restart(tmp_path: Path) -> None:
    ids = list(range(10))
    answers = [exchange("a", ids[:6], created=5), exchange("a", ids, created=9), exchange("b", [], created=7)]
    journal = opened(tmp_path / "j")
    pages = write(journal, ids)
    assert all(journal.append(answer) for answer in answers)
    journal.close()

    journal = opened(tmp_path / "j")
    assert all(journal.has(page.key) for page in pages)
    assert [read(journal, page, ids) for page in pages] == [payload_of(page) for page in pages]
    assert journal.exchanges() == [answers[0], answers[2], answers[1]]
    assert journal.exchanges() == [answers[0], answers[2], answers[1]], "also when asked again"
    infos = {info.id: info for info in journal.sessions()}
    assert (infos["a"].exchanges, infos["a"].tokens, infos["a"].created) == (2, 10, 5)
    assert infos["a"].size > 2 * FILE_BYTES > infos["b"].size > 0
    assert journal.size == sum(path.stat().st_size for path in files(tmp_path / "j" / FINGERPRINT))
    assert (journal.failed, journal.damaged) == ("", 0)
    journal.close()


def test_a_payload_may_be_in_pieces(tmp_path: Path) -> None:
    """As a page lies in memory: a stripe in each layer."""
    journal = opened(tmp_path)
    (page,) = page_keys("s", [1, 2, 3, 4], TOKENS)
    pieces = [bytes([n]) * 8 for n in range(8)]
    assert journal.write_page(page.key, page.parent, [1, 2, 3, 4], pieces)
    memory = bytearray(200)
    stripes = [memoryview(memory)[25 * n : 25 * n + 16] for n in range(4)]
    assert journal.read_page(page.key, page.parent, [1, 2, 3, 4], stripes)
    assert b"".join(stripes) == b"".join(pieces)
    assert memory[16:25] == bytes(9)
    journal.close()


def test_shared_pages_are_written_once(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    write(journal, [1, 2, 3, 4, 5, 6, 7, 8])
    write(journal, [1, 2, 3, 4, 9, 9, 9, 9])
    assert len(list(tmp_path.rglob("*.page"))) == 3
    journal.close()


def test_scopes_share_nothing(tmp_path: Path) -> None:
    ids = [1, 2, 3, 4]
    journal = opened(tmp_path)
    write(journal, ids, "s")
    (page,) = page_keys("t", ids, TOKENS)
    assert not journal.has(page.key)
    assert read(journal, page, ids) is None
    assert match(journal, "t", ids) == []
    journal.close()


def test_match_is_exact_to_the_token(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    pages = write(journal, list(range(10)))
    first, second, third = pages

    def matched(ids: list[int]) -> list[tuple[bytes, int]]:
        return [(found.key, found.rows) for found in match(journal, "s", ids)]

    assert matched([*range(20)]) == [(first.key, 4), (second.key, 4), (third.key, 2)]
    assert matched([*range(9), 77]) == [(first.key, 4), (second.key, 4), (third.key, 1)]
    assert matched([*range(6)]) == [(first.key, 4), (second.key, 2)]
    assert matched([0, 1, 77, 3, 4]) == [(first.key, 2)]
    assert matched([77]) == matched([]) == []
    last = match(journal, "s", list(range(20)))[-1]
    assert (last.parent, last.ids) == (second.key, (8, 9))
    write(journal, list(range(12)))
    assert matched([*range(10), 77]) == [(first.key, 4), (second.key, 4), (third.key, 2)], "the short one"
    journal.close()


def test_another_prefix_does_not_read_a_page(tmp_path: Path) -> None:
    """Asked for with the wrong parent, ids or size, a page does not come out."""
    ids = [1, 2, 3, 4]
    for parent, asked, size in (
        (bytes(16), ids, PAGE_BYTES),
        (root_key("s"), [1, 2, 3, 5], PAGE_BYTES),
        (root_key("s"), ids, PAGE_BYTES - 1),
        (root_key("s"), ids, 0),
    ):
        journal = opened(tmp_path)
        (page,) = write(journal, ids)
        assert not journal.read_page(page.key, parent, asked, bytearray(size))
        journal.close()


def test_wrong_keys_and_sizes_are_not_written(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    (page,) = page_keys("s", [1, 2, 3, 4], TOKENS)
    with pytest.raises(ValueError, match="key"):
        journal.write_page(page.key, page.parent, [1, 2, 3, 5], b"x")
    for size in (0, PAGE_BYTES + 1):
        with pytest.raises(ValueError, match="bytes"):
            journal.write_page(page.key, page.parent, [1, 2, 3, 4], bytes(size))
    assert not journal.has(page.key)
    assert journal.failed == ""
    journal.close()


@pytest.mark.parametrize(
    "bad",
    [{"session": name} for name in ("", "../a", "a/b", "a.b", "a\n", "x" * 129, "\u00e9")]
    + [{"last_page": "00"}, {"last_page": "Z" * 32}, {"created": -1}, {"tokens": True}, {"ids": (2**31,)}],
)
def test_bad_answers_cannot_be_made(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        dataclasses.replace(exchange("a", [1]), **bad)  # type: ignore[arg-type]


def test_an_answers_last_page_is_one_that_is_there(tmp_path: Path) -> None:
    """A page that the queue had no room for must not cut the session off from those before it."""
    ids = list(range(12))
    pages = page_keys("s", ids, TOKENS)
    journal = opened(tmp_path)
    write(journal, ids[:8])
    journal.append(exchange("a", ids), [page.key for page in pages])
    journal.append(exchange("b", ids), [pages[2].key])
    assert [answer.last_page for answer in journal.exchanges()] == [pages[1].key.hex(), ""]
    journal.close()


def test_the_clock_going_back_keeps_a_sessions_order(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    for created in (50, 10, 60):
        journal.append(exchange("a", [1], created=created))
    journal.append(exchange("b", [1], created=55))
    journal.close()
    journal = opened(tmp_path)
    assert [answer.created for answer in journal.exchanges()] == [50, 10, 55, 60]
    journal.close()


# --- look-ups -------------------------------------------------------------------------------------


def index_of(pages: Sequence[Sequence[int]]) -> tuple[JournalIndex, dict[bytes, tuple[int, ...]]]:
    """An index of pages after one parent."""
    index, tokens = JournalIndex(), {}
    for ids in pages:
        key = next_key(b"parent", pack_ids(ids))
        index.add_page(key, PageFile(b"parent", pack_ids(ids), 1, 0.0))
        tokens[key] = tuple(ids)
    return index, tokens


def agreed(one: Sequence[int], other: Sequence[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def test_the_closest_page_is_as_close_as_any() -> None:
    """Ids whose bytes sort unlike the numbers, pages that begin each other, and pages that come and go."""
    rng = random.Random(0)
    alphabet = [0, 1, 255, 256, 65536, 2**31 - 1]
    for _ in range(300):
        pages = {tuple(rng.choices(alphabet, k=rng.randint(1, 4))) for _ in range(rng.randint(0, 25))}
        index, tokens = index_of(sorted(pages))
        for key in rng.sample(sorted(tokens), len(tokens) // 3):
            index.drop_page(key)
            del tokens[key]
        for _ in range(10):
            wanted = rng.choices(alphabet, k=rng.randint(0, 5))
            most = max((agreed(ids, wanted) for ids in tokens.values()), default=0)
            found = index.closest(b"parent", pack_ids(wanted))
            assert (found is not None) == (most > 0)
            if found is not None:
                assert (found.rows, found.ids) == (most, tokens[found.key])
                assert agreed(found.ids, wanted) == most
                if tuple(wanted[:most]) in tokens.values():
                    assert len(found.ids) == most, "no more is read than is used"
        superseded = {
            key
            for key, ids in tokens.items()
            if any(other[: len(ids)] == ids != other for other in tokens.values())
        }
        assert set(index.superseded()) == superseded


def test_a_look_up_compares_few_of_many_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    index, _ = index_of([[n, 7] for n in range(4000)])
    compared: list[Any] = []
    common = journal_index.common_tokens

    def counted(one: Sequence[int], other: Sequence[int]) -> int:
        compared.append(one)
        return common(one, other)

    monkeypatch.setattr(journal_index, "common_tokens", counted)
    found = index.closest(b"parent", pack_ids([1234, 8]))
    assert found is not None
    assert (found.ids, found.rows) == ((1234, 7), 1)
    assert len(compared) <= 2


@pytest.mark.parametrize("slow", ["a page's removal", "a folder's removal", "an answer"])
def test_look_ups_do_not_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    opened(tmp_path, OTHER).close()
    journal = opened(tmp_path, max_age_s=3600)
    (old,) = write(journal, [1, 1, 1, 1])
    (kept,) = write(journal, [2, 2, 2, 2])
    journal._store.index.pages[old.key].used -= 5000
    started, go_on = threading.Event(), threading.Event()

    def waits(*_args: object, **_options: object) -> None:
        started.set()
        assert go_on.wait(20)

    if slow == "a page's removal":
        monkeypatch.setattr(PageFiles, "remove", waits)
    elif slow == "a folder's removal":
        journal._foreign = [dataclasses.replace(foreign, used=0.0) for foreign in journal._foreign]
        monkeypatch.setattr(shutil, "rmtree", waits)
    else:
        monkeypatch.setattr(SessionLogs, "append", lambda *args: waits(*args) or 0)
    change = (
        (lambda: journal.append(exchange("a", [])))
        if slow == "an answer"
        else (lambda: journal.sweep(time.time()))
    )
    changing = threading.Thread(target=change)
    changing.start()
    looked: list[Found | None] = []

    def look() -> None:
        looked.append(journal.closest(root_key("s"), [2, 2, 3]))
        looked.append(journal.closest(root_key("s"), [1, 1, 3]))
        journal.touch("a")

    looking = threading.Thread(target=look)
    try:
        assert started.wait(20)
        looking.start()
        looking.join(10)
        assert not looking.is_alive(), "it waits for the disk"
        assert read(journal, kept, [2, 2, 2, 2]) == payload_of(kept)
    finally:
        go_on.set()
        changing.join()
        looking.join()
    assert looked[0] == Found(kept.key, kept.parent, (2, 2, 2, 2), 2)
    if slow == "a page's removal":
        assert looked[1] is None, "what is about to go is not found"
    journal.close()


# --- the folder -----------------------------------------------------------------------------------


def test_everything_is_private(tmp_path: Path) -> None:
    former = os.umask(0)
    try:
        journal = opened(tmp_path / "j")
        write(journal, [1, 2, 3, 4, 5])
        journal.append(exchange("a", [1]))
    finally:
        os.umask(former)
    modes = {
        path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "j", *(tmp_path / "j").rglob("*"))
    }
    assert len(modes) == 8  # DIR lock FINGERPRINT pages 2 sessions 1
    assert all(mode == (0o700 if path.is_dir() else 0o600) for path, mode in modes.items()), modes
    journal.close()


@pytest.mark.parametrize("mode", [0o750, 0o705, 0o701, 0o770, 0o777])
def test_a_folder_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "j").mkdir()
    (tmp_path / "j").chmod(mode)
    with pytest.raises(ConfigError, match="chmod 700"):
        opened(tmp_path / "j")
    assert list((tmp_path / "j").iterdir()) == []


def test_other_unusable_folders_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot use the journal .*file"):
        opened(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"its parent .*nowhere does not exist"):
        opened(tmp_path / "nowhere" / "j")
    (tmp_path / "j").mkdir(0o700)
    (tmp_path / "j" / "lock").mkdir()
    with pytest.raises(ConfigError, match="cannot write in the journal"):
        opened(tmp_path / "j")
    (tmp_path / "j" / "lock").rmdir()
    (tmp_path / "j" / FINGERPRINT).write_text("")
    with pytest.raises(ConfigError, match="cannot write in the journal"):
        opened(tmp_path / "j")
    (tmp_path / "j" / FINGERPRINT).unlink()
    opened(tmp_path / "j").close()
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    with pytest.raises(ConfigError, match="another user"):
        opened(tmp_path / "j")


def test_fingerprints_are_hex(tmp_path: Path) -> None:
    for bad in ("", "../../etc", "ABCDEF0123", "0123", "0" * 129):
        with pytest.raises(ValueError, match="hex digits"):
            opened(tmp_path / "j", bad)


def test_a_second_process_is_refused_by_name(tmp_path: Path) -> None:
    code = textwrap.dedent("""
        import sys
        from pathlib import Path
        from k2hybrid.cache.journal import Journal
        from k2hybrid.errors import ConfigError
        try:
            Journal(Path(sys.argv[1]), "00112233", 64).close()
            print("opened")
        except ConfigError as error:
            print(error)
    """)

    def second() -> str:
        return subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
        ).stdout

    journal = opened(tmp_path)
    said = second()
    assert str(tmp_path) in said
    assert f"process {os.getpid()};" in said
    with pytest.raises(ConfigError, match="in use"):
        opened(tmp_path)
    journal.close()
    assert second() == "opened\n"


# --- deletion and limits --------------------------------------------------------------------------


def test_delete_keeps_what_others_reach(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    a, b = [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7, 7, 7, 7]
    pages_a, pages_b = write(journal, a), write(journal, b)
    journal.append(exchange("a", a))
    journal.append(exchange("b", b))
    # Of a request that was interrupted, after what is only b's.
    below = write(journal, [*b, 8, 8])[-1]
    assert journal.delete("a")
    assert not journal.delete("a")
    assert [journal.has(page.key) for page in pages_a] == [True, False]
    assert [info.id for info in journal.sessions()] == ["b"]
    assert [answer.session for answer in journal.exchanges()] == ["b"]
    assert journal.delete("b")
    assert not any(journal.has(page.key) for page in (*pages_a, *pages_b, below))
    assert files(tmp_path) == [tmp_path / "lock"]
    assert journal.size == 0
    journal.close()


def test_delete_leaves_no_words_of_a_session(tmp_path: Path) -> None:
    """What was computed ahead of a next turn is reached by no answer, and may branch from a shared page."""
    journal = opened(tmp_path)
    shared = [1, 2, 3, 4]
    a, b = [*shared, 5, 5, 5, 5, 6], [*shared, 7, 7, 7, 7]
    write(journal, a)
    kept = write(journal, b)
    journal.append(exchange("a", a))
    journal.append(exchange("b", b))
    write(journal, [*shared, 5, 5, 6, 6, 6])  # ahead of a's next turn
    write(journal, [1, 2, 5, 5, 6])  # the same where not even the first page is shared
    lost = write(journal, [9] * 12)  # of a request of a's that was interrupted, its middle lost
    assert journal.delete("a")
    assert journal._store.index.pages.keys() == {page.key for page in kept}
    assert {path.name for path in tmp_path.rglob("*.page")} == {f"{page.key.hex()}.page" for page in kept}
    assert not journal.has(lost[2].key)
    journal.close()


def test_what_follows_a_missing_page_is_deleted_too(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    ids = [1] * 12
    pages = write(journal, ids)
    journal.append(exchange("a", ids))
    (tmp_path / FINGERPRINT / "pages" / f"{pages[1].key.hex()}.page").unlink()
    assert read(journal, pages[1], ids) is None
    assert journal.delete("a")
    assert files(tmp_path) == [tmp_path / "lock"]
    journal.close()


def test_a_page_that_cannot_be_removed_is_still_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = opened(tmp_path)
    ids = [1] * 8
    pages = write(journal, ids)
    journal.append(exchange("a", ids))
    size = journal.size

    def fails(*_args: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(PageFiles, "remove", fails)
        assert not journal.delete("a")
    assert (journal.failed, journal.size) == ("Input/output error", size)
    assert all(journal.has(page.key) for page in pages)
    assert journal.delete("a")
    assert files(tmp_path) == [tmp_path / "lock"]
    journal.close()


def test_the_least_recently_used_session_goes_first(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    histories = {name: [n] * 8 for n, name in enumerate("abcd")}
    for name, ids in histories.items():
        write(journal, ids)
        journal.append(exchange(name, ids))
    journal.close()
    for n, name in enumerate("abcd"):
        for page in page_keys("s", histories[name], TOKENS):
            age(tmp_path, 1000 - 100 * n, f"{page.key.hex()}.page")
        age(tmp_path, 1000 - 100 * n, f"{name}.log")
    journal = opened(tmp_path)
    journal.touch("a")
    journal.touch("nobody")
    room = 2 * journal.sessions()[0].size + FILE_BYTES
    journal.close()
    journal = opened(tmp_path, max_bytes=room)
    assert [info.id for info in journal.sessions()] == ["d", "a"]
    assert len(list(tmp_path.rglob("*.page"))) == 4
    assert journal.size <= room
    journal.close()


def test_reading_a_page_is_using_its_session(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    for name, ids in (("a", [1] * 8), ("b", [2] * 8)):
        write(journal, ids)
        journal.append(exchange(name, ids))
    journal.close()
    age(tmp_path, 500)
    age(tmp_path, 900, "a.log")
    journal = opened(tmp_path)
    pages = page_keys("s", [1] * 8, TOKENS)
    assert all(read(journal, page, [1] * 8) for page in pages)
    journal.close()
    journal = opened(tmp_path, max_bytes=3 * FILE_BYTES + 100)
    assert [info.id for info in journal.sessions()] == ["a"]
    journal.close()


def test_what_is_too_old_goes(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    for name, ids in (("a", [1] * 8), ("b", [1, 1, 1, 1, 2])):
        write(journal, ids)
        journal.append(exchange(name, ids))
    orphan = write(journal, [7] * 4)[0]
    journal.close()
    age(tmp_path, 5000)
    other = opened(tmp_path, OTHER)
    other.close()
    age(tmp_path / OTHER, 5000)
    age(tmp_path, 10, "b.log")
    journal = opened(tmp_path, max_age_s=3600)
    assert [info.id for info in journal.sessions()] == ["b"]
    assert not journal.has(orphan.key)
    assert len(list(tmp_path.rglob("*.page"))) == 2
    assert not (tmp_path / OTHER).exists()
    journal.sweep(time.time() + 4000)
    assert files(tmp_path) == [tmp_path / "lock"]
    journal.close()


def test_dates_in_the_future_do_not_keep_anything_forever(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    write(journal, [1] * 8)
    journal.append(exchange("a", [1] * 8))
    journal.close()
    age(tmp_path, -1e9)
    journal = opened(tmp_path, max_age_s=3600)
    journal.sweep(time.time() + 4000)
    assert journal.sessions() == []
    assert journal.size == 0
    journal.close()


def test_other_fingerprints_count_and_go(tmp_path: Path) -> None:
    (tmp_path / "my-notes").mkdir()
    (tmp_path / "my-notes" / "a.txt").write_text("x" * 5000)
    other = opened(tmp_path, OTHER)
    write(other, [1] * 20)
    other.close()
    age(tmp_path / OTHER, 100)
    size = sum(path.stat().st_size for path in files(tmp_path / OTHER))
    journal = opened(tmp_path, max_bytes=size + FILE_BYTES)
    assert journal.size == size
    assert not journal.has(page_keys("s", [1] * 20, TOKENS)[0].key), "they are not read"
    write(journal, [1] * 4)
    assert (tmp_path / OTHER).exists()
    write(journal, [1] * 8)
    assert not (tmp_path / OTHER).exists()
    assert journal.size == 2 * FILE_BYTES
    assert (tmp_path / "my-notes" / "a.txt").exists()
    journal.close()


def test_a_full_journal_keeps_the_beginning_of_what_is_written(tmp_path: Path) -> None:
    """Pages of one history alone: those before must not go for those after."""
    journal = opened(tmp_path, max_bytes=4 * FILE_BYTES)
    old = write(journal, [7] * 8)
    ids = list(range(40))
    written = [
        journal.write_page(page.key, page.parent, ids[page.start : page.stop], payload_of(page))
        for page in page_keys("s", ids, TOKENS)
    ]
    assert written == [True] * 4 + [False] * 6
    assert not any(journal.has(page.key) for page in old)
    assert journal.size == 4 * FILE_BYTES
    assert journal.failed == ""
    journal.close()
    journal = opened(tmp_path, max_bytes=FILE_BYTES - 1)
    assert journal.size == 0
    page = page_keys("s", ids, TOKENS)[0]
    assert not journal.write_page(page.key, page.parent, ids[:4], payload_of(page))
    journal.close()


def test_superseded_ends_go_and_are_still_matched(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    ids = list(range(8))
    for stop in (5, 6, 8):
        write(journal, ids[:stop])
        journal.append(exchange("a", ids[:stop]))
    # Another session ends in the middle and does not go on: its end stays.
    journal.append(exchange("b", ids[:6]))
    journal.sweep(time.time())
    keys = {stop: page_keys("s", ids[:stop], TOKENS)[-1].key for stop in (5, 6, 8)}
    assert {stop: journal.has(key) for stop, key in keys.items()} == {5: False, 6: True, 8: True}
    assert [found.rows for found in match(journal, "s", [0, 1, 2, 3, 4, 77])] == [4, 1]
    assert journal.delete("b")
    assert journal.has(keys[8])
    journal.sweep(time.time())
    assert not journal.has(keys[6])
    journal.close()


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["writev", "open", "rename"])
def test_a_failed_write_pauses_writing_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    journal = opened(tmp_path)
    clock = [0.0]
    journal._health._clock = lambda: clock[0]
    kept = write(journal, [1, 2, 3, 4])[0]
    before = files(tmp_path)

    def full(*_args: object, **_options: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(os, call, full)
        for ids in ([5] * 4, [6] * 4):
            page = page_keys("s", ids, TOKENS)[0]
            assert not journal.write_page(page.key, page.parent, ids, payload_of(page))
            assert not journal.has(page.key)
        assert not journal.append(exchange("a", [1]))
        assert journal.failed == "No space left on device"
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert files(tmp_path) == before, "nothing half-written is left"
        clock[0] += FIRST_PAUSE_S
        assert not journal.write_page(page.key, page.parent, ids, payload_of(page)), "it fails again"
        clock[0] += FIRST_PAUSE_S
    assert not journal.ready
    assert not journal.append(exchange("a", [1])), "each pause is longer"
    assert read(journal, kept, [1, 2, 3, 4]) == payload_of(kept)
    assert journal.exchanges() == []
    assert len(caplog.records) == 1
    clock[0] += FIRST_PAUSE_S
    with caplog.at_level(logging.WARNING):
        write(journal, [5] * 4)
        assert journal.append(exchange("a", [1]))
    assert (journal.failed, journal.last_error) == ("", "No space left on device")
    assert "it is written again" in caplog.records[1].getMessage()
    assert len(caplog.records) == 2
    journal.close()


def test_nothing_is_written_after_a_page_that_was_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take room and lead nowhere, until the page before it comes again."""
    journal = opened(tmp_path)
    journal._health._clock = lambda: 0.0
    ids = [1] * 12
    first, second, third = page_keys("s", ids, TOKENS)
    with monkeypatch.context() as patch:
        patch.setattr(PageFiles, "prepare", lambda *_args: (_ for _ in ()).throw(OSError(28, "full")))
        assert not journal.write_page(first.key, first.parent, ids[:4], b"x")
    journal._health._clock = lambda: FIRST_PAUSE_S
    for page in (second, third):
        assert not journal.write_page(page.key, page.parent, ids[:4], b"x")
    assert list(tmp_path.rglob("*.page")) == []
    write(journal, ids)
    assert len(list(tmp_path.rglob("*.page"))) == 3
    journal.close()


def test_an_answer_that_does_not_fit_leaves_its_log_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = opened(tmp_path)
    assert journal.append(exchange("a", [1]))
    size = (tmp_path / FINGERPRINT / "sessions" / "a.log").stat().st_size
    writev = os.writev
    calls = []

    def half(fd: int, buffers: Sequence[memoryview]) -> int:
        calls.append(fd)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return writev(fd, [buffers[0][:20]])

    monkeypatch.setattr(os, "writev", half)
    assert not journal.append(exchange("a", [1, 2]))
    assert (tmp_path / FINGERPRINT / "sessions" / "a.log").stat().st_size == size
    journal.close()


def test_short_writes_and_reads_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writev, preadv = os.writev, os.preadv
    monkeypatch.setattr(os, "writev", lambda fd, buffers: writev(fd, [buffers[0][:7]]))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:5]], at))
    journal = opened(tmp_path)
    ids = list(range(7))
    pages = write(journal, ids)
    assert [read(journal, page, ids) for page in pages] == [payload_of(page) for page in pages]
    journal.close()


def test_vanished_files_are_absent(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    (page,) = write(journal, [1, 2, 3, 4])
    journal.append(exchange("a", [1, 2, 3, 4]))
    for path in files(tmp_path / FINGERPRINT):
        path.unlink()
    assert read(journal, page, [1, 2, 3, 4]) is None
    assert not journal.has(page.key)
    journal.touch("a")
    assert journal.exchanges() == []
    write(journal, [1, 2, 3, 4])
    assert read(journal, page, [1, 2, 3, 4]) == payload_of(page)
    assert journal.delete("a")
    assert journal.failed == ""
    journal.close()


def test_a_closed_journal_changes_nothing(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    write(journal, [1] * 8)
    assert journal.append(exchange("a", [1] * 8))
    journal.close()
    journal.close()
    before = files(tmp_path)
    page = page_keys("s", [2] * 4, TOKENS)[0]
    assert not journal.write_page(page.key, page.parent, [2] * 4, payload_of(page))
    assert not journal.append(exchange("a", [1]))
    assert not journal.delete("a")
    journal.sweep(time.time() + 1e9)
    assert files(tmp_path) == before
