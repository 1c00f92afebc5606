"""The doorbell on a real device: answers arrive, order holds over replays, an abort frees a waiting graph."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from bench.gpu_doorbell import capture_step, pinned_doorbell, synchronize_within
from k2hybrid.errors import EngineError, NativeError
from k2hybrid.hardware.cuda_driver import CudaDriver
from k2hybrid.hardware.device_side import DeviceSide
from k2hybrid.hardware.doorbell import Doorbell
from k2hybrid.hardware.nvrtc import compile_cubin
from k2hybrid.hardware.streams import SIGNALS, Signal

pytestmark = pytest.mark.gpu
LAYERS = 60
WATCHDOG_S = 0.2


@pytest.fixture(params=SIGNALS)
def signal(request: pytest.FixtureRequest) -> Signal:
    chosen: Signal = request.param
    return chosen


@pytest.fixture
def doorbell() -> Iterator[Doorbell]:
    with pinned_doorbell(LAYERS, timeout_ms=WATCHDOG_S * 1e3) as bell:
        yield bell


def step(doorbell: Doorbell, graph: torch.cuda.CUDAGraph) -> None:
    doorbell.publish(rows=1, layers=LAYERS)
    graph.replay()
    synchronize_within(5.0, doorbell)
    doorbell.finish().require_answered()


def test_the_device_is_described() -> None:
    described = CudaDriver().describe(torch.cuda.current_device())
    assert described["name"] == torch.cuda.get_device_name()
    assert (described["sm_major"], described["sm_minor"]) == torch.cuda.get_device_capability()
    assert described["can_map_host_memory"] is True


def test_every_replay_gets_the_answers_of_its_own_rings(doorbell: Doorbell, signal: Signal) -> None:
    device = DeviceSide(doorbell, signal)
    graph = capture_step(device, LAYERS)
    expected = torch.arange(LAYERS, dtype=torch.int32) + 1001
    for _ in range(50):
        device.outputs.zero_()
        step(doorbell, graph)
        assert torch.equal(device.outputs.cpu(), expected)
    assert device.tally.tolist() == [0, 0]


def test_the_watchdog_frees_a_captured_graph_within_a_second(doorbell: Doorbell, signal: Signal) -> None:
    device = DeviceSide(doorbell, signal)
    graph = capture_step(device, LAYERS)
    step(doorbell, graph)

    stalled_at = 30
    doorbell.stall_at(stalled_at)
    doorbell.publish(rows=1, layers=LAYERS)
    graph.replay()
    assert synchronize_within(WATCHDOG_S + 5.0, doorbell) < WATCHDOG_S + 0.2
    outcome = doorbell.finish()
    assert (outcome.answered, outcome.aborted) == (stalled_at, "watchdog")
    with pytest.raises(EngineError, match="watchdog"):
        outcome.require_answered()
    if signal == "spinning_kernel":
        assert device.tally.tolist() == [LAYERS - stalled_at, 0]

    doorbell.stall_at(-1)
    time.sleep(0.1)  # the answering thread returns from its stall
    doorbell.reset()
    for _ in range(10):
        step(doorbell, graph)


def test_an_abort_frees_steps_that_were_launched_ahead(doorbell: Doorbell, signal: Signal) -> None:
    device = DeviceSide(doorbell, signal)
    graph = capture_step(device, LAYERS)
    doorbell.stall_at(0)
    doorbell.publish(rows=1, layers=LAYERS)
    for _ in range(3):
        graph.replay()
    time.sleep(0.02)
    doorbell.abort()
    assert synchronize_within(5.0, doorbell) < 1.0
    assert doorbell.finish().aborted == "asked"
    doorbell.stall_at(-1)


def test_a_rejected_kernel_shows_its_log() -> None:
    with pytest.raises(NativeError, match="no_such_type"):
        compile_cubin('extern "C" __global__ void f(no_such_type x) {}', 80, torch.version.cuda)
