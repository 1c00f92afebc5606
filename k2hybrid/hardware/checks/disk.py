"""The disk that a checkpoint lies on, or would be downloaded to."""

from __future__ import annotations

from k2hybrid.hardware.checks.finding import Finding, gib
from k2hybrid.hardware.disk import ReadRate
from k2hybrid.hardware.storage import Storage

CHECKPOINT_BYTES = 594_205_351_936  # Kimi-K2-Thinking as published, without its weight_shape tensors
SLOW_GB_S = 1.5
_KINDS = {
    "nvme": "NVMe",
    "ssd": "SSD",
    "rotational": "rotating disk",
    "virtual": "disk of a virtual machine, or a virtual one",
    "memory": "memory",
    "network": "over the network, or from a virtual machine's host",
    "unknown": "of unknown kind",
}


def check_disk(storage: Storage, rate: ReadRate | None, problem: str = "") -> list[Finding]:
    """What the disk is, and how fast.

    Args:
        rate: what was measured; None if nothing was.
        problem: why nothing could be measured; empty if nobody tried.
    """
    device = f" on {storage.device}" if storage.device else ""
    request = storage.max_request_bytes
    requests = f", requests up to {request >> 10} KiB" if request else ""
    found = f"{storage.folder}: {storage.file_system}{device}, {_KINDS[storage.kind]}{requests}"
    findings = []
    if storage.network:
        findings.append(
            Finding(
                "disk",
                "warn",
                found,
                "every expert that is not in memory crosses the network, and a lost connection is a read "
                "error",
                "copy the checkpoint to a local NVMe drive",
            )
        )
    elif storage.kind == "rotational":
        findings.append(
            Finding(
                "disk",
                "warn",
                found,
                "it reads some 0.2 GB/s: 594 GB take most of an hour, one by one experts far longer",
                "put the checkpoint on an NVMe drive",
            )
        )
    else:
        findings.append(Finding("disk", "ok", found))
    if problem:
        findings.append(
            Finding(
                "disk speed",
                "warn",
                f"not measured: {problem}",
                "a start, and experts outside memory, wait for the disk",
                "name a folder that can be read and written: k2hybrid doctor --model PATH",
            )
        )
    elif rate is not None:
        findings.append(_check_rate(rate))
    return findings


def _check_rate(rate: ReadRate) -> Finding:
    of = "the files there" if rate.source == "files" else "a file written for this"
    found = (
        f"{rate.gb_s:.2f} GB/s in {rate.how} reads of {rate.request_bytes >> 10} KiB, {rate.depth} in "
        f"flight, of {of}; "
        f"594 GB take {CHECKPOINT_BYTES / 1e9 / rate.gb_s / 60:.0f} minutes"
    )
    if rate.note:
        found += f" ({rate.note})"
    if rate.gb_s >= SLOW_GB_S or rate.how == "buffered":
        return Finding("disk speed", "ok", found)
    return Finding(
        "disk speed",
        "warn",
        found,
        "loading waits for it, and every token for the experts that are not in memory",
        "an NVMe drive on four PCIe lanes of the CPU (not of the chipset, not in a USB case); check with: "
        "sudo nvme list, "
        "lspci -vv | grep LnkSta",
    )


def check_free_space(storage: Storage, present_bytes: int = 0) -> list[Finding]:
    """Whether the published checkpoint could be downloaded there.

    Args:
        present_bytes: of it, downloaded already.
    """
    needed = max(0, CHECKPOINT_BYTES - present_bytes)
    found = f"{gib(storage.free_bytes)} free in {storage.folder}, {gib(needed)} to download"
    if storage.free_bytes >= needed:
        return [Finding("free space", "ok", found)]
    return [
        Finding(
            "free space",
            "warn",
            found,
            "Kimi-K2-Thinking does not fit",
            f"free {gib(needed - storage.free_bytes)}, or set HF_HUB_CACHE to a folder on a larger drive",
        )
    ]
