"""tools/gpu_check without a GPU: it says so; and its own bookkeeping, with the device left out."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "gpu_check"


@pytest.fixture
def gpu_check() -> ModuleType:
    loader = SourceFileLoader("gpu_check", str(SCRIPT))
    spec = importlib.util.spec_from_loader("gpu_check", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_so_and_succeeds(gpu_check: ModuleType) -> None:
    if gpu_check.why_no_gpu() is None:
        pytest.skip("there is a GPU here: tools/gpu_check itself is the test")
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "nothing to check here" in done.stdout


def test_a_part_that_hangs_is_ended(gpu_check: ModuleType) -> None:
    command = [sys.executable, "-c", "import time; print('started', flush=True); time.sleep(600)"]
    assert gpu_check.run_part(command, 3.0) == ("timed out", "started\n")


def test_a_part_that_fails_shows_its_last_lines(gpu_check: ModuleType) -> None:
    assert gpu_check.run_part([sys.executable, "-c", "print('why'); exit(3)"], 60.0) == ("failed", "why\n")


def fake_tree(root: Path) -> None:
    (root / "bench").mkdir()
    (root / "bench" / "gpu_fine.py").write_text(
        "import json, sys\njson.dump({'rows': [{'case': 'fine', 'us': 1.5}]}, open(sys.argv[2], 'w'))\n"
    )
    (root / "bench" / "gpu_broken.py").write_text("raise SystemExit('no such kernel')\n")
    (root / "tests" / "gpu").mkdir(parents=True)
    (root / "tests" / "gpu" / "test_one.py").write_text(
        "import pytest\npytestmark = pytest.mark.gpu\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\n"
    )
    (root / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")


def test_tests_and_benches_become_rows_and_a_failure_becomes_the_exit_code(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tree(tmp_path)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "why_no_gpu", lambda: None)
    monkeypatch.setattr(gpu_check, "what_is_missing", lambda: [])
    monkeypatch.setattr(gpu_check, "build_extension", lambda: None)
    monkeypatch.setattr(gpu_check, "DESCRIBE", 'print(\'{"device": {"name": "NVIDIA Test 1"}}\')')
    monkeypatch.setattr(sys, "argv", ["gpu_check"])

    assert gpu_check.main() == 1
    (written,) = (tmp_path / "bench" / "results").glob("gpu_check-nvidia-test-1-*.json")
    result = json.loads(written.read_text())
    assert result["conditions"]["device"]["name"] == "NVIDIA Test 1"
    assert result["outcomes"] == {"tests/gpu": "failed", "gpu_broken.py": "failed", "gpu_fine.py": "passed"}
    rows = {row["case"]: row for row in result["rows"]}
    assert rows["test test_good"]["outcome"] == "passed"
    assert rows["test test_bad"]["outcome"] == "failure"
    assert "no such kernel" in rows["gpu_broken.py"]["message"]
    assert rows["fine"]["us"] == 1.5


def test_what_is_missing_is_named_before_anything_runs(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "why_no_gpu", lambda: None)
    monkeypatch.setattr(gpu_check, "what_is_missing", lambda: ["pytest: pip install pytest"])
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    assert gpu_check.main() == 1
    assert "pip install pytest" in capsys.readouterr().out


def test_triton_and_what_loads_a_model_are_asked_for(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda module: None)
    missing = "\n".join(gpu_check.what_is_missing())
    for package in ("triton", "pytest", "jsonschema-rs", "llguidance", "numpy"):
        assert f"pip install {package}" in missing


def test_every_part_has_time_left_though_all_before_it_hang(gpu_check: ModuleType) -> None:
    parts = ["tests/gpu", *sorted(path.name for path in (ROOT / "bench").glob("gpu_*.py"))]
    assert {"gpu_decode.py", "gpu_memory.py", "gpu_prefill.py", "gpu_mla.py"} <= set(parts)
    assert gpu_check.WEIGHTS.keys() <= set(parts)
    left, limits = 500.0, {}
    for number, part in enumerate(parts):
        limits[part] = gpu_check.share(part, parts[number + 1 :], left)
        left -= limits[part]
    assert left == pytest.approx(0.0)
    assert min(limits.values()) >= 20
    assert limits["tests/gpu"] >= 180
    assert limits["gpu_prefill.py"] >= 45
    # What nobody used is for those that follow.
    assert gpu_check.share("gpu_prefill.py", ["gpu_spill.py"], 300.0) == pytest.approx(200.0)
