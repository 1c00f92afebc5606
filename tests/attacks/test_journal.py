"""A hostile journal: whatever its files hold, whenever its writer dies: no wrong page, no exception."""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import sys
import textwrap
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from k2hybrid.cache.journal import Journal
from k2hybrid.cache.page_keys import PageKey, page_keys
from k2hybrid.cache.session_log import Exchange

FINGERPRINT = "0123456789abcdef"
TOKENS = 4
PAGE_BYTES = 96
HEADER_BYTES = 48
IDS = list(range(10, 20))
PAGES = page_keys("s", IDS, TOKENS)

modest = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def payload_of(page: PageKey) -> bytes:
    """Bytes that only this page has."""
    return random.Random(page.key).randbytes(PAGE_BYTES * (page.stop - page.start) // TOKENS)


def answer(n: int) -> Exchange:
    ids = tuple(range(n, n + 5))
    return Exchange("a", f"r{n}", "s", "c", "m", ids, f"thought {n}", n, PAGES[-1].key.hex(), n)


ANSWERS = [answer(n) for n in range(3)]


def write_all(folder: Path) -> None:
    journal = Journal(folder, FINGERPRINT, PAGE_BYTES)
    for page in PAGES:
        assert journal.write_page(page.key, page.parent, IDS[page.start : page.stop], payload_of(page))
    for one in ANSWERS:
        assert journal.append(one)
    journal.close()


def check(folder: Path) -> tuple[list[bool], int]:
    """Open the journal and read all: which pages came, each with its own bytes, and how many answers."""
    journal = Journal(folder, FINGERPRINT, PAGE_BYTES)
    came = []
    for page in PAGES:
        out = bytearray(len(payload_of(page)))
        came.append(journal.read_page(page.key, page.parent, IDS[page.start : page.stop], out))
        assert not came[-1] or out == payload_of(page)
        assert came[-1] == journal.has(page.key), "what is no good is deleted"
    answers = journal.exchanges()
    assert answers == ANSWERS[: len(answers)]
    journal.sessions()
    for page in PAGES:
        journal.closest(page.parent, IDS[page.start : page.stop])
    assert journal.failed == ""
    journal.close()
    return came, len(answers)


def page_path(folder: Path, page: PageKey) -> Path:
    return folder / FINGERPRINT / "pages" / f"{page.key.hex()}.page"


def log_path(folder: Path) -> Path:
    return folder / FINGERPRINT / "sessions" / "a.log"


def spoil(path: Path, content: bytes | bytearray) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def test_the_target_is_good(tmp_path: Path) -> None:
    write_all(tmp_path)
    assert check(tmp_path) == ([True] * 3, 3)


def test_every_truncation_of_a_page(tmp_path: Path) -> None:
    write_all(tmp_path)
    path = page_path(tmp_path, PAGES[1])
    content = path.read_bytes()
    assert len(content) == HEADER_BYTES + 4 * TOKENS + PAGE_BYTES
    for length in range(len(content)):
        spoil(path, content[:length])
        assert check(tmp_path) == ([True, False, True], 3)
        assert not path.exists()
    spoil(path, content)
    assert check(tmp_path) == ([True] * 3, 3)


def test_a_flipped_bit_in_every_byte_of_a_page(tmp_path: Path) -> None:
    """Before it is opened, and while it is open."""
    write_all(tmp_path)
    path = page_path(tmp_path, PAGES[1])
    content = path.read_bytes()
    rng = random.Random(0)
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.randrange(8)
        spoil(path, flipped)
        assert check(tmp_path) == ([True, False, True], 3)
        spoil(path, content)
        journal = Journal(tmp_path, FINGERPRINT, PAGE_BYTES)
        path.write_bytes(flipped)
        page = PAGES[1]
        out = bytearray(PAGE_BYTES)
        assert not journal.read_page(page.key, page.parent, IDS[page.start : page.stop], out)
        assert journal.damaged == 1
        journal.close()


def test_every_truncation_of_a_log(tmp_path: Path) -> None:
    """What is before the cut stays; and what is appended after it is found again."""
    write_all(tmp_path)
    path = log_path(tmp_path)
    content = path.read_bytes()
    counts = []
    for length in range(len(content)):
        spoil(path, content[:length])
        counts.append(check(tmp_path)[1])
        if length % 50 == 0:
            journal = Journal(tmp_path, FINGERPRINT, PAGE_BYTES)
            for one in ANSWERS[counts[-1] :]:
                assert journal.append(one)
            journal.close()
            assert path.read_bytes() == content
    assert counts == sorted(counts)
    assert set(counts) == {0, 1, 2}


def test_a_flipped_bit_in_every_byte_of_a_log(tmp_path: Path) -> None:
    write_all(tmp_path)
    path = log_path(tmp_path)
    content = path.read_bytes()
    rng = random.Random(0)
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.randrange(8)
        spoil(path, flipped)
        assert check(tmp_path)[1] < 3


@modest
@given(data=st.data())
def test_anything_anywhere(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Parts of files overwritten, cut out, doubled or swapped between files: whole or absent."""
    folder = tmp_path_factory.mktemp("j")
    folder.chmod(0o700)
    write_all(folder)
    paths = [*(page_path(folder, page) for page in PAGES), log_path(folder)]
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(paths))
        content = path.read_bytes() if path.exists() else b""
        start = data.draw(st.integers(0, len(content)))
        stop = data.draw(st.integers(start, len(content)))
        other = data.draw(st.sampled_from(paths))
        middle = data.draw(
            st.one_of(
                st.just(b""),
                st.binary(max_size=40),
                st.just(content[start:stop] * 2),
                st.just(bytes(stop - start)),
                st.just(other.read_bytes()[start:stop] if other.exists() else b""),
            )
        )
        spoil(path, content[:start] + middle + content[stop:])
    check(folder)
    check(folder)


def test_pages_under_each_others_names(tmp_path: Path) -> None:
    """Whole files, each with good checksums, but not what their name says."""
    write_all(tmp_path)
    first, second = page_path(tmp_path, PAGES[0]), page_path(tmp_path, PAGES[1])
    a, b = first.read_bytes(), second.read_bytes()
    spoil(first, b)
    spoil(second, a)
    assert check(tmp_path) == ([False, False, True], 3)


def forged(content: bytes, change: Callable[[list[int | bytes]], None], packed: bytes | None = None) -> bytes:
    """A page file with other header fields and a header checksum that fits them."""
    layout = struct.Struct("<8sIIQ16sI")
    fields: list[int | bytes] = list(layout.unpack(content[: layout.size]))
    change(fields)
    ids = content[HEADER_BYTES : HEADER_BYTES + 4 * TOKENS] if packed is None else packed
    header = layout.pack(*fields)
    crc = zlib.crc32(header + ids).to_bytes(4, "little")
    return header + crc + ids + content[HEADER_BYTES + 4 * TOKENS :]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (0, b"K2PAGE\n\0"),
        (1, 0),
        (1, 2),
        (2, 0),
        (2, 5),
        (2, 2**32 - 1),
        (3, 0),
        (3, 2**64 - 1),
        (3, 2**63),
        (4, bytes(16)),
        (5, 0),
    ],
)
def test_header_lies_with_a_good_checksum(tmp_path: Path, field: int, value: int | bytes) -> None:
    write_all(tmp_path)
    path = page_path(tmp_path, PAGES[1])
    content = path.read_bytes()
    assert forged(content, lambda _: None) == content

    def lie(fields: list[int | bytes]) -> None:
        fields[field] = value

    spoil(path, forged(content, lie))
    assert check(tmp_path) == ([True, False, True], 3)


def test_more_payload_than_a_page_has(tmp_path: Path) -> None:
    write_all(tmp_path)
    path = page_path(tmp_path, PAGES[1])
    content = path.read_bytes()

    def longer(fields: list[int | bytes]) -> None:
        fields[3] = PAGE_BYTES + 8

    spoil(path, forged(content, longer) + bytes(8))
    assert check(tmp_path) == ([True, False, True], 3)


def frame(record: bytes) -> bytes:
    length = len(record).to_bytes(4, "little")
    return length + zlib.crc32(length + record).to_bytes(4, "little") + record


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        b'{"ids": 3}',
        b'{"ids": "AAAA"}',
        b'{"ids": "AAA"}',
        b'{"ids": "\\u00e9"}',
        b"1" * 5000,
    ],
)
def test_records_that_are_no_answers(tmp_path: Path, record: bytes) -> None:
    write_all(tmp_path)
    with log_path(tmp_path).open("ab") as file:
        file.write(frame(record))
    assert check(tmp_path) == ([True] * 3, 3)


@pytest.mark.parametrize(
    ("was", "now"),
    [
        (b'"tokens":0', b'"tokens":-1'),
        (b'"tokens":0', b'"tokens":1e3'),
        (b'"tokens":0', b'"tokens":NaN'),
        (b'"tokens":0', b'"tokens":true'),
        (b'"tokens":0', b'"tokens":0,"more":1'),
        (b'"tokens":0', b'"tokens":1' + b"0" * 30),
        (b'"created":0', b'"created":"0"'),
        (b'"session":"a"', b'"session":"b"'),
        (b'"session":"a"', b'"session":["a"]'),
        (b'"scope":"s"', b'"scope":null'),
        (b'"reasoning":"', b'"reasoning":1,"x":"'),
        (b'"last_page":"', b'"last_page":"../'),
    ],
)
def test_answers_with_one_bad_field(tmp_path: Path, was: bytes, now: bytes) -> None:
    write_all(tmp_path)
    content = log_path(tmp_path).read_bytes()
    length = int.from_bytes(content[8:12], "little")
    record = content[16 : 16 + length]
    assert frame(record) == content[8 : 16 + length]
    assert was in record
    spoil(log_path(tmp_path), content[:8] + frame(record.replace(was, now)) + content[16 + length :])
    assert check(tmp_path) == ([True] * 3, 0)


def test_a_tail_of_zeros(tmp_path: Path) -> None:
    """As a power cut leaves it."""
    write_all(tmp_path)
    with log_path(tmp_path).open("ab") as file:
        file.write(bytes(4096))
    spoil(page_path(tmp_path, PAGES[2]), bytes(page_path(tmp_path, PAGES[2]).stat().st_size))
    assert check(tmp_path) == ([True, True, False], 3)


def test_things_that_are_no_files(tmp_path: Path) -> None:
    """Links, pipes and folders under the names of pages and logs are not followed, waited for or entered."""
    write_all(tmp_path)
    secret = tmp_path / "secret"
    secret.write_bytes(page_path(tmp_path, PAGES[0]).read_bytes())
    pages, sessions = tmp_path / FINGERPRINT / "pages", tmp_path / FINGERPRINT / "sessions"
    for page in PAGES:
        page_path(tmp_path, page).unlink()
    page_path(tmp_path, PAGES[0]).symlink_to(secret)
    os.mkfifo(page_path(tmp_path, PAGES[1]))
    page_path(tmp_path, PAGES[2]).mkdir()
    (pages / "x.tmp").mkdir()
    (pages / "stray").write_text("?")
    (pages / f"{PAGES[0].key.hex()}.1.tmp").write_bytes(b"half")
    (pages / f"{PAGES[0].key.hex().upper()}.page").write_bytes(b"?")
    log_path(tmp_path).rename(tmp_path / "a.log")
    (sessions / "a.log").symlink_to(tmp_path / "a.log")
    os.mkfifo(sessions / "b.log")
    (sessions / "c.log").mkdir()
    (sessions / "d e.log").write_bytes(b"?")
    before = secret.read_bytes(), (tmp_path / "a.log").read_bytes()
    assert check(tmp_path) == ([False] * 3, 0)
    assert (secret.read_bytes(), (tmp_path / "a.log").read_bytes()) == before
    assert sorted(path.name for path in pages.iterdir()) == [f"{PAGES[2].key.hex()}.page", "x.tmp"]
    journal = Journal(tmp_path, FINGERPRINT, PAGE_BYTES)
    assert not journal.append(answer(0)), "a link is not followed for writing either"
    assert journal.failed
    journal.close()
    assert (tmp_path / "a.log").read_bytes() == before[1]


_LOOP = """
import random, sys
from pathlib import Path
from k2hybrid.cache.journal import Journal
from k2hybrid.cache.page_keys import page_keys
from k2hybrid.cache.session_log import Exchange

folder, fingerprint, page_bytes, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
journal = Journal(Path(folder), fingerprint, page_bytes)
start = len(journal.exchanges())
print("ready", flush=True)
for n in range(start, 1 << 30):
    ids = [n] * (2 * tokens) + [n, n + 1]
    pages = page_keys("s", ids, tokens)
    for page in pages:
        journal.write_page(
            page.key, page.parent, ids[page.start : page.stop], random.Random(page.key).randbytes(page_bytes)
        )
    session = f"s{n % 7}"
    last = pages[-1].key.hex()
    journal.append(Exchange(session, f"r{n}", "s", "c", "m", tuple(ids), "t" * 3000, n, last, len(ids)))
    if n % 11 == 10:
        journal.delete(f"s{n % 5}")
    if journal.failed:
        print(journal.failed, n, flush=True)
        break
"""


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """A process that writes and deletes in a loop is killed; all that the next one finds is right."""
    page_bytes = 200_000
    rng = random.Random(0)
    found = 0
    for _ in range(6):
        arguments = [str(tmp_path), FINGERPRINT, str(page_bytes), str(TOKENS)]
        process = subprocess.Popen([sys.executable, "-c", _LOOP, *arguments], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n", "the lock of a killed process is free"
        time.sleep(rng.uniform(0.05, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        journal = Journal(tmp_path, FINGERPRINT, page_bytes)
        assert list(tmp_path.rglob("*.tmp")) == []
        answers = journal.exchanges()
        incomplete = set()
        for one in answers[-30:]:
            assert one.reasoning == "t" * 3000
            pages = page_keys("s", one.ids, TOKENS)
            for page in pages:
                out = bytearray(page_bytes)
                if journal.read_page(page.key, page.parent, one.ids[page.start : page.stop], out):
                    assert out == random.Random(page.key).randbytes(page_bytes)
                else:
                    incomplete.add(one.session)
            assert one.last_page == pages[-1].key.hex()
        # Pages are written before their answer and go before it: only a deletion leaves an answer alone.
        assert len(incomplete) <= 1
        assert journal.damaged <= 1, "a torn log"
        assert journal.failed == ""
        found += len(answers)
        journal.close()
    assert found > 0


def test_a_disk_that_takes_no_more(tmp_path: Path) -> None:
    """Files longer than the limit fail in the middle: writing pauses, nothing torn is left."""
    limited = textwrap.dedent("""
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    """)
    arguments = [str(tmp_path), FINGERPRINT, "2000", str(TOKENS)]
    done = subprocess.run(
        [sys.executable, "-c", limited + _LOOP, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1].startswith("File too large"), done.stderr
    assert "nothing is written for now" in done.stderr
    assert list(tmp_path.rglob("*.tmp")) == []
    journal = Journal(tmp_path, FINGERPRINT, 2000)
    answers = journal.exchanges()
    assert len(answers) > 5
    assert journal.damaged == 0
    for one in answers:
        for page in page_keys("s", one.ids, TOKENS):
            assert journal.has(page.key)
    journal.close()
