"""What this machine offers, as text: `k2hybrid doctor`, and the first thing to ask for in a bug report."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path

from k2hybrid.errors import NativeError

# Instruction sets that some kernel, present or planned, is written for; /proc/cpuinfo's spelling.
_WANTED_FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
)
_PACKAGES = ("torch", "numpy", "tiktoken", "jinja2", "starlette", "uvicorn", "orjson")


def package_version(name: str = "k2hybrid") -> str:
    """The installed version of a package; "not installed" also for a bare source tree."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def report(root: Path = Path("/")) -> list[tuple[str, str]]:
    """(name, value) rows. Reads /proc and /sys below `root`; what a machine does not tell is said so."""
    return [*machine_rows(root), *kernel_rows(), *version_rows()]


def machine_rows(root: Path = Path("/")) -> list[tuple[str, str]]:
    """CPU, cores, memory, NUMA nodes, page sizes and GPU driver."""
    cpuinfo = _read(root / "proc/cpuinfo")
    flags = set(_field(cpuinfo, "flags").split())
    cores = {
        (_field(block, "physical id"), _field(block, "core id"))
        for block in cpuinfo.split("\n\n")
        if _field(block, "processor")
    }
    return [
        ("CPU", _field(cpuinfo, "model name") or "unknown"),
        (
            "instruction sets",
            " ".join(flag for flag in _WANTED_FLAGS if flag in flags) or "none that matters here",
        ),
        (
            "cores",
            f"{len(cores) or 'unknown'} physical; {len(os.sched_getaffinity(0))} threads usable here",
        ),
        *_memory_rows(root),
        *_numa_rows(root),
        ("page sizes", _page_sizes(root)),
        ("GPU driver", _gpu_driver(root)),
    ]


def _memory_rows(root: Path) -> list[tuple[str, str]]:
    meminfo = _read(root / "proc/meminfo")
    rows = []
    for name, key in (("RAM", "MemTotal"), ("RAM available", "MemAvailable"), ("swap", "SwapTotal")):
        match = re.search(rf"^{key}:\s+(\d+) kB", meminfo, re.MULTILINE)
        rows.append((name, f"{int(match[1]) / (1 << 20):.1f} GiB" if match else "unknown"))
    limit = _read(root / "sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        rows.append(("memory limit", f"{int(limit) / (1 << 30):.1f} GiB (control group)"))
    return rows


def _numa_rows(root: Path) -> list[tuple[str, str]]:
    nodes = sorted((root / "sys/devices/system/node").glob("node[0-9]*"), key=lambda node: int(node.name[4:]))
    if not nodes:
        return [("NUMA nodes", "not told by this kernel; taken as 1")]
    rows = [("NUMA nodes", str(len(nodes)))]
    for node in nodes:
        match = re.search(r"MemTotal:\s+(\d+) kB", _read(node / "meminfo"))
        size = f"{int(match[1]) / (1 << 20):.1f} GiB" if match else "memory unknown"
        rows.append((f"  {node.name}", f"{size}, CPUs {_read(node / 'cpulist').strip() or 'none'}"))
    return rows


def _page_sizes(root: Path) -> str:
    parts = [f"{os.sysconf('SC_PAGE_SIZE') >> 10} KiB"]
    mode = re.search(r"\[(\w+)\]", _read(root / "sys/kernel/mm/transparent_hugepage/enabled"))
    parts.append(f"transparent huge pages: {mode[1] if mode else 'unknown'}")
    for pool in sorted((root / "sys/kernel/mm/hugepages").glob("hugepages-*kB")):
        size_kb = int(pool.name[len("hugepages-") : -2])
        count = _read(pool / "nr_hugepages").strip() or "unknown"
        parts.append(f"{size_kb >> 10} MiB: {count} reserved")
    return "; ".join(parts)


def _gpu_driver(root: Path) -> str:
    version = _read(root / "proc/driver/nvidia/version")
    if version:
        return version.splitlines()[0].removeprefix("NVRM version: ").strip()
    return "none (no NVIDIA kernel driver)"


def kernel_rows() -> list[tuple[str, str]]:
    """Which instruction set the extension picks here, or why it cannot be used."""
    try:
        from k2hybrid.native import INSTRUCTION_SETS
    except NativeError as error:
        return [("kernels", f"unavailable: {error}")]
    return [("kernels", f"{INSTRUCTION_SETS[0]} (this CPU offers: {', '.join(INSTRUCTION_SETS)})")]


def version_rows() -> list[tuple[str, str]]:
    """Versions of what matters."""
    rows = [
        ("k2hybrid", package_version()),
        ("Python", platform.python_version()),
        ("kernel", platform.release()),
    ]
    return rows + [(name, package_version(name)) for name in _PACKAGES]


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""  # the callers say "unknown"


def _field(text: str, key: str) -> str:
    match = re.search(rf"^{re.escape(key)}[ \t]*:[ \t]*(.*)$", text, re.MULTILINE)
    return match[1].strip() if match else ""
