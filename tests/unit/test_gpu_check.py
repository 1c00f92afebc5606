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
FIND = importlib.util.find_spec


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


def pretend(gpu_check: ModuleType, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That there is a GPU, and nothing to build."""
    monkeypatch.setattr(gpu_check, "ROOT", root)
    monkeypatch.setattr(gpu_check, "why_no_gpu", lambda: None)
    monkeypatch.setattr(gpu_check, "what_is_missing", lambda: [])
    monkeypatch.setattr(gpu_check, "build_extension", lambda: None)
    monkeypatch.setattr(gpu_check, "DESCRIBE", 'print(\'{"device": {"name": "NVIDIA Test 1"}}\')')
    monkeypatch.setattr(sys, "argv", ["gpu_check"])


def test_tests_and_benches_become_rows_and_a_failure_becomes_the_exit_code(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tree(tmp_path)
    pretend(gpu_check, tmp_path, monkeypatch)
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


PARTS = [
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests" / "gpu").glob("test_*.py")),
    *sorted(path.name for path in (ROOT / "bench").glob("gpu_*.py")),
]


def lacking(monkeypatch: pytest.MonkeyPatch, gpu_check: ModuleType, *modules: str) -> None:
    monkeypatch.setattr(
        gpu_check.importlib.util, "find_spec", lambda module: None if module in modules else FIND(module)
    )


def test_only_what_all_need_must_be_there(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda module: None)
    missing = [item for item in gpu_check.what_is_missing() if "torch" not in item]
    assert missing == ["numpy: pip install numpy", "setuptools: pip install setuptools"]


def test_what_is_skipped_misses_what_it_needs(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    lacking(monkeypatch, gpu_check, *gpu_check.CHAT)
    assert {part for part in PARTS if gpu_check.why_skipped(part)} == {"tests/gpu/test_model.py"}
    assert gpu_check.why_skipped("tests/gpu/test_model.py") == (
        "needs jinja2, jsonschema-rs, llguidance, orjson, tiktoken: "
        "pip install jinja2 jsonschema-rs llguidance orjson tiktoken"
    )
    lacking(monkeypatch, gpu_check, "triton")
    left = {part for part in PARTS if not gpu_check.why_skipped(part)}
    assert left == gpu_check.NO_KERNELS <= set(PARTS)
    lacking(monkeypatch, gpu_check, "pytest")
    assert not any(gpu_check.why_skipped(part) for part in PARTS if part.startswith("gpu_"))
    assert all(gpu_check.why_skipped(part) for part in PARTS if part.startswith("tests/"))


WITHOUT = """
import importlib, importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {modules!r}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
for part in {parts!r}:
    importlib.import_module(part)
    print(part)
"""


def test_parts_that_are_not_skipped_ask_for_nothing_else(gpu_check: ModuleType) -> None:
    """Not when they are imported, at least; what else k2hybrid depends on included."""
    parts = [part for part in PARTS if part not in gpu_check.LOADS_MODELS]
    modules = {*gpu_check.CHAT, "prometheus_client", "starlette", "uvicorn", "rich", "numba", "hypothesis"}
    names = [f"bench.{p[:-3]}" if p.startswith("gpu_") else p[:-3].replace("/", ".") for p in parts]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(modules=modules, parts=names)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.split() == names, done.stderr


def test_what_is_skipped_is_named_and_never_passed(
    gpu_check: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_tree(tmp_path)
    (tmp_path / "bench" / "gpu_broken.py").unlink()
    (tmp_path / "tests" / "gpu" / "test_one.py").write_text("def test_bad(): assert 1 == 2\n")
    pretend(gpu_check, tmp_path, monkeypatch)
    monkeypatch.setattr(gpu_check, "LOADS_MODELS", {"tests/gpu/test_one.py"})
    lacking(monkeypatch, gpu_check, "tiktoken", "orjson")
    assert gpu_check.main() == 0
    (written,) = (tmp_path / "bench" / "results").glob("gpu_check-nvidia-test-1-*.json")
    result = json.loads(written.read_text())
    assert result["outcomes"] == {"tests/gpu/test_one.py": "skipped", "gpu_fine.py": "passed"}
    why = "needs orjson, tiktoken: pip install orjson tiktoken"
    assert result["rows"][0] == {"case": "tests/gpu/test_one.py", "outcome": "skipped", "message": why}
    told = capsys.readouterr().out
    assert f"tests/gpu/test_one.py is skipped: it {why}" in told
    assert "tests/gpu/test_one.py skipped, gpu_fine.py passed" in told

    lacking(monkeypatch, gpu_check, "triton")
    assert gpu_check.main() == 1  # all of it


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
