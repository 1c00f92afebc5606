"""The doorbell of ``csrc/gpu/doorbell.h``: its memory, its CPU side, its device side recorded on a stream.

The protocol stands at the top of that header. Layer 1.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from k2hybrid import native
from k2hybrid.errors import EngineError
from k2hybrid.hardware.cuda_driver import CudaDriver, wait_op, write_op
from k2hybrid.hardware.nvrtc import compile_cubin

Signal = Literal["stream_mem_ops", "spinning_kernel"]
SIGNALS: tuple[Signal, ...] = ("stream_mem_ops", "spinning_kernel")

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

// tally: poisoned replies, waits given up
extern "C" __global__ void wait_reply(unsigned* reply, unsigned* tally, unsigned idle, unsigned answered,
                                      unsigned long long limit_ns) {
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

extern "C" __global__ void read_output(unsigned* output, unsigned* to) {
  unsigned value;
  asm volatile("ld.relaxed.sys.u32 %0, [%1];" : "=r"(value) : "l"(output) : "memory");
  *to = value;
}
"""


@dataclass(frozen=True)
class StepOutcome:
    """One finished step; ``aborted`` is empty, or one of ``asked``, ``watchdog``, ``answer threw``."""

    epoch: int
    layers: int
    answered: int
    aborted: str

    def require_answered(self) -> None:
        """Raise `EngineError` unless every slot was answered."""
        if self.aborted:
            raise EngineError(
                f"step {self.epoch} was aborted ({self.aborted}) "
                f"after {self.answered} of {self.layers} layers"
            )


class Doorbell:
    """Memory and CPU side with the echo answer (input + 1), for checks and timing.

    Args:
        slots: layers that one step may ring.
        timeout_ms: a ring unanswered for longer aborts the step.
        work_us: busy time of each answer.
        pinned: page-locked memory that a device reaches; else ordinary, for threads that play one.
    """

    def __init__(
        self, slots: int, *, timeout_ms: float = 1000.0, work_us: float = 0.0, pinned: bool = False
    ) -> None:
        self.slots = slots
        self.layout: dict[str, int] = native.doorbell_layout()
        self._storage = torch.zeros(native.doorbell_bytes(slots) + 128, dtype=torch.uint8, pin_memory=pinned)
        self.memory = self._storage.data_ptr()
        self.address = -(-self.memory // 128) * 128  # the words themselves, aligned
        self._cpu = native.EchoDoorbell(self._storage, self.address, slots, timeout_ms, work_us)
        self.publish: Callable[..., int] = self._cpu.publish
        self.abort: Callable[[], None] = self._cpu.abort
        self.reset: Callable[[], None] = self._cpu.reset
        self.stall_at: Callable[[int], None] = self._cpu.stall_at
        self.throw_at: Callable[[int], None] = self._cpu.throw_at

    def finish(self) -> StepOutcome:
        return StepOutcome(**self._cpu.finish())

    def play_device(self, layers: int, *, seed: int = 0, limit_ms: float = 5000.0) -> dict[str, int]:
        """The device's side of one step, on the calling thread."""
        played: dict[str, int] = native.play_device(self.address, layers, seed, limit_ms)
        return played

    def word(self, slot: int, field: str) -> int:
        """Host address of ``request``, ``input``, ``reply`` or ``output`` of a slot."""
        return (
            self.address + self.layout["header_bytes"] + slot * self.layout["slot_bytes"] + self.layout[field]
        )

    def release_all(self) -> None:
        """Poison every reply whatever its state: the last resort for a device that waits in vain."""
        for slot in range(self.slots):
            ctypes.c_uint32.from_address(self.word(slot, "reply")).value = self.layout["poisoned"]


class DeviceSide:
    """Records rings and waits on torch's current stream, captured or not.

    Kernels are compiled, loaded and launched once here: one loaded lazily behind a wait would deadlock.
    """

    def __init__(self, doorbell: Doorbell, signal: Signal, *, limit_ms: float = 10_000.0) -> None:
        self.doorbell = doorbell
        self.signal = signal
        self.tally = torch.zeros(
            2, dtype=torch.int32, device="cuda"
        )  # poisoned, given up (spinning kernel only)
        self.outputs = torch.zeros(doorbell.slots, dtype=torch.int32, device="cuda")
        self._limit_ns = ctypes.c_uint64(int(limit_ms * 1e6))
        self._driver = CudaDriver()
        self._base = self._driver.device_address(doorbell.memory)
        major, minor = torch.cuda.get_device_capability()
        module = self._driver.load_module(compile_cubin(KERNELS, major * 10 + minor, torch.version.cuda))
        self._functions = {
            name: self._driver.function(module, name) for name in ("ring", "wait_reply", "read_output")
        }
        self._warm_up()

    def ring(self, slot: int, value: int) -> None:
        if self.signal == "stream_mem_ops":
            self._driver.batch(
                self._stream(),
                write_op(self._word(slot, "input"), value),
                write_op(self._word(slot, "request"), self._value("rung")),
            )
        else:
            self._launch(
                "ring",
                ctypes.c_uint64(self._word(slot, "request")),
                ctypes.c_uint64(self._word(slot, "input")),
                ctypes.c_uint32(value),
                ctypes.c_uint32(self._value("rung")),
            )

    def wait(self, slot: int) -> None:
        reply = self._word(slot, "reply")
        if self.signal == "stream_mem_ops":
            self._driver.batch(
                self._stream(), wait_op(reply, self._value("answered")), write_op(reply, self._value("idle"))
            )
        else:
            self._launch(
                "wait_reply",
                ctypes.c_uint64(reply),
                ctypes.c_uint64(self.tally.data_ptr()),
                ctypes.c_uint32(self._value("idle")),
                ctypes.c_uint32(self._value("answered")),
                self._limit_ns,
            )

    def read_output(self, slot: int) -> None:
        """Copy the slot's output word into ``outputs[slot]`` on the device."""
        self._launch(
            "read_output",
            ctypes.c_uint64(self._word(slot, "output")),
            ctypes.c_uint64(self.outputs.data_ptr() + 4 * slot),
        )

    def _warm_up(self) -> None:
        scratch = torch.zeros(4, dtype=torch.int32, device="cuda")
        scratch[0] = self._value("answered")
        at = [ctypes.c_uint64(scratch.data_ptr() + 4 * i) for i in range(4)]
        idle, answered = (ctypes.c_uint32(self._value(name)) for name in ("idle", "answered"))
        tally = ctypes.c_uint64(self.tally.data_ptr())
        self._launch("wait_reply", at[0], tally, idle, answered, self._limit_ns)
        self._launch("ring", at[1], at[2], ctypes.c_uint32(1), ctypes.c_uint32(1))
        self._launch("read_output", at[2], at[3])
        torch.cuda.synchronize()

    def _launch(self, name: str, *arguments: ctypes.c_uint64 | ctypes.c_uint32) -> None:
        self._driver.launch_single(self._functions[name], self._stream(), arguments)

    def _word(self, slot: int, field: str) -> int:
        return self._base + self.doorbell.word(slot, field) - self.doorbell.memory

    def _value(self, name: str) -> int:
        return self.doorbell.layout[name]

    @staticmethod
    def _stream() -> int:
        return int(torch.cuda.current_stream().cuda_stream)
