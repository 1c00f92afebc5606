"""Compiles small CUDA kernels at run time: NVRTC comes with every CUDA build of torch. Layer 1."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

from k2hybrid.errors import NativeError


def library_candidates(cuda: str | None) -> Iterator[str]:
    """What may be NVRTC, best first. ``cuda`` is torch's, as ``12.8``: majors should not mix."""
    if cuda is not None:
        yield f"libnvrtc.so.{cuda.split('.')[0]}"
    for root in [Path(entry) for entry in sys.path if entry]:
        for pattern in ("nvidia/*/lib/libnvrtc.so.*", "torch/lib/libnvrtc*.so*"):
            yield from (str(path) for path in sorted(root.glob(pattern)) if "builtins" not in path.name)
    for path in sorted(Path("/usr/local").glob("cuda*/lib64/libnvrtc.so*"), reverse=True):
        yield str(path)
    yield "libnvrtc.so"


def open_library(cuda: str | None) -> ctypes.CDLL:
    tried = []
    for name in library_candidates(cuda):
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            tried.append(f"{name}: {error}")
    raise NativeError(
        "NVRTC was not found; install a CUDA build of torch, or nvidia-cuda-nvrtc. Tried:\n  "
        + "\n  ".join(tried)
    )


def compile_cubin(source: str, sm: int, cuda: str | None) -> bytes:
    """Machine code for ``sm`` (``90`` for compute capability 9.0). Kernels are declared ``extern "C"``.

    Raises:
        NativeError: NVRTC is missing, or it rejects the source; its log is in the message.
    """
    library = open_library(cuda)

    def call(name: str, *arguments: object) -> None:
        if getattr(library, name)(*arguments) != 0:
            raise NativeError(f"{name} failed for sm_{sm}:\n{log(library, program)}")

    program = ctypes.c_void_p()
    call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"k2hybrid.cu", 0, None, None)
    options = (ctypes.c_char_p * 2)(f"--gpu-architecture=sm_{sm}".encode(), b"--std=c++17")
    call("nvrtcCompileProgram", program, 2, options)
    size = ctypes.c_size_t()
    call("nvrtcGetCUBINSize", program, ctypes.byref(size))
    image = ctypes.create_string_buffer(size.value)
    call("nvrtcGetCUBIN", program, image)
    call("nvrtcDestroyProgram", ctypes.byref(program))
    return image.raw


def log(library: ctypes.CDLL, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    if not program or library.nvrtcGetProgramLogSize(program, ctypes.byref(size)) != 0:
        return "(no log)"
    text = ctypes.create_string_buffer(max(size.value, 1))
    library.nvrtcGetProgramLog(program, text)
    return text.value.decode(errors="replace")
