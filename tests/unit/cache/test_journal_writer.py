"""The journal's writer: bounded, in order, `done` exactly once whatever happens, and it ends when told."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from k2hybrid.cache.journal import Journal
from k2hybrid.cache.journal_health import FIRST_PAUSE_S
from k2hybrid.cache.journal_writer import Backlog, JournalWriter
from k2hybrid.cache.page_keys import page_keys
from k2hybrid.cache.session_log import Exchange

PAGE_BYTES = 64


class Bench:
    """A journal, a writer whose payloads wait while the gate is shut, and a count of what was called."""

    def __init__(self, folder: Path) -> None:
        self.journal = Journal(folder, "0123456789abcdef", PAGE_BYTES)
        self.writer = JournalWriter(self.journal, max_pages=3, max_answers=2)
        self.gate = threading.Event()
        self.started = threading.Event()
        self.sources: Counter[int] = Counter()
        self.done: Counter[int] = Counter()
        self.threads: set[str] = set()

    def offer(self, n: int, source: Callable[[], bytes] | None = None) -> bool:
        (page,) = page_keys("s", [n], 4)

        def payload() -> bytes:
            self.threads.add(threading.current_thread().name)
            self.sources[n] += 1
            self.started.set()
            assert self.gate.wait(10)
            return source() if source else bytes([n]) * PAGE_BYTES

        def done() -> None:
            self.threads.add(threading.current_thread().name)
            self.done[n] += 1

        return self.writer.offer(page.key, page.parent, [n], payload, done)

    def read(self, n: int) -> bytes | None:
        (page,) = page_keys("s", [n], 4)
        out = bytearray(PAGE_BYTES)
        return bytes(out) if self.journal.read_page(page.key, page.parent, [n], out) else None


def answer(created: int, ids: Sequence[int] = (1,)) -> Exchange:
    return Exchange("a", "r", "s", "c", "m", tuple(ids), "", created, "", 1)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "j")
    yield bench
    bench.gate.set()
    assert bench.writer.close()
    bench.journal.close()
    assert set(bench.done.values()) <= {1}


def test_pages_and_answers_are_written(bench: Bench) -> None:
    bench.gate.set()
    assert bench.offer(1)
    assert bench.writer.append(answer(5), [page_keys("s", [1], 4)[0].key])
    assert bench.writer.flush(10)
    assert bench.read(1) == b"\1" * PAGE_BYTES
    (written,) = bench.journal.exchanges()
    assert written.last_page == page_keys("s", [1], 4)[0].key.hex(), "the page was written first"
    assert not bench.offer(1), "it is known"
    assert (bench.sources, bench.done) == (Counter([1]), Counter([1]))
    assert bench.threads == {"k2hybrid-journal"}


def test_the_queue_is_bounded(bench: Bench) -> None:
    assert bench.offer(1)
    assert bench.started.wait(10)
    assert not bench.offer(1), "it is being written"
    assert bench.offer(2)
    assert not bench.offer(2), "it waits already"
    assert bench.offer(3)
    assert not bench.offer(4)
    assert bench.writer.append(answer(1))
    assert bench.writer.append(answer(2))
    assert not bench.writer.append(answer(3))
    assert not bench.writer.flush(0.05)
    bench.gate.set()
    assert bench.writer.flush(10)
    assert bench.done == Counter([1, 2, 3])
    assert bench.offer(4)
    assert bench.writer.append(answer(4))
    assert bench.writer.flush(10)
    assert [written.created for written in bench.journal.exchanges()] == [1, 2, 4]


def test_bytes_bound_the_queue_as_well(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "0123456789abcdef", PAGE_BYTES)
    writer = JournalWriter(journal, max_bytes=PAGE_BYTES - 1)
    (page,) = page_keys("s", [1], 4)
    assert not writer.offer(page.key, page.parent, [1], lambda: b"x", lambda: None)
    writer.close()
    journal.close()


def test_close_gives_up_pages_and_keeps_answers(bench: Bench) -> None:
    for n in (1, 2, 3):
        assert bench.offer(n)
    assert bench.started.wait(10)
    assert bench.writer.append(answer(1))
    assert not bench.writer.close(timeout_s=0.05)
    assert not bench.offer(4)
    assert not bench.writer.append(answer(2))
    bench.gate.set()
    assert bench.writer.close()
    assert bench.done == Counter([1, 2, 3])
    assert bench.sources == Counter([1])
    assert [bench.read(n) is not None for n in (1, 2, 3)] == [True, False, False]
    assert len(bench.journal.exchanges()) == 1
    assert bench.writer.flush(0)


def test_errors_of_the_callers_do_not_end_the_thread(bench: Bench) -> None:
    bench.gate.set()

    def fails() -> bytes:
        raise RuntimeError("the page is gone")

    assert bench.offer(1, fails)
    assert bench.offer(2, lambda: bytes(PAGE_BYTES + 1))
    (page,) = page_keys("s", [9], 4)

    def done_fails() -> None:
        raise RuntimeError("the pool is gone")

    assert bench.writer.offer(page.key, page.parent, [9], lambda: b"x", done_fails)
    assert bench.writer.flush(10)
    assert bench.offer(3)
    assert bench.writer.flush(10)
    assert bench.done == Counter([1, 2, 3])
    assert [bench.read(n) is not None for n in (1, 2, 3)] == [False, False, True]
    bench.done.clear()
    assert bench.offer(1), "it can be tried again"
    assert bench.journal.failed == ""


def test_after_a_failed_write_nothing_is_taken_for_a_while(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object) -> Path:
        raise OSError(28, "No space left on device")

    clock = [0.0]
    bench.journal._health._clock = lambda: clock[0]
    with monkeypatch.context() as patch:
        patch.setattr("k2hybrid.cache.page_files.PageFiles.prepare", full)
        assert bench.offer(1)
        assert bench.offer(2)
        assert bench.started.wait(10)
        bench.gate.set()
        assert bench.writer.flush(10)
    assert bench.done == Counter([1, 2])
    assert bench.sources == Counter([1])
    assert not bench.writer.ready
    assert not bench.offer(3)
    assert not bench.writer.append(answer(1))
    clock[0] += FIRST_PAUSE_S
    assert bench.writer.ready
    assert bench.offer(3)
    assert bench.writer.append(answer(1))
    assert bench.writer.flush(10)
    assert bench.read(3) is not None
    assert len(bench.journal.exchanges()) == 1
    bench.done.clear()
    assert bench.offer(1), "what was lost can be written later"


def test_what_follows_a_lost_page_is_not_even_fetched(bench: Bench) -> None:
    bench.gate.set()
    ids = [1, 2, 3, 4, 5]
    first, second = page_keys("s", ids, 4)

    def fails() -> bytes:
        raise RuntimeError("the page is gone")

    fetched: list[bytes] = []

    def fetch() -> bytes:
        fetched.append(b"x")
        return b"x"

    for again in (fails, fetch):
        assert bench.writer.offer(first.key, first.parent, ids[:4], again, lambda: None)
        assert bench.writer.offer(second.key, second.parent, ids[4:], fetch, lambda: None)
        assert bench.writer.flush(10)
        assert bench.journal.has(second.key) == bench.journal.has(first.key) == (again is fetch)
    assert len(fetched) == 2


def test_what_waits_is_told(bench: Bench) -> None:
    assert bench.writer.backlog() == Backlog(0, 0, ())
    assert bench.offer(1)
    assert bench.started.wait(10)
    assert bench.offer(2)
    assert bench.writer.append(answer(1))
    assert bench.writer.append(answer(2))
    assert bench.writer.backlog() == Backlog(2, 2 * PAGE_BYTES, ("a",))
    bench.gate.set()
    assert bench.writer.flush(10)
    assert bench.writer.backlog() == Backlog(0, 0, ())


def test_the_journal_is_swept_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path, "0123456789abcdef", PAGE_BYTES)
    swept = threading.Event()
    monkeypatch.setattr(journal, "sweep", lambda _now: swept.set())
    writer = JournalWriter(journal, sweep_s=0.01)
    assert swept.wait(10)
    assert writer.close()
    journal.close()


def test_many_threads(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.gate.set()
    taken: Counter[int] = Counter()
    guard = threading.Lock()

    def offers(seed: int) -> None:
        for i in range(60):
            n = (i * 7 + seed) % 40
            if bench.offer(n):
                with guard:
                    taken[n] += 1
            elif i % 9 == 0:
                time.sleep(0.001)
            bench.read(n)

    threads = [threading.Thread(target=offers, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bench.writer.flush(10)
    assert bench.done == taken
    assert all(bench.read(n) == bytes([n]) * PAGE_BYTES for n in taken)
    assert bench.writer.close()
    bench.journal.close()
