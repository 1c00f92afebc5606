"""The few CUDA driver entry points the hand-off needs, found at run time: the extension links no CUDA.

Signatures, enumerators and the layout of a batched memory operation are those of NVIDIA's ``cuda.h`` (CUDA 12
and 13). Addresses are device addresses; streams and modules are the driver's handles as integers. Layer 1.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

from k2hybrid.errors import NativeError

ATTRIBUTES = {
    "sm_major": 75,
    "sm_minor": 76,
    "multiprocessors": 16,
    "copy_engines": 40,
    "can_map_host_memory": 19,
    "unified_addressing": 41,
    "pageable_memory_access": 88,
    "concurrent_managed_access": 89,
    "can_use_host_pointer_for_registered_memory": 91,
    "can_use_stream_mem_ops_v1": 92,
    "can_flush_remote_writes": 98,
    "host_register_supported": 99,
    "pageable_access_uses_host_page_tables": 100,
    "can_use_64_bit_stream_mem_ops": 122,
    "can_use_stream_wait_value_nor": 123,
}

HOST_REGISTER_PORTABLE = 1  # CU_MEMHOSTREGISTER_PORTABLE: pinned for every context

WAIT_GEQ = 0  # CU_STREAM_WAIT_VALUE_GEQ: (int32)(*address - value) >= 0
WAIT_VALUE_32 = 1  # CU_STREAM_MEM_OP_WAIT_VALUE_32
WRITE_VALUE_32 = 2  # CU_STREAM_MEM_OP_WRITE_VALUE_32


class MemOp(ctypes.Structure):
    """``CUstreamBatchMemOpParams``: 48 bytes; a wait and a write share this layout."""

    _fields_ = (
        ("operation", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),  # the union's 32-bit member is its low half
        ("flags", ctypes.c_uint32),
        ("alias", ctypes.c_uint64),
        ("pad", ctypes.c_uint64),
    )


def write_op(address: int, value: int) -> MemOp:
    """A 32-bit write, once all that came before is visible to the whole system."""
    return MemOp(operation=WRITE_VALUE_32, address=address, value=value)


def wait_op(address: int, at_least: int) -> MemOp:
    """A wait until the 32-bit word is at least this (cyclically)."""
    return MemOp(operation=WAIT_VALUE_32, address=address, value=at_least, flags=WAIT_GEQ)


class CudaDriver:
    """``libcuda.so.1``, opened. Every failing call raises `NativeError` with the driver's own words."""

    def __init__(self, library: str = "libcuda.so.1") -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise NativeError(f"no NVIDIA driver: {error}") from error
        self._call("cuInit", ctypes.c_uint(0))

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            text, error = ctypes.c_char_p(), ctypes.c_char_p()
            self._library.cuGetErrorString(ctypes.c_int(code), ctypes.byref(text))
            self._library.cuGetErrorName(ctypes.c_int(code), ctypes.byref(error))
            words = [(found.value or b"unknown error").decode() for found in (text, error)]
            raise NativeError(f"{name} failed with {code}: {words[0]} ({words[1]})")

    # --- what the device is -----------------------------------------------------------------------

    def device_count(self) -> int:
        count = ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        return count.value

    def version(self) -> str:
        """The newest CUDA this driver speaks, as ``13.0``."""
        number = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(number))
        return f"{number.value // 1000}.{number.value % 1000 // 10}"

    def describe(self, ordinal: int = 0) -> dict[str, str | int | bool]:
        """Name, memory, bus address and link, and `ATTRIBUTES` of one device."""
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(ordinal))
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", name, ctypes.c_int(256), device)
        memory = ctypes.c_size_t()
        self._call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        bus = ctypes.create_string_buffer(32)
        self._call("cuDeviceGetPCIBusId", bus, ctypes.c_int(32), device)
        found: dict[str, str | int | bool] = {
            "name": name.value.decode(),
            "memory_bytes": memory.value,
            "cuda_of_driver": self.version(),
            "pci_address": bus.value.decode().lower(),
            **pci_link(bus.value.decode().lower()),
        }
        for key, number in ATTRIBUTES.items():
            value = ctypes.c_int()
            self._call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(number), device)
            is_flag = key not in ("sm_major", "sm_minor", "multiprocessors", "copy_engines")
            found[key] = bool(value.value) if is_flag else value.value
        return found

    # --- memory and streams -----------------------------------------------------------------------

    def primary_context(self, ordinal: int) -> int:
        """The context of a device that torch uses; it stays until the process ends."""
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(ordinal))
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        return int(context.value or 0)

    def enter(self, context: int) -> None:
        """Make it the calling thread's: what is called here works in that of the thread, and needs one."""
        self._call("cuCtxSetCurrent", ctypes.c_void_p(context))

    def device_address(self, host_address: int) -> int:
        """Where the device sees this address of pinned host memory."""
        address = ctypes.c_uint64()
        self._call(
            "cuMemHostGetDevicePointer_v2",
            ctypes.byref(address),
            ctypes.c_void_p(host_address),
            ctypes.c_uint(0),
        )
        return address.value

    def register_host(self, address: int, nbytes: int) -> None:
        """Pin ordinary host memory, so that copies from and to it need not pass through a buffer.

        No page of it may be pinned already.
        """
        self._call(
            "cuMemHostRegister_v2",
            ctypes.c_void_p(address),
            ctypes.c_size_t(nbytes),
            ctypes.c_uint(HOST_REGISTER_PORTABLE),
        )

    def unregister_host(self, address: int) -> None:
        """Undo `register_host`; no work that uses the memory may be under way."""
        self._call("cuMemHostUnregister", ctypes.c_void_p(address))

    def batch(self, stream: int, *operations: MemOp) -> None:
        """Memory operations, in order and after all before them: one node of a captured graph."""
        count = len(operations)
        array = (MemOp * count)(*operations)
        self._call(
            "cuStreamBatchMemOp_v2", ctypes.c_void_p(stream), ctypes.c_uint(count), array, ctypes.c_uint(0)
        )

    # --- kernels compiled at run time -------------------------------------------------------------

    def load_module(self, image: bytes) -> int:
        """A module of the current context from a cubin."""
        module = ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), image)
        return int(module.value or 0)

    def function(self, module: int, name: str) -> int:
        found = ctypes.c_void_p()
        self._call("cuModuleGetFunction", ctypes.byref(found), ctypes.c_void_p(module), name.encode())
        return int(found.value or 0)

    def launch_single(
        self, function: int, stream: int, arguments: Sequence[ctypes._SimpleCData[int]]
    ) -> None:
        """Launch with one thread; the driver copies the arguments before this returns."""
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(value) for value in arguments))
        one = ctypes.c_uint(1)
        self._call(
            "cuLaunchKernel",
            ctypes.c_void_p(function),
            *(one, one, one),
            *(one, one, one),
            ctypes.c_uint(0),
            ctypes.c_void_p(stream),
            pointers,
            None,
        )


def pci_link(address: str, sysfs: Path = Path("/sys/bus/pci/devices")) -> dict[str, str]:
    """Link speed and width now and at most, as the kernel reports them; empty where it does not."""
    names = ("current_link_speed", "current_link_width", "max_link_speed", "max_link_width")
    files = {name: sysfs / address / name for name in names}
    return {f"pcie_{name}": path.read_text().strip() for name, path in files.items() if path.is_file()}
