"""Streams that ring and wait: torch's current CUDA stream, captured or not, and its stand-in on the CPU.

What is called here is *recorded*: on a CUDA stream it runs later, in order, and again at each replay of what
was captured; on the CPU it runs at once. The words' protocol stands in ``csrc/gpu/doorbell.h``. Layer 1.
"""

from __future__ import annotations

import ctypes
from typing import Literal, Protocol
from weakref import WeakKeyDictionary

import torch

from k2hybrid.errors import NativeError
from k2hybrid.hardware.cuda_driver import CudaDriver, wait_op, write_op
from k2hybrid.hardware.cuda_graphs import captured
from k2hybrid.hardware.doorbell import DoorbellWords
from k2hybrid.hardware.nvrtc import compile_cubin
from k2hybrid.native.doorbell import ring_slot, wait_reply

Signal = Literal["stream_mem_ops", "spinning_kernel"]
SIGNALS: tuple[Signal, ...] = ("stream_mem_ops", "spinning_kernel")

# Longer than any answer that makes progress should take: an expert's read alone may take half a minute.
LIMIT_MS = 300_000.0

# One thread each. `wait_reply` gives up after limit_ns, so that a fault of ours cannot hang the card.
KERNELS = r"""
extern "C" __global__ void ring(unsigned* request, unsigned* input, unsigned value, unsigned rung) {
  asm volatile("st.relaxed.sys.u32 [%0], %1;" ::"l"(input), "r"(value) : "memory");
  asm volatile("st.release.sys.u32 [%0], %1;" ::"l"(request), "r"(rung) : "memory");
}

__device__ unsigned long long now_ns() {
  unsigned long long t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}

// tally, in host memory: poisoned replies, waits given up
extern "C" __global__ void wait_reply(unsigned* reply, volatile unsigned* tally, unsigned idle,
                                      unsigned answered, unsigned long long limit_ns) {
  unsigned long long start = now_ns();
  unsigned seen;
  do {
    asm volatile("ld.acquire.sys.u32 %0, [%1];" : "=r"(seen) : "l"(reply) : "memory");
  } while (seen == idle && now_ns() - start < limit_ns);
  asm volatile("st.relaxed.sys.u32 [%0], %1;" ::"l"(reply), "r"(idle) : "memory");
  if (seen == idle) {
    tally[1] += 1;
  } else if (seen != answered) {
    tally[0] += 1;
  }
}
"""


class SignalStream(Protocol):
    """What a hand-off needs of a stream. On a CUDA stream, the caller waits in `synchronize` alone."""

    device: torch.device  # of the tensors that it copies from and to

    @property
    def capturing(self) -> bool:
        """Whether what is called is kept for replays, and not run."""

    @property
    def given_up(self) -> int:
        """Waits so far that ended without any reply, as their limit had passed."""

    def words(self, slots: int) -> DoorbellWords:
        """New words that the stream reaches."""

    def pin(self, address: int, nbytes: int) -> None:
        """Make host memory, in pages of its own, one that copies may be recorded from and to."""

    def unpin(self, address: int) -> None:
        """Undo `pin`, the stream being idle."""

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """Copy between the device and pinned memory: same shape and dtype, both contiguous."""

    def ring(self, words: DoorbellWords, slot: int, value: int = 0) -> None:
        """Write the slot's input and request: all that was recorded before is then visible to the CPU."""

    def wait(self, words: DoorbellWords, slot: int) -> None:
        """Go on when the slot has a reply, answered or poisoned, and idle it."""

    def synchronize(self) -> None:
        """Return when all that was recorded or launched has run."""


class EmulatedStream:
    """A stream without a device: everything runs at once, on the calling thread.

    A wait lets other threads of the interpreter run.
    """

    def __init__(self, *, limit_ms: float = LIMIT_MS) -> None:
        self.device = torch.device("cpu")
        self._limit_ms = limit_ms
        self._given_up = 0

    @property
    def capturing(self) -> bool:
        """See `SignalStream.capturing`."""
        return False

    @property
    def given_up(self) -> int:
        """See `SignalStream.given_up`."""
        return self._given_up

    def words(self, slots: int) -> DoorbellWords:
        """See `SignalStream.words`."""
        return DoorbellWords(slots)

    def pin(self, address: int, nbytes: int) -> None:
        """Any memory will do."""

    def unpin(self, address: int) -> None:
        """See `pin`."""

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """See `SignalStream.copy`."""
        to.copy_(source)

    def ring(self, words: DoorbellWords, slot: int, value: int = 0) -> None:
        """See `SignalStream.ring`."""
        ring_slot(words.address, slot, value)

    def wait(self, words: DoorbellWords, slot: int) -> None:
        """See `SignalStream.wait`."""
        if wait_reply(words.address, slot, self._limit_ms) == words.layout["idle"]:
            self._given_up += 1

    def synchronize(self) -> None:
        """Nothing is ever outstanding."""


