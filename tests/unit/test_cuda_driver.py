"""The driver face against a stand-in library that has the layouts of ``cuda.h``: no GPU is needed."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from k2hybrid.errors import NativeError
from k2hybrid.experts.copies import CudaCopies
from k2hybrid.experts.dispatch import Dispatcher
from k2hybrid.experts.handoff import Handoff
from k2hybrid.experts.locked_slots import LockedSlots
from k2hybrid.experts.store import ExpertStore
from k2hybrid.hardware.cuda_driver import CudaDriver, pci_link, wait_op, write_op
from k2hybrid.hardware.doorbell import Doorbell, DoorbellWords
from k2hybrid.hardware.nvrtc import library_candidates, open_library
from k2hybrid.hardware.streams import CudaStream
from k2hybrid.native.machine import Machine
from k2hybrid.native.store import Loan, MemorySpan
from tests.random_experts import EXPERTS, LAYER, TOP_K, RandomExperts

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if COMPILER is None:
        pytest.skip("needs a C++ compiler for the stand-in driver")
    library = tmp_path_factory.mktemp("fake") / "libcuda.so.1"
    source = Path(__file__).with_name("fake_cuda.cpp")
    subprocess.run([COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", source, "-o", library], check=True)
    return library


@pytest.fixture(scope="module")
def driver(library: Path) -> CudaDriver:
    return CudaDriver(str(library))


def test_a_missing_driver_is_named() -> None:
    with pytest.raises(NativeError, match="no NVIDIA driver"):
        CudaDriver("libcuda-that-is-not-there.so.1")


def test_describe(driver: CudaDriver) -> None:
    described = driver.describe()
    assert described["name"] == "Fake 1"
    assert described["memory_bytes"] == 24 << 30
    assert described["cuda_of_driver"] == "12.8"
    assert described["pci_address"] == "0000:0a:00.0"
    assert (described["sm_major"], described["sm_minor"]) == (9, 0)
    assert described["can_use_64_bit_stream_mem_ops"] is False


def test_a_failing_call_speaks_the_drivers_words(driver: CudaDriver) -> None:
    words = re.escape(
        "cuStreamBatchMemOp_v2 failed with 801: operation not supported (CUDA_ERROR_NOT_SUPPORTED)"
    )
    with pytest.raises(NativeError, match=words):
        driver.batch(7, write_op(0, 0))
    with pytest.raises(NativeError, match="cuDeviceGet failed with 101"):
        driver.describe(3)


def test_batched_operations_reach_the_driver_in_order_and_layout(driver: CudaDriver) -> None:
    words = (ctypes.c_uint32 * 3)(0, 5, 0)
    at = [driver.device_address(ctypes.addressof(words)) + 4 * i for i in range(3)]
    driver.batch(0, write_op(at[0], 0xFFFFFFFF), wait_op(at[1], 5), write_op(at[1], 6), write_op(at[2], 7))
    assert list(words) == [0xFFFFFFFF, 6, 7]


def test_the_doorbell_answers_stream_memory_operations(driver: CudaDriver) -> None:
    """Ring in one batch, wait and clear in another, run at once."""
    doorbell = Doorbell(16)
    value = doorbell.layout
    for _ in range(20):
        doorbell.publish(rows=1, layers=16)
        for slot in range(16):
            word = {name: doorbell.word(slot, name) for name in ("request", "input", "reply", "output")}
            driver.batch(0, write_op(word["input"], 40 + slot), write_op(word["request"], value["rung"]))
            driver.batch(0, wait_op(word["reply"], value["answered"]), write_op(word["reply"], value["idle"]))
            assert ctypes.c_uint32.from_address(word["output"]).value == 41 + slot
        doorbell.finish().require_answered()


def test_memory_is_pinned_in_pages_of_its_own(driver: CudaDriver, library: Path) -> None:
    pages = torch.zeros(3 * 4096, dtype=torch.uint8)
    at = -(-pages.data_ptr() // 4096) * 4096
    driver.register_host(at, 100)
    driver.register_host(at + 4096, 4096)
    with pytest.raises(NativeError, match="failed with 712"):
        driver.register_host(at + 200, 100)
    for address in (at, at + 4096):
        driver.unregister_host(address)
    with pytest.raises(NativeError, match="failed with 713"):
        driver.unregister_host(at)


def page_of(memory: torch.Tensor) -> int:
    return -(-memory.data_ptr() // 4096) * 4096


def in_thread(work: Callable[[], str]) -> str:
    """What it returns in a thread that has done nothing on a card."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.fixture
