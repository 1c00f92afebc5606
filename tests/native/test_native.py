"""Builds and runs the C++ tests, plain and under sanitizers: whoever built the extension has a compiler."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
FLAGS = ["-std=c++20", "-Icsrc", "-ffp-contract=off", "-pthread"]

# Optimised like a release, or so that a report names lines; a fault of any kind ends the program.
MODES = {
    "plain": ["-O2"],
    "address,undefined": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
}

# SIGBUS belongs to the guard of mapped files. Checks off by default cost little here.
OPTIONS = {
    "ASAN_OPTIONS": ":".join(
        [
            "handle_sigbus=0",
            "allow_user_segv_handler=1",
            "detect_stack_use_after_return=1",
            "strict_init_order=1",
        ]
    ),
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}

# One thread runs the kernels' test, so there is no race to find; threads run kernels in the dispatcher's.
CASES = [
    (program, mode)
    for mode in MODES
    for program in ("pool", "kernels", "dispatch", "places", "fault", "handoff")
    if (program, mode) != ("kernels", "thread")
]

# What linkers and compilers say where a sanitizer's runtime is not installed or not made for the machine.
MISSING_RUNTIME = (
    "cannot find -lasan",
    "cannot find -lubsan",
    "cannot find -ltsan",
    "cannot find libasan",
    "cannot find libubsan",
    "cannot find libtsan",
    "libclang_rt.",
    "unsupported option '-fsanitize=",
    "is not supported for this target",
)

Objects = Callable[[str], list[str]]


def _compile(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMPILER, *FLAGS, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def _need(mode: str, folder: Path) -> None:
    """Skips aloud if the compiler has no runtime for the sanitizer; what else fails, fails in the build."""
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    tried = _compile(*MODES[mode], str(probe), "-o", str(folder / "probe"))
    if tried.returncode != 0 and any(said in tried.stderr for said in MISSING_RUNTIME):
        pytest.skip(
            f"{shlex.join(COMPILER)} has no runtime for -fsanitize={mode}: {tried.stderr.strip()[-200:]}"
        )


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Objects:
    """The extension's sources without its bindings, compiled once a mode and only if it is asked for."""
    sources = sorted(
        path
        for path in (ROOT / "csrc").rglob("*.cpp")
        if path.name != "bindings.cpp" and not path.name.startswith("bind_")
    )
    built: dict[str, list[str]] = {}

    def build(mode: str) -> list[str]:
        if mode not in built:
            folder = tmp_path_factory.mktemp("objects")
            _need(mode, folder)

            def one(source: Path) -> str:
                target = folder / f"{source.parent.name}_{source.stem}.o"
                done = _compile(*MODES[mode], "-c", str(source), "-o", str(target))
                assert done.returncode == 0, done.stderr
                return str(target)

            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as compilers:
                built[mode] = list(compilers.map(one, sources))
        return built[mode]

    return build


def _run(command: list[str], divisor: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **OPTIONS}
    try:
        return subprocess.run(
            [*command, str(divisor)], capture_output=True, text=True, timeout=120, env=environment
        )
    except subprocess.TimeoutExpired as late:
        told = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout
        pytest.fail(f"{Path(command[-1]).name} hangs; what it began last:\n{(told or '')[-500:]}")


@pytest.mark.parametrize(("program", "mode"), CASES)
def test_native(program: str, mode: str, objects: Objects, tmp_path: Path) -> None:
    binary = tmp_path / f"{program}_test"
    source = f"tests/native/{program}_test.cpp"
    linked = _compile("-Wall", "-Wextra", *MODES[mode], source, *objects(mode), "-o", str(binary), "-ldl")
    assert linked.returncode == 0, linked.stderr
    divisor = 1 if mode == "plain" else 4
    ran = _run([str(binary)], divisor)
    if mode == "thread" and "unexpected memory mapping" in ran.stderr:
        # Kernels that scatter maps over more bits than this runtime knows: without scattering it runs.
        setarch = shutil.which("setarch")
        if setarch is not None:
            ran = _run([setarch, os.uname().machine, "-R", str(binary)], divisor)
        if ran.returncode != 0 and (setarch is None or "all held" not in ran.stdout):
            refused = "unexpected memory mapping" in ran.stderr or "failed to set personality" in ran.stderr
            if setarch is None or refused:
                pytest.skip(
                    "the thread sanitizer does not know this kernel's layout of memory (ASLR too wide)"
                )
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-8000:]
    assert "all held" in ran.stdout