class CudaStream:
    """torch's current stream of the current device, whichever that is when something is recorded.

    Args:
        signal: how it rings and waits; `choose_signal` tells which works.
        limit_ms: after which a spinning kernel gives a wait up. Stream memory operations never do.

    Attributes:
        tally: int32 (replies that were poison, waits given up), counted by spinning kernels alone.

    Raises:
        NativeError: no driver, or the kernels do not compile.
    """

    def __init__(self, signal: Signal, *, limit_ms: float = LIMIT_MS) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.signal = signal
        spins = signal == "spinning_kernel"
        # On the host, where reading it waits for nothing.
        self.tally = torch.zeros(2, dtype=torch.int32, pin_memory=spins)
        self._limit_ns = ctypes.c_uint64(int(limit_ms * 1e6))
        self._driver = CudaDriver()
        self._seen_at: WeakKeyDictionary[DoorbellWords, int] = WeakKeyDictionary()
        self._functions: dict[str, int] = {}
        if spins:
            self._tally_at = ctypes.c_uint64(self._driver.device_address(self.tally.data_ptr()))
            self._functions = self.load(KERNELS, "ring", "wait_reply")
            self._warm_up()

    @property
    def capturing(self) -> bool:
        """See `SignalStream.capturing`."""
        return torch.cuda.is_current_stream_capturing()

    @property
    def given_up(self) -> int:
        """See `SignalStream.given_up`."""
        return int(self.tally[1])

    def words(self, slots: int) -> DoorbellWords:
        """See `SignalStream.words`."""
        return DoorbellWords(slots, pinned=True)

    def pin(self, address: int, nbytes: int) -> None:
        """See `SignalStream.pin`."""
        self._driver.register_host(address, nbytes)

    def unpin(self, address: int) -> None:
        """See `SignalStream.unpin`."""
        self._driver.unregister_host(address)

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """See `SignalStream.copy`."""
        to.copy_(source, non_blocking=True)

    def ring(self, words: DoorbellWords, slot: int, value: int = 0) -> None:
        """See `SignalStream.ring`."""
        request, given = self.at(words, slot, "request"), self.at(words, slot, "input")
        if self.signal == "stream_mem_ops":
            rung = write_op(request, words.layout["rung"])
            self._driver.batch(self._stream(), write_op(given, value), rung)
        else:
            rung_value = ctypes.c_uint32(words.layout["rung"])
            self.launch(
                self._functions["ring"],
                *(ctypes.c_uint64(request), ctypes.c_uint64(given), ctypes.c_uint32(value), rung_value),
            )

    def wait(self, words: DoorbellWords, slot: int) -> None:
        """See `SignalStream.wait`."""
        reply, idle, answered = self.at(words, slot, "reply"), words.layout["idle"], words.layout["answered"]
        if self.signal == "stream_mem_ops":
            self._driver.batch(self._stream(), wait_op(reply, answered), write_op(reply, idle))
        else:
            self._wait_kernel(reply, idle, answered)

    def synchronize(self) -> None:
        """See `SignalStream.synchronize`."""
        # An event that blocks: a thread that spins would take a core from the experts' workers.
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self.device))  # the caller's device may be another by now
        done.synchronize()

    def at(self, words: DoorbellWords, slot: int, field: str) -> int:
        """Device address of a word."""
        base = self._seen_at.get(words)
        if base is None:
            base = self._seen_at[words] = self._driver.device_address(words.storage.data_ptr())
        return base + words.word(slot, field) - words.storage.data_ptr()

    def load(self, source: str, *names: str) -> dict[str, int]:
        """Functions of a source of CUDA kernels, compiled for the current device."""
        major, minor = torch.cuda.get_device_capability()
        module = self._driver.load_module(compile_cubin(source, major * 10 + minor, torch.version.cuda))
        return {name: self._driver.function(module, name) for name in names}

    def launch(self, function: int, *arguments: ctypes.c_uint64 | ctypes.c_uint32) -> None:
        """One thread of a function of `load`."""
        self._driver.launch_single(function, self._stream(), arguments)

    def _wait_kernel(self, reply: int, idle: int, answered: int) -> None:
        self.launch(
            self._functions["wait_reply"],
            *(ctypes.c_uint64(reply), self._tally_at),
            *(ctypes.c_uint32(idle), ctypes.c_uint32(answered), self._limit_ns),
        )

    def _warm_up(self) -> None:
        """Run each kernel once: one that is loaded lazily, behind a wait, would deadlock."""
        scratch = torch.ones(2, dtype=torch.int32, device=self.device)
        at = [scratch.data_ptr() + 4 * i for i in range(2)]
        self._wait_kernel(at[0], 0, 1)
        one = ctypes.c_uint32(1)
        self.launch(self._functions["ring"], ctypes.c_uint64(at[0]), ctypes.c_uint64(at[1]), one, one)
        torch.cuda.synchronize()

    @staticmethod
    def _stream() -> int:
        return int(torch.cuda.current_stream().cuda_stream)


def choose_signal() -> tuple[Signal, str]:
    """What works when captured on this device, and why nothing better does: the driver's own words."""
    stream = CudaStream("stream_mem_ops")
    words = stream.words(1)
    reply = ctypes.c_uint32.from_address(words.word(0, "reply"))
    reply.value = words.layout["answered"]
    graph = torch.cuda.CUDAGraph()
    try:
        with captured(graph):
            stream.ring(words, 0)
            stream.wait(words, 0)
        graph.replay()
        torch.cuda.synchronize()
    except (NativeError, RuntimeError) as refused:
        return "spinning_kernel", str(refused)
    rung = ctypes.c_uint32.from_address(words.word(0, "request")).value == words.layout["rung"]
    if not rung or reply.value != words.layout["idle"]:
        return "spinning_kernel", "captured stream memory operations had no effect"
    return "stream_mem_ops", ""
