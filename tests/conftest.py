"""What all tests share: the markers ``gpu`` and ``slow``, skipped aloud elsewhere; Triton's mode."""

from __future__ import annotations

import ctypes
import functools
import os

import pytest


def driver_sees_a_device() -> bool:
    """Asked of the driver, as torch takes seconds to import."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


# Triton reads it when it is first imported, by whatever test: without a device its kernels are interpreted.
if not driver_sees_a_device():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes as well")


@functools.cache
def missing_gpu() -> str | None:
    """Why the ``gpu`` tests cannot run here, or None; torch is imported only when one was collected."""
    import torch

    if not torch.cuda.is_available():
        return f"needs a CUDA device; torch {torch.__version__} sees none (elsewhere: tools/gpu_check)"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = config.getoption("--slow")
    for item in items:
        if item.get_closest_marker("gpu") and (reason := missing_gpu()):
            item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("slow") and not slow:
            item.add_marker(pytest.mark.skip(reason="takes minutes; run it with: make test ARGS=--slow"))
