"""What is parked is taken once, or discarded once: by age, by number, at the end."""

from __future__ import annotations

import threading

from k2hybrid.runtime.parking import Parking


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_was_put_is_taken_once() -> None:
    gone: list[str] = []
    parking = Parking[str]()
    parking.put("a", "x", gone.append)
    assert len(parking) == 1
    assert parking.take("b") is None
    assert parking.take("a") == "x"
    assert parking.take("a") is None
    parking.close()
    assert gone == []


def test_one_key_is_a_queue() -> None:
    parking = Parking[str]()
    for key, value in (("a", "1"), ("b", "2"), ("a", "3")):
        parking.put(key, value, lambda value: None)
    assert [parking.take("a"), parking.take("a"), parking.take("a")] == ["1", "3", None]
    assert parking.take("b") == "2"


def test_entries_expire() -> None:
    gone: list[str] = []
    clock = Clock()
    parking = Parking[str](ttl_s=10, clock=clock)
    parking.put("a", "old", gone.append)
    clock.now = 5
    parking.put("a", "young", gone.append)
    clock.now = 9.9
    assert len(parking) == 2
    assert gone == []
    clock.now = 10
    assert parking.take("a") == "young"
    assert gone == ["old"]
    clock.now = 100
    assert len(parking) == 0
    assert gone == ["old"]


def test_expiry_needs_no_caller() -> None:
    discarded = threading.Event()
    parking = Parking[str](ttl_s=0.02)
    for value in ("1", "2"):
        parking.put("a", value, lambda value: discarded.set() if value == "2" else None)
    assert discarded.wait(10)
    discarded.clear()
    parking.put("a", "2", lambda value: discarded.set())  # the timer starts again
    assert discarded.wait(10)


def test_the_oldest_makes_room() -> None:
    gone: list[str] = []
    parking = Parking[str](limit=2)
    for value in "1234":
        parking.put("k" + value, value, gone.append)
    assert gone == ["1", "2"]
    assert len(parking) == 2
    assert parking.take("k1") is None
    assert parking.take("k4") == "4"
    none = Parking[str](limit=0)
    none.put("a", "x", gone.append)
    assert gone == ["1", "2", "x"]


def test_clear_discards_and_goes_on_close_does_not() -> None:
    gone: list[str] = []
    parking = Parking[str]()
    parking.put("a", "1", gone.append)
    parking.put("b", "2", gone.append)
    parking.clear()
    assert gone == ["1", "2"]
    parking.put("a", "3", gone.append)
    assert parking.take("a") == "3"
    parking.put("a", "4", gone.append)
    parking.close()
    parking.close()
    parking.put("a", "5", gone.append)
    assert gone == ["1", "2", "4", "5"]
    assert len(parking) == 0


def test_discard_may_call_back() -> None:
    parking = Parking[str](limit=1)
    lengths: list[int] = []
    parking.put("a", "1", lambda value: lengths.append(len(parking)))
    parking.put("a", "2", lambda value: None)
    assert lengths == [1]


def test_every_entry_leaves_exactly_once_whoever_hurries() -> None:
    left: list[int] = []
    parking = Parking[int](limit=8)

    def work(first: int) -> None:
        for value in range(first, first + 300):
            parking.put(str(value % 5), value, left.append)
            if (taken := parking.take(str((value + 2) % 5))) is not None:
                left.append(taken)

    threads = [threading.Thread(target=work, args=(i * 300,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(parking) <= 8
    parking.close()
    assert sorted(left) == list(range(1200))