def copies(library: Path, monkeypatch: pytest.MonkeyPatch) -> CudaCopies:
    monkeypatch.setattr("k2hybrid.experts.copies.CudaDriver", lambda: CudaDriver(str(library)))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    # torch asks its runtime, in which a thread's first device is current before anybody entered it.
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return CudaCopies(torch.device("cuda"))


def test_any_thread_locks_memory(copies: CudaCopies, library: Path) -> None:
    ranges = ctypes.CDLL(str(library)).registered_ranges
    memory, before = torch.zeros(2 * 4096, dtype=torch.uint8), ranges()
    at = page_of(memory)
    driver = CudaDriver(str(library))
    with pytest.raises(NativeError, match=r"cuMemHostRegister_v2 failed with 201.*INVALID_CONTEXT"):
        in_thread(lambda: str(driver.register_host(at, 4096)))
    assert in_thread(lambda: copies.lock(at, 4096)) == ""
    assert ranges() == before + 1
    in_thread(lambda: str(copies.unlock(at)))
    assert ranges() == before


def test_a_refused_lock_is_told_once_with_what_it_costs(
    copies: CudaCopies, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = RandomExperts(160, 96)
    store = ExpertStore(layers=2, experts=EXPERTS, hidden=160, inter=96)
    made.give(store)

    def lend(layer: int, expert: int) -> Loan:
        parts = tuple(MemorySpan(t.address, t.nbytes) for t in store.tensors(layer, expert))
        return Loan(parts, parts)

    monkeypatch.setattr(store, "lend", lend)
    monkeypatch.setattr(store, "give_back", lambda layer, expert: None)
    copies._context = 3  # one that the driver does not know
    slots = LockedSlots(store, copies)
    with caplog.at_level("WARNING"):
        assert [slots.borrow(LAYER, expert) for expert in range(3)] == [None] * 3
    (told,) = caplog.messages
    assert "CUDA_ERROR_INVALID_CONTEXT" in told
    assert "through buffers" in told
    assert "costs long prompts time" in told


class InlineStream(CudaStream):
    """A `CudaStream` of stream memory operations over the stand-in, whose device is the CPU."""

    def __init__(self) -> None:
        super().__init__("stream_mem_ops")
        self.device = torch.device("cpu")

    def words(self, slots: int) -> DoorbellWords:
        return DoorbellWords(slots)

    @property
    def capturing(self) -> bool:
        return False

    def synchronize(self) -> None:
        pass


def test_a_hand_off_over_the_drivers_operations(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `CudaStream` records, run at once by the stand-in: the same bits as the dispatcher's."""
    monkeypatch.setattr("k2hybrid.hardware.streams.CudaDriver", lambda: CudaDriver(str(library)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    ranges = ctypes.CDLL(str(library)).registered_ranges
    before = ranges()
    made = RandomExperts(160, 96)
    store = ExpertStore(layers=2, experts=EXPERTS, hidden=160, inter=96)
    made.give(store)
    stream = InlineStream()
    handoff = Handoff(store, Machine(2), stream, layers=[LAYER], max_rows=5, top_k=TOP_K, timeout_ms=60_000)
    assert ranges() == before + 4
    dispatcher = Dispatcher(store, Machine(1), max_rows=5, top_k=TOP_K)
    for count in (1, 5, 2):
        rows = made.rows(count)
        handoff.begin([LAYER], count)
        got = handoff.submit(LAYER, *rows).collect()
        assert handoff.end() == set()
        assert torch.equal(got, dispatcher.submit(LAYER, *rows).collect())
    assert stream.given_up == 0
    handoff.close()
    assert ranges() == before


def test_pci_link(tmp_path: Path) -> None:
    device = tmp_path / "0000:0a:00.0"
    device.mkdir()
    (device / "current_link_speed").write_text("32.0 GT/s PCIe\n")
    (device / "current_link_width").write_text("16\n")
    assert pci_link("0000:0a:00.0", tmp_path) == {
        "pcie_current_link_speed": "32.0 GT/s PCIe",
        "pcie_current_link_width": "16",
    }
    assert pci_link("0000:ff:00.0", tmp_path) == {}


def test_nvrtc_prefers_the_major_version_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert next(library_candidates("13.0")) == "libnvrtc.so.13"
    monkeypatch.setattr("k2hybrid.hardware.nvrtc.library_candidates", lambda cuda: iter(["not-a-library.so"]))
    with pytest.raises(NativeError, match=r"NVRTC was not found[\s\S]*not-a-library.so"):
        open_library("13.0")
