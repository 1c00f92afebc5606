"""Captures that fail, in a stand-in for torch's: the stream comes back, and the first error stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from k2hybrid.errors import NativeError
from k2hybrid.hardware import cuda_graphs, streams
from k2hybrid.hardware.cuda_graphs import GraphRecorder
from k2hybrid.hardware.streams import choose_signal


class Card:
    """The calling thread's stream, and what befalls captures on it."""

    def __init__(self) -> None:
        self.stream = "the thread's own"
        self.begins = self.ends = True
        self.redirected: list[Any] = []  # pools that the allocator serves captures from
        self.replays = 0

    def set_stream(self, stream: str) -> None:
        self.stream = stream

    def end_pool(self, device: int, pool: Any) -> None:
        if pool not in self.redirected:
            raise RuntimeError("not recording to this pool")
        self.redirected.remove(pool)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    made = Card()

    class Graph:
        def replay(self) -> None:
            made.replays += 1

    class Capture:
        """As `torch.cuda.graph`: the stream is given back last, and not where the end fails."""

        def __init__(self, graph: Graph, pool: Any = None, capture_error_mode: str = "global") -> None:
            self.pool = pool
            assert capture_error_mode == "thread_local"

        def __enter__(self) -> None:
            self.before, made.stream = made.stream, "of the capture"
            made.redirected.append(self.pool)
            if not made.begins:
                raise RuntimeError("CUDA error: out of memory")

        def __exit__(self, *error: object) -> None:
            if not made.ends:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            made.redirected.remove(self.pool)
            made.stream = self.before

    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: made.stream)
    monkeypatch.setattr(torch.cuda, "set_stream", made.set_stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", made.end_pool, raising=False)
    monkeypatch.setattr(cuda_graphs, "_unended", [])
    return made


def failing(message: str) -> Callable[[], None]:
    def work() -> None:
        raise NativeError(message)

    return work


def test_what_is_captured_is_launched_again(card: Card) -> None:
    seen = []
    again = GraphRecorder()(lambda: seen.append(card.stream))
    again()
    again()
    assert (seen, card.replays, card.stream) == (["of the capture"], 2, "the thread's own")


@pytest.mark.parametrize("ends", [True, False])
def test_a_failed_capture_gives_the_stream_back_and_keeps_the_first_error(card: Card, ends: bool) -> None:
    card.ends = ends
    with pytest.raises(NativeError, match="the driver's words") as raised:
        GraphRecorder()(failing("the driver's words"))
    assert str(raised.value) == "the driver's words"
    assert (card.stream, card.redirected) == ("the thread's own", [])
    notes = getattr(raised.value, "__notes__", [])
    assert any("previous error during capture" in note for note in notes) == (not ends)
    # The allocator may ask a graph of which it was not told that its capture ended.
    assert len(cuda_graphs._unended) == (not ends)


@pytest.mark.parametrize(
    ("begins", "ends", "message"), [(False, True, "out of memory"), (True, False, "previous error")]
)
def test_a_capture_that_does_not_begin_or_end_gives_the_stream_back(
    card: Card, begins: bool, ends: bool, message: str
) -> None:
    card.begins, card.ends = begins, ends
    with pytest.raises(RuntimeError, match=message):
        GraphRecorder()(lambda: None)
    assert (card.stream, card.redirected) == ("the thread's own", [])
    card.begins = card.ends = True
    GraphRecorder()(lambda: None)()
    assert card.replays == 1


def test_the_drivers_refusal_is_quoted_where_signals_are_chosen(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(streams.EmulatedStream):
        def __init__(self, signal: str) -> None:
            super().__init__()

        def ring(self, words: Any, slot: int, value: int = 0) -> None:
            raise NativeError("cuStreamBatchMemOp_v2 failed with 801: operation not supported")

    card.ends = False
    monkeypatch.setattr(streams, "CudaStream", Refusing)
    assert choose_signal() == (
        "spinning_kernel",
        "cuStreamBatchMemOp_v2 failed with 801: operation not supported",
    )
    assert card.stream == "the thread's own"
