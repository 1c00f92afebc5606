"""What doctor says of disks: kind, speed and room."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from k2hybrid.hardware.checks.disk import CHECKPOINT_BYTES, check_disk, check_free_space
from k2hybrid.hardware.disk import ReadRate
from k2hybrid.hardware.storage import Storage
from tests.unit.hardware.judging import judged, one

NVME = Storage(Path("/models"), "ext4", "/models", "nvme0n1", "nvme", 1 << 20, False, 10**12)
FAST = ReadRate(6.0, "direct", "files", 2 << 20, 16, 6 * 10**9, 1.0)


def test_disks() -> None:
    findings = check_disk(NVME, FAST)
    judged(one(findings, "disk"), "ok", "/models: ext4 on nvme0n1, NVMe, requests up to 1024 KiB")
    judged(
        one(findings, "disk speed"), "ok", "6.00 GB/s in direct reads of 2048 KiB, 16 in flight", "2 minutes"
    )
    slow = check_disk(NVME, dataclasses.replace(FAST, gb_s=0.5, source="probe"))
    judged(one(slow, "disk speed"), "warn", "20 minutes", "PCIe lanes", "a file written for this")
    cached = dataclasses.replace(FAST, gb_s=0.5, how="buffered", note="tmpfs is memory, not a disk")
    judged(one(check_disk(NVME, cached), "disk speed"), "ok", "tmpfs is memory")
    judged(
        one(check_disk(NVME, None, "Permission denied"), "disk speed"), "warn", "Permission denied", "--model"
    )
    assert [finding.topic for finding in check_disk(NVME, None)] == ["disk"]
    network = dataclasses.replace(NVME, kind="network", network=True, file_system="nfs4", device="")
    judged(check_disk(network, None)[0], "warn", "nfs4", "local NVMe")
    judged(check_disk(dataclasses.replace(NVME, kind="rotational"), None)[0], "warn", "rotating")


def test_free_space() -> None:
    assert check_free_space(NVME)[0].level == "ok"
    full = dataclasses.replace(NVME, free_bytes=CHECKPOINT_BYTES - (3 << 30))
    judged(check_free_space(full)[0], "warn", "free 3.0 GiB", "HF_HUB_CACHE")
    assert check_free_space(full, 3 << 30)[0].level == "ok"  # part of it is there already
