"""The device's side of an echo doorbell: records rings and waits, keeps answers. For checks and timing.

Layer 1.
"""

from __future__ import annotations

import ctypes

import torch

from k2hybrid.hardware.doorbell import Doorbell
from k2hybrid.hardware.streams import CudaStream, Signal

READ_OUTPUT = r"""
extern "C" __global__ void read_output(unsigned* output, unsigned* to) {
  unsigned value;
  asm volatile("ld.relaxed.sys.u32 %0, [%1];" : "=r"(value) : "l"(output) : "memory");
  *to = value;
}
"""


class DeviceSide:
    """A `CudaStream` over the slots of one doorbell.

    Attributes:
        outputs: int32 [slots] on the device, filled by `read_output`.
        tally: see `CudaStream.tally`.
    """

    def __init__(self, doorbell: Doorbell, signal: Signal, *, limit_ms: float = 10_000.0) -> None:
        self.doorbell = doorbell
        self.stream = CudaStream(signal, limit_ms=limit_ms)
        self.tally = self.stream.tally
        self.outputs = torch.zeros(doorbell.slots, dtype=torch.int32, device=self.stream.device)
        self._read = self.stream.load(READ_OUTPUT, "read_output")["read_output"]
        self.read_output(0)  # loaded now: behind a wait it would deadlock
        torch.cuda.synchronize()

    def ring(self, slot: int, value: int) -> None:
        """Send `value`."""
        self.stream.ring(self.doorbell, slot, value)

    def wait(self, slot: int) -> None:
        """Wait for the reply."""
        self.stream.wait(self.doorbell, slot)

    def read_output(self, slot: int) -> None:
        """Copy the slot's output word into ``outputs[slot]`` on the device."""
        self.stream.launch(
            self._read,
            ctypes.c_uint64(self.stream.at(self.doorbell, slot, "output")),
            ctypes.c_uint64(self.outputs.data_ptr() + 4 * slot),
        )
