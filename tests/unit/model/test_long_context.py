"""Scratch memory of attention stays bounded, whatever the context: at Kimi-K2's true sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from k2hybrid.model.mla import attention_sizes
from tests.unit.model.long_context import kimi_k2

ROOT = Path(__file__).resolve().parents[3]
LIMIT_BYTES = 512 << 20


def test_the_threshold_of_kimi_k2() -> None:
    assert attention_sizes(kimi_k2()).absorbed_below == pytest.approx(170.67, abs=0.01)


@pytest.mark.parametrize(
    ("context", "count", "absorbed", "rows"),
    [
        (64 << 10, 512, False, ["bf16"]),
        (64 << 10, 512, False, ["bf16", "fused"]),
        (16 << 10, 170, True, ["bf16"]),
        (16 << 10, 170, True, ["fp8"]),
    ],
    ids=["expanded", "fused", "absorbed", "absorbed fp8"],
)
def test_scratch_of_a_long_context_stays_below_512_mb(
    context: int, count: int, absorbed: bool, rows: list[str]
) -> None:
    """Each with the most new tokens of its form, over many blocks; the prefill chunk at 64k tokens."""
    command = [sys.executable, "-m", "tests.unit.model.long_context", str(context), str(count), *rows]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["finite"]
    assert report["absorbed"] is absorbed
    assert report["setup_bytes"] < 64 << 20  # else the peak could be hidden behind the preparation's
    assert 16 << 20 < report["scratch_bytes"] < LIMIT_BYTES
