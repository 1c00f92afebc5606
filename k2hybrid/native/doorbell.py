"""The CPU side of `csrc/gpu/doorbell.h`, wrapped by `hardware.doorbell` and `hardware.streams`."""

from k2hybrid.native.extension import EXTENSION

EchoDoorbell = EXTENSION.EchoDoorbell
play_device = EXTENSION.play_device
ring_slot = EXTENSION.ring_slot
wait_reply = EXTENSION.wait_reply
doorbell_layout = EXTENSION.doorbell_layout
doorbell_bytes = EXTENSION.doorbell_bytes
