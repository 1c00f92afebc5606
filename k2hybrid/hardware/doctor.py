"""What this machine offers, as text: `k2hybrid doctor`, and the first thing to ask for in a bug report."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

from k2hybrid.errors import NativeError
from k2hybrid.hardware.cgroup import read_limits
from k2hybrid.hardware.sysfs import chosen_word, field, kb_field, numbered, read_text, whole_number
from k2hybrid.hardware.topology import NODES

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
    cpuinfo = read_text(root / "proc/cpuinfo")
    flags = set(field(cpuinfo, "flags").split())
    cores = {
        (field(block, "physical id"), field(block, "core id"))
        for block in cpuinfo.split("\n\n")
        if field(block, "processor")
    }
    return [
        ("CPU", field(cpuinfo, "model name") or "unknown"),
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
    meminfo = read_text(root / "proc/meminfo")
    rows = []
    for name, key in (("RAM", "MemTotal"), ("RAM available", "MemAvailable"), ("swap", "SwapTotal")):
        size = kb_field(meminfo, key)
        rows.append((name, "unknown" if size is None else _gib(size)))
    limit = read_limits(root).memory_bytes
    if limit is not None:
        rows.append(("memory limit", f"{_gib(limit)} (control group)"))
    return rows


def _numa_rows(root: Path) -> list[tuple[str, str]]:
    nodes = numbered(root / NODES, "node").values()
    if not nodes:
        return [("NUMA nodes", "not told by this kernel; taken as 1")]
    rows = [("NUMA nodes", str(len(nodes)))]
    for node in nodes:
        total = kb_field(read_text(node / "meminfo"), "MemTotal")
        size = "memory unknown" if total is None else _gib(total)
        rows.append((f"  {node.name}", f"{size}, CPUs {read_text(node / 'cpulist') or 'none'}"))
    return rows


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"


def _page_sizes(root: Path) -> str:
    parts = [f"{os.sysconf('SC_PAGE_SIZE') >> 10} KiB"]
    mode = chosen_word(read_text(root / "sys/kernel/mm/transparent_hugepage/enabled"))
    parts.append(f"transparent huge pages: {mode or 'unknown'}")
    for pool in sorted((root / "sys/kernel/mm/hugepages").glob("hugepages-*kB")):
        size_kb = whole_number(pool.name.removeprefix("hugepages-").removesuffix("kB"))
        if size_kb is not None:
            parts.append(f"{size_kb >> 10} MiB: {read_text(pool / 'nr_hugepages') or 'unknown'} reserved")
    return "; ".join(parts)


def _gpu_driver(root: Path) -> str:
    version = read_text(root / "proc/driver/nvidia/version")
    if version:
        return version.splitlines()[0].removeprefix("NVRM version: ").strip()
    return "none (no NVIDIA kernel driver)"


def kernel_rows() -> list[tuple[str, str]]:
    """Which instruction set the extension picks here, or why it cannot be used."""
    try:
        from k2hybrid.native.extension import INSTRUCTION_SETS
    except NativeError as error:
        return [("kernels", f"unavailable: {error}")]
    if not INSTRUCTION_SETS:
        return [("kernels", "none for this CPU: numba runs the experts")]
    return [("kernels", f"{INSTRUCTION_SETS[0]} (this CPU offers: {', '.join(INSTRUCTION_SETS)})")]


def version_rows() -> list[tuple[str, str]]:
    """Versions of what matters."""
    rows = [
        ("k2hybrid", package_version()),
        ("Python", platform.python_version()),
        ("kernel", platform.release()),
    ]
    return rows + [(name, package_version(name)) for name in _PACKAGES]
