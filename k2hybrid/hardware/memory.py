"""What this process occupies, private memory and pages of mapped files apart, and what the machine has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from k2hybrid.hardware.sysfs import kb_field, read_text


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes in memory now; `mapped_bytes` are the page cache's: shared, and dropped when others need room."""

    private_bytes: int
    mapped_bytes: int

    @classmethod
    def now(cls, status: Path = Path("/proc/self/status")) -> MemoryUse:
        """Read `/proc/self/status`: RssAnon, and RssFile with RssShmem."""
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        anon, file, shmem = (
            int(fields.get(name, "0").split()[0]) * 1024 for name in ("RssAnon", "RssFile", "RssShmem")
        )
        return cls(anon, file + shmem)


@dataclass(frozen=True, slots=True)
class MachineMemory:
    """Bytes of RAM, and of them what programs could still have; None: not told."""

    total_bytes: int | None
    available_bytes: int | None

    @classmethod
    def now(cls, meminfo: Path = Path("/proc/meminfo")) -> MachineMemory:
        """Read `/proc/meminfo`."""
        text = read_text(meminfo)
        return cls(kb_field(text, "MemTotal"), kb_field(text, "MemAvailable"))
