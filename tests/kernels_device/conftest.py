"""The device kernels in Triton's interpreter, on tensors of the CPU; tests/gpu runs them compiled."""

from __future__ import annotations

import importlib

import pytest


@pytest.fixture(autouse=True)
def _interpreted() -> None:
    triton = pytest.importorskip("triton", reason="device kernels need Triton: pip install triton")
    if not importlib.import_module("triton").knobs.runtime.interpret:
        pytest.skip(f"there is a device: Triton {triton.__version__} compiles, and tests/gpu has these cases")
