"""The hand-off on a device: the dispatcher's bits, eager and from graphs; a stuck worker frees the card."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from k2hybrid.errors import EngineError
from k2hybrid.experts.dispatch import Dispatcher
from k2hybrid.experts.handoff import TIMEOUT_MS, Handoff
from k2hybrid.hardware.streams import SIGNALS, CudaStream, Signal, choose_signal
from k2hybrid.native.machine import Machine
from tests.random_experts import TOP_K, RandomLayers

pytestmark = pytest.mark.gpu

HIDDEN, INTER = 416, 160
LAYERS = list(range(1, 62))
MAX_ROWS = 64
WATCHDOG_S = 0.3
LATER_S = 1.0 - 1e-3 * TIMEOUT_MS  # what is promised, less the watchdog's time where nobody says otherwise


class Made:
    """Random experts in 61 layers behind a CUDA stream, static inputs, and what is right."""

    def __init__(self, signal: Signal) -> None:
        self.random = RandomLayers(HIDDEN, INTER, LAYERS)
        self.stream = CudaStream(signal)
        self.handoff = Handoff(
            self.random.store,
            Machine(2),
            self.stream,
            layers=LAYERS,
            max_rows=MAX_ROWS,
            top_k=TOP_K,
            timeout_ms=WATCHDOG_S * 1e3,
        )
        self.dispatcher = Dispatcher(self.random.store, Machine(1), max_rows=MAX_ROWS, top_k=TOP_K)
        self.inputs = [t.cuda() for t in self.random.rows(MAX_ROWS)]
        self.outs: dict[int, torch.Tensor] = {}

    def record(self, layers: list[int], rows: int) -> None:
        """Hand every layer its rows, and do other work between ring and wait."""
        x, ids, weights = (t[:rows] for t in self.inputs)
        for layer in layers:
            ticket = self.handoff.submit(layer, x, ids, weights)
            shared = x.float() * 0
            self.outs[layer] = ticket.collect() + shared

    def capture(self, layers: list[int], rows: int) -> torch.cuda.CUDAGraph:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.record(layers, rows)
        return graph

    def change(self) -> None:
        for static, new in zip(self.inputs, self.random.rows(MAX_ROWS), strict=True):
            static.copy_(new)

    def check(self, layers: list[int], rows: int) -> None:
        x, ids, weights = (t[:rows].cpu() for t in self.inputs)
        for layer in layers:
            want = self.dispatcher.submit(layer, x, ids, weights).collect()
            assert torch.equal(self.outs[layer][:rows].cpu(), want), f"layer {layer}"

    def recover(self) -> None:
        deadline = time.monotonic() + 10
        while True:
            try:
                return self.handoff.begin([], 1)
            except EngineError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.001)


@pytest.fixture(params=SIGNALS)
def made(request: pytest.FixtureRequest) -> Iterator[Made]:
    made = Made(request.param)
    yield made
    made.handoff.close()


def test_the_driver_is_asked_which_signal_works() -> None:
    signal, why = choose_signal()
    assert signal in SIGNALS
    assert (why == "") == (signal == "stream_mem_ops")


@pytest.mark.parametrize("rows", [1, 3, 8, MAX_ROWS])
def test_eager_steps_have_the_dispatchers_bits(made: Made, rows: int) -> None:
    for layers in (LAYERS, LAYERS[:7], LAYERS[7:9]):
        made.change()
        made.handoff.begin(layers, rows)
        made.record(layers, rows)
        assert made.handoff.end() == set()
        made.check(layers, rows)
    assert made.stream.tally.tolist() == [0, 0]


@pytest.mark.parametrize("rows", range(1, 9))
def test_captured_steps_have_the_dispatchers_bits(made: Made, rows: int) -> None:
    graph = made.capture(LAYERS, rows)
    for valid in (rows, 1, rows):  # fewer than were captured, too
        made.change()
        made.handoff.begin(LAYERS, valid)
        graph.replay()
        assert made.handoff.end() == set()
        made.check(LAYERS, valid)
        assert made.handoff.stats.bytes_read > 0
    assert made.stream.given_up == 0


def test_graphs_of_pieces_make_one_step(made: Made) -> None:
    pieces = [made.capture(layers, 4) for layers in (LAYERS[:20], LAYERS[20:40], LAYERS[40:])]
    made.change()
    made.handoff.begin(LAYERS, 4)
    for piece in pieces:
        piece.replay()
    assert made.handoff.end() == set()
    made.check(LAYERS, 4)


def test_a_stuck_worker_frees_the_card_which_works_afterwards(made: Made) -> None:
    graph = made.capture(LAYERS, 2)
    made.handoff.native.stall_at(LAYERS[30])
    made.handoff.begin(LAYERS, 2)
    start = time.monotonic()
    graph.replay()
    with pytest.raises(EngineError, match=f"no progress after 30 of 61 layers, at layer {LAYERS[30]}"):
        made.handoff.end()
    assert time.monotonic() - start < WATCHDOG_S + LATER_S  # it is this bound that is promised
    if made.stream.signal == "spinning_kernel":
        assert made.stream.tally.tolist() == [len(LAYERS) - 30, 0]
    assert torch.ones(8, device="cuda").sum().item() == 8

    made.handoff.native.stall_at(-1)
    made.recover()
    assert made.handoff.end() == set()
    made.change()
    made.handoff.begin(LAYERS, 2)
    graph.replay()
    assert made.handoff.end() == set()
    made.check(LAYERS, 2)


def test_a_graph_that_rings_other_layers_than_announced_is_an_error(made: Made) -> None:
    graph = made.capture([LAYERS[1], LAYERS[0]], 1)
    made.handoff.begin(LAYERS[:2], 1)
    graph.replay()
    with pytest.raises(EngineError, match="announced"):
        made.handoff.end()


def test_closing_frees_a_graph_in_the_midst_of_a_step(made: Made) -> None:
    graph = made.capture(LAYERS, 1)
    made.handoff.native.stall_at(LAYERS[3])
    made.handoff.begin(LAYERS, 1)
    graph.replay()
    made.handoff.close()
    torch.cuda.synchronize()
