"""Builds the extension ``k2hybrid._native`` from ``csrc/``.

It needs a C++20 compiler (g++ >= 11 or clang >= 14) and pybind11 only: no torch, no CUDA. No ``-march`` flag
either, since one binary carries every instruction set: each kernel file opens target regions of its own, and
the set is chosen at import by CPUID.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from setuptools import Extension, setup

try:
    import pybind11
    from pybind11.setup_helpers import ParallelCompile
except ImportError:
    # A machine without a network may have torch only, which carries the headers. It is found, not imported.
    torch = importlib.util.find_spec("torch")
    if torch is None or not torch.submodule_search_locations:
        raise SystemExit(
            "k2hybrid: pybind11 is needed to build the extension: pip install pybind11"
        ) from None
    PYBIND11_INCLUDE = str(Path(torch.submodule_search_locations[0]) / "include")
    ParallelCompile = None
else:
    PYBIND11_INCLUDE = pybind11.get_include()

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))


def needs_recompile(obj: str, src: str) -> bool:
    """An object is stale when its source, any header or this file is newer."""
    built = Path(obj).stat().st_mtime
    return any(Path(path).stat().st_mtime > built for path in (src, __file__, *HEADERS))


if ParallelCompile is not None:
    ParallelCompile(default=0, max=8, needs_recompile=needs_recompile).install()

setup(
    ext_modules=[
        Extension(
            "k2hybrid._native",
            SOURCES,
            include_dirs=["csrc", PYBIND11_INCLUDE],
            language="c++",
            depends=[*HEADERS, "setup.py"],
            extra_compile_args=[
                "-std=c++20",
                "-O3",
                "-g0",
                "-fvisibility=hidden",
                "-pthread",
                "-Wall",
                "-Wextra",
                # A fused multiply-add happens where a kernel asks for one and nowhere else: otherwise the
                # same sum would round differently from compiler to compiler and from tile to tile.
                "-ffp-contract=off",
            ],
            extra_link_args=["-pthread"],
        )
    ]
)
