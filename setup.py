"""Builds the extension ``k2hybrid._native`` from ``csrc/``.

It needs a C++20 compiler (g++ >= 11 or clang >= 14) and pybind11 only: no torch, no CUDA. No ``-march`` flag
either, since one binary carries every instruction set: each kernel file opens target regions of its own, and
the set is chosen at import by CPUID.
"""

from __future__ import annotations

from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))


def needs_recompile(obj: str, src: str) -> bool:
    """An object is stale when its source, any header or this file is newer."""
    built = Path(obj).stat().st_mtime
    return any(Path(path).stat().st_mtime > built for path in (src, __file__, *HEADERS))


ParallelCompile(default=0, max=8, needs_recompile=needs_recompile).install()

setup(
    ext_modules=[
        Pybind11Extension(
            "k2hybrid._native",
            SOURCES,
            include_dirs=["csrc"],
            depends=[*HEADERS, "setup.py"],
            cxx_std=20,
            extra_compile_args=[
                "-O3",
                "-g0",
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
