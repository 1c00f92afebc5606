"""The project's own promises: pins, ranges, licence, what an installation offers."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, version
from pathlib import Path

import pytest

packaging_requirements = pytest.importorskip("packaging.requirements")

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
LOCK = dict(
    line.split("==")
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if line and not line.startswith("#")
)


def requirements() -> list[str]:
    return PROJECT["dependencies"] + [
        text
        for group in PROJECT["optional-dependencies"].values()
        for text in group
        if "k2hybrid" not in text
    ]


@pytest.mark.parametrize("text", requirements())
def test_a_requirement_is_a_range_and_the_lock_pins_a_version_inside_it(text: str) -> None:
    requirement = packaging_requirements.Requirement(text)
    assert {specifier.operator for specifier in requirement.specifier} <= {">=", "<", "!="}
    assert requirement.specifier.contains(LOCK[requirement.name])


def test_the_lock_has_exact_versions_and_nothing_of_cuda() -> None:
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in LOCK.values())
    assert LOCK["torch"] == "2.13.0"
    assert [name for name in LOCK if re.match(r"nvidia|cuda", name)] == []


def test_the_locked_triton_is_the_one_that_torch_accepts() -> None:
    named = [r for r in distribution("torch").requires or [] if r.startswith("triton")]
    if not named or version("torch").partition("+")[0] != LOCK["torch"]:
        pytest.skip(f"torch {version('torch')} is no CUDA build of the locked version")
    assert all(packaging_requirements.Requirement(r).specifier.contains(LOCK["triton"]) for r in named)


def test_the_package_imports_what_it_depends_on_and_nothing_else() -> None:
    imported = set()
    for path in (ROOT / "k2hybrid").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                imported.add(node.module.partition(".")[0])
    names = (packaging_requirements.Requirement(text).name for text in PROJECT["dependencies"])
    declared = {name.replace("-", "_") for name in names}
    assert imported - sys.stdlib_module_names - {"k2hybrid"} == declared


def test_every_folder_of_the_package_is_installed() -> None:
    """setuptools finds packages by ``__init__.py``; a folder without one would be missing in the wheel."""
    folders = {path.parent for path in (ROOT / "k2hybrid").rglob("*.py")}
    assert [folder.name for folder in folders if not (folder / "__init__.py").is_file()] == []
    assert (ROOT / "k2hybrid" / "py.typed").is_file()


def test_every_file_of_the_servers_page_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.chdir(ROOT)
    distribution = setuptools.Distribution()
    distribution.parse_config_files(["pyproject.toml"])
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    build.manifest_files = {}  # what pyproject.toml says by itself, without MANIFEST.in
    installed = {Path(path) for path in build.find_data_files("k2hybrid", "k2hybrid")}
    page = {path.relative_to(ROOT) for path in (ROOT / "k2hybrid/server/static").iterdir()}
    assert Path("k2hybrid/server/static/page.html") in page
    assert page <= installed


def test_nothing_at_build_time_but_setuptools_and_pybind11() -> None:
    names = {packaging_requirements.Requirement(text).name for text in PYPROJECT["build-system"]["requires"]}
    assert names == {"setuptools", "pybind11"}


def test_the_extension_takes_no_machine_flags() -> None:
    assert not re.search(r'"-m(arch|cpu|tune|avx|amx)', (ROOT / "setup.py").read_text())


def test_licence() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()


@pytest.mark.parametrize(
    "script", [".ci/run", "tools/bootstrap", "tools/check", "tools/test", "tools/gpu_check"]
)
def test_scripts_are_executable(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)


def run_bootstrap(project: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """tools/bootstrap in a copy of the project that has nothing else, so that it can only complain."""
    (project / "tools").mkdir(parents=True)
    for name in ("tools/bootstrap", "pyproject.toml", "requirements.lock", "setup.py"):
        (project / name).write_bytes((ROOT / name).read_bytes())
    return subprocess.run(
        ["bash", str(project / "tools" / "bootstrap")],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def interpreter(folder: Path, script: str) -> str:
    path = folder / "python3"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_bootstrap_refuses_an_old_interpreter_and_touches_nothing(tmp_path: Path) -> None:
    old = interpreter(tmp_path, '[ "$1" = -V ] && echo "Python 3.9.2"; exit 1')
    done = run_bootstrap(tmp_path / "project", PYTHON=old)
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed; found: Python 3.9.2" in done.stderr
    assert "apt install" in done.stderr
    assert not (tmp_path / "project" / ".venv").exists()


def test_bootstrap_names_missing_venv_and_headers_with_their_apt_line(tmp_path: Path) -> None:
    bare = interpreter(
        tmp_path,
        'case "$2" in *ensurepip*) exit 1 ;; *sysconfig*) echo /nowhere ;; '
        f'*) exec {sys.executable} "$@" ;; esac',
    )
    done = run_bootstrap(tmp_path / "project", PYTHON=bare)
    assert done.returncode == 1
    assert "sudo apt install python3-venv python3-dev" in done.stderr
    assert not (tmp_path / "project" / ".venv").exists()


def test_bootstrap_names_a_missing_compiler_with_its_apt_line(tmp_path: Path) -> None:
    done = run_bootstrap(tmp_path / "project", CXX="no-such-compiler")
    assert done.returncode == 1
    assert re.search(r"sudo apt install .*g\+\+", done.stderr)
    assert not (tmp_path / "project" / ".venv").exists()
