"""Imports go down only: the layers of docs/structure.md, proven from the import statements themselves.

The source is parsed, not run, so imports inside functions and under TYPE_CHECKING count like any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LAYERS = (
    ("errors", "types", "config", "native"),
    ("checkpoint", "hardware", "kernels"),
    ("experts", "cache"),
    ("model",),
    ("engine",),
    ("runtime",),
    ("agent", "server", "bench", "mini_eval", "verify", "cli"),
)
LAYER_OF = {room: layer for layer, rooms in enumerate(LAYERS) for room in rooms}
RUNTIME = LAYER_OF["runtime"]
ENTRY_POINTS = ("", "__main__", "cli")  # they dispatch to any room and nothing imports them


def room_of(module: str) -> str:
    """``k2hybrid.engine.step`` -> ``engine``; the package itself -> ``""``."""
    return [*module.split("."), ""][1]


def imported_modules(module: str, is_package: bool, source: str) -> Iterator[tuple[int, str]]:
    """``(line, module)`` for each import of our own package, relative ones resolved, ``importlib`` too."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            # `from k2hybrid import engine` names a room; deeper, the base alone decides.
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "k2hybrid" else [base]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names = [
                arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            ]
        for name in names:
            if name == "k2hybrid" or name.startswith("k2hybrid."):
                yield node.lineno, name


def forbidden(importer: str, imported: str) -> str | None:
    """Why the room ``importer`` may not import the room ``imported``, or None where it may."""
    if importer == imported or importer in ENTRY_POINTS:
        return None
    if imported in ENTRY_POINTS:
        return "entry points and the package's public names are imported by nobody inside"
    if imported == "chat":
        return None if LAYER_OF[importer] >= RUNTIME else "only runtime and what is above it may know chat"
    if importer == "chat":
        return None if LAYER_OF[imported] == 0 else "chat imports layer 0 only"
    if LAYER_OF[imported] > LAYER_OF[importer]:
        return f"layer {LAYER_OF[importer]} may not import layer {LAYER_OF[imported]}"
    if LAYER_OF[imported] == LAYER_OF[importer] > 0:
        return "rooms of one layer do not import each other"
    return None


def violations(modules: dict[str, str]) -> list[str]:
    """All broken rules in ``{module name: source}``; a package's name ends in ``.__init__``."""
    found = []
    for name, source in sorted(modules.items()):
        is_package = name.endswith(".__init__")
        module = name.removesuffix(".__init__")
        importer = room_of(module)
        if importer not in LAYER_OF and importer not in (*ENTRY_POINTS, "chat"):
            found.append(
                f"{module}: the room {importer!r} has no layer; docs/structure.md and this test must name it"
            )
            continue
        for line, imported in imported_modules(module, is_package, source):
            target = room_of(imported)
            if target == "_native":
                reason = (
                    None if module == "k2hybrid.native.extension" else "only native/extension.py imports it"
                )
            elif target in LAYER_OF or target == "chat" or target in ENTRY_POINTS:
                reason = forbidden(importer, target)
            elif importer in ENTRY_POINTS:
                reason = None
            else:
                reason = "not a module of a known layer; import it from where it is defined"
            if reason:
                found.append(f"{module}:{line}: imports {imported}: {reason}")
    return found


def package_sources() -> dict[str, str]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text()
        for path in (ROOT / "k2hybrid").rglob("*.py")
    }


def test_every_import_goes_down() -> None:
    sources = package_sources()
    assert "k2hybrid.native.extension" in sources
    assert violations(sources) == []


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        (
            "k2hybrid.checkpoint.loader",
            "from k2hybrid.experts.store import ExpertStore",
            "layer 1 may not import layer 2",
        ),
        ("k2hybrid.engine.step", "import k2hybrid.chat.stream", "only runtime"),
        ("k2hybrid.engine.step", "from k2hybrid import chat", "only runtime"),
        ("k2hybrid.engine.__init__", "from ..chat import stream", "only runtime"),
        ("k2hybrid.chat.stream", "def f():\n    from ..engine import step", "chat imports layer 0 only"),
        ("k2hybrid.cache.pages", "from k2hybrid.experts import store", "rooms of one layer"),
        ("k2hybrid.server.app", "from k2hybrid.agent.loop import run", "rooms of one layer"),
        ("k2hybrid.errors", "from .checkpoint import spec", "layer 0 may not import layer 1"),
        ("k2hybrid.experts.store", "from k2hybrid import _native", "only native/extension.py"),
        ("k2hybrid.experts.store", "from .. import _native", "only native/extension.py"),
        (
            "k2hybrid.model.mla",
            "import importlib\nimportlib.import_module('k2hybrid._native')",
            "only native/extension.py",
        ),
        ("k2hybrid.runtime.load", "from k2hybrid.server.app import app", "layer 5 may not import layer 6"),
        ("k2hybrid.model.kimi", "from k2hybrid import load", "import it from where it is defined"),
        ("k2hybrid.model.kimi", "import k2hybrid.cli", "imported by nobody"),
        ("k2hybrid.attic.old", "", "has no layer"),
    ],
)
def test_a_planted_violation_is_caught(module: str, source: str, reason: str) -> None:
    assert any(reason in violation for violation in violations({module: source})), violations(
        {module: source}
    )


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("k2hybrid.types", "from .errors import K2HybridError"),
        (
            "k2hybrid.runtime.chat",
            "from k2hybrid.chat.stream import step\nfrom k2hybrid.engine import engine",
        ),
        ("k2hybrid.native.extension", "import k2hybrid._native"),
        ("k2hybrid.cli", "from k2hybrid.server.__main__ import main\nfrom k2hybrid import __version__"),
        ("k2hybrid.model.__init__", "from .kimi import Kimi\nfrom ..experts import dispatch"),
        ("k2hybrid.chat.stream", "from ..types import Event\nimport torch"),
    ],
)
def test_allowed_imports_pass(module: str, source: str) -> None:
    assert violations({module: source}) == []
