"""What the kernels' compiler says of every tile and card: compiled here without a device, run only on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = {80: 166_912, 86: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
# Bytes of a thread in memory for want of registers: 90's tile of 64 heads takes 128 of them for its output.
# Prefill's attention on 80 reads 9 of them in a loop of 144 products of the tensor core.
STACK = {("attend bf16", 90): 128, ("attend fp8", 90): 640, ("flash", 80): 128}


def test_every_kernel_fits_the_cards_of_four_generations(tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels_device.compile"],
        env={**kept, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert {row["capability"] for row in rows} == set(SHARED)
    for row in rows:
        assert row["shared"] <= SHARED[row["capability"]], row
        assert row["stack"] <= STACK.get((row["kernel"], row["capability"]), 0), row


@pytest.mark.parametrize("module", ["k2hybrid", "k2hybrid.kernels.mla", "k2hybrid.runtime", "k2hybrid.cli"])
def test_importing_the_package_imports_no_triton(module: str) -> None:
    code = f"import sys, {module}; raise SystemExit('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("prelude", "message"),
    [
        ("importlib.util.find_spec = lambda name: None", "pip install triton"),
        ("os.environ.pop('TRITON_INTERPRET')", "TRITON_INTERPRET=1"),
    ],
)
def test_an_error_says_what_to_do(prelude: str, message: str) -> None:
    code = (
        f"import importlib.util, os; {prelude}\n"
        "from bench.device_cases import latent_case\n"
        "latent_case('bf16', [5], heads=4, latent=32, rope=16, pages=1).run()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "KernelError" in done.stderr
    assert message in done.stderr
