"""Programs from npm, each in a folder of its own outside the source tree, and a Node that is new enough."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "k2hybrid" / "clients"
NODE = "node@22"  # brings a binary
_INSTALL_S = 900


class UnavailableError(Exception):
    """A program cannot be had here; the message says why."""


def program(package: str, name: str) -> Path:
    """The program `name` of `package`, installed if it is not there yet."""
    found = _folder(package) / "node_modules" / ".bin" / name
    if not found.exists():
        _install(package)
    if not found.exists():
        raise UnavailableError(f"{package} brings no program {name}")
    return found


def _folder(package: str) -> Path:
    return CACHE / package.removeprefix("@").replace("/", "-").partition("@")[0]


def _install(package: str) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise UnavailableError("npm is missing")
    folder = _folder(package)
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        npm,
        "install",
        "--prefix",
        str(folder),
        "--no-fund",
        "--no-audit",
        "--loglevel=error",
        package,
    ]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=_INSTALL_S)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UnavailableError(f"npm cannot install {package}: {last}") from error
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"npm took more than {_INSTALL_S} s for {package}") from error
