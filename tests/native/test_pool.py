"""Builds and runs the C++ test of the pool: the compiler that built the extension is there."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_pool_holds(tmp_path: Path) -> None:
    program = tmp_path / "pool_test"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    sources = ["tests/native/pool_test.cpp", "csrc/cpu/pool.cpp"]
    build = [*compiler, "-std=c++20", "-O2", "-pthread", "-Icsrc", *sources, "-o", str(program)]
    subprocess.run(build, cwd=ROOT, check=True, timeout=120)
    ran = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert "all held" in ran.stdout
