"""Mounts and block devices from made-up trees, and of this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from k2hybrid.hardware.storage import mount_of, read_mounts, storage_of
from tests.unit.hardware.sysfs import put

DEVICES = "sys/devices/pci0000:00"


def block(
    root: Path, name: str, numbers: str, place: str, *, rotational: str = "0", partition: str = ""
) -> None:
    """A disk, or a partition of it, with the links that sysfs has."""
    disk = f"{place}/{partition or name}"
    put(root, {f"{disk}/queue/rotational": f"{rotational}\n", f"{disk}/queue/max_sectors_kb": "1280\n"})
    if partition:
        put(root, {f"{disk}/{name}/partition": "1\n"})
    for link, target in ((f"sys/dev/block/{numbers}", name), (f"sys/class/block/{name}", name)):
        (root / link).parent.mkdir(parents=True, exist_ok=True)
        (root / link).symlink_to(root / disk / (target if partition else ""))
    if partition and not (root / f"sys/class/block/{partition}").exists():
        (root / f"sys/class/block/{partition}").symlink_to(root / disk)


def mounts(root: Path, *lines: tuple[str, str, str, str]) -> None:
    text = "".join(f"{at} 1 {numbers} / {point} rw,relatime shared:1 - {kind} {source} rw\n"
                   for at, (numbers, point, kind, source) in enumerate(lines))  # fmt: skip
    put(root, {"proc/self/mountinfo": text})


@pytest.mark.parametrize(
    ("name", "place", "rotational", "vendor", "kind"),
    [
        ("nvme0n1", f"{DEVICES}/nvme/nvme0", "0", "", "nvme"),
        ("nvme1n1", "sys/devices/virtual/nvme-subsystem/nvme-subsys1", "0", "", "nvme"),
        ("sda", f"{DEVICES}/ata1/host0", "0", "ATA", "ssd"),
        ("sdb", f"{DEVICES}/ata2/host1", "1", "ATA", "rotational"),
        ("sdc", f"{DEVICES}/ata3/host2", "1", "QEMU", "virtual"),
        ("vda", f"{DEVICES}/virtio1/block", "1", "", "virtual"),
        ("xvdf", f"{DEVICES}/xen", "0", "", "virtual"),
        ("loop3", "sys/devices/virtual/block", "0", "", "virtual"),
        ("sdd", f"{DEVICES}/ata4/host3", "?", "ATA", "unknown"),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_kinds_of_devices(
    tmp_path: Path, name: str, place: str, rotational: str, vendor: str, kind: str, whole: bool
) -> None:
    if whole:
        block(tmp_path, name, "8:1", place, rotational=rotational)
    else:
        block(tmp_path, f"{name}p1", "8:1", place, rotational=rotational, partition=name)
    put(tmp_path, {f"{place}/{name}/device/vendor": f"{vendor}  \n"})
    mounts(tmp_path, ("8:1", "/", "ext4", "/dev/root"))
    found = storage_of(tmp_path, tmp_path)
    assert (found.device, found.kind, found.file_system) == (name, kind, "ext4")
    assert found.max_request_bytes == 1280 * 1024
    assert not found.network
    free = os.statvfs(tmp_path)
    assert 0 < found.free_bytes <= free.f_blocks * free.f_frsize


@pytest.mark.parametrize(("second", "kind"), [("nvme1n1", "nvme"), ("sda", "unknown")])
def test_raid_and_device_mapper_are_what_lies_below(tmp_path: Path, second: str, kind: str) -> None:
    block(tmp_path, "nvme0n1p2", "259:2", DEVICES, partition="nvme0n1")
    block(tmp_path, second, "259:3", DEVICES)
    for name, numbers, below in (("md0", "9:0", ("nvme0n1p2", second)), ("dm-0", "253:0", ("md0",))):
        block(tmp_path, name, numbers, "sys/devices/virtual/block")
        for slave in below:
            put(tmp_path, {f"sys/devices/virtual/block/{name}/slaves/{slave}/x": ""})
    mounts(tmp_path, ("253:0", "/", "xfs", "/dev/mapper/vg-root"))
    found = storage_of(tmp_path, tmp_path)
    assert (found.device, found.kind) == ("dm-0", kind)


def test_devices_that_hold_each_other_end(tmp_path: Path) -> None:
    for name, other in (("dm-0", "dm-1"), ("dm-1", "dm-0")):
        block(tmp_path, name, f"253:{name[-1]}", "sys/devices/virtual/block")
        put(tmp_path, {f"sys/devices/virtual/block/{name}/slaves/{other}/x": ""})
    mounts(tmp_path, ("253:0", "/", "xfs", "/dev/dm-0"))
    assert storage_of(tmp_path, tmp_path).device == "dm-0"


def test_a_file_system_with_numbers_of_its_own_is_found_by_its_source(tmp_path: Path) -> None:
    block(tmp_path, "nvme0n1p9", "259:9", DEVICES, partition="nvme0n1")
    mounts(tmp_path, ("0:31", "/", "btrfs", "/dev/nvme0n1p9"))
    assert storage_of(tmp_path, tmp_path).kind == "nvme"


@pytest.mark.parametrize(
    ("file_system", "kind", "network"),
    [
        ("nfs4", "network", True),
        ("fuse.sshfs", "network", True),
        ("9p", "network", True),
        ("tmpfs", "memory", False),
        ("overlay", "unknown", False),
        ("fuse.mergerfs", "unknown", False),
    ],
)
def test_file_systems_without_a_device(tmp_path: Path, file_system: str, kind: str, network: bool) -> None:
    mounts(tmp_path, ("0:50", "/", file_system, "server:/export"))
    found = storage_of(tmp_path / "not/there/yet", tmp_path)
    assert (found.folder, found.kind, found.network) == (tmp_path.resolve(), kind, network)
    assert (found.device, found.max_request_bytes) == ("", None)


def test_the_nearest_mount_counts_and_the_last_hides_others(tmp_path: Path) -> None:
    mounts(
        tmp_path,
        ("1:1", "/", "ext4", "a"),
        ("1:2", "/data", "xfs", "b"),
        ("1:3", "/data", "nfs", "c"),
        ("1:4", "/database", "zfs", "d"),
        ("1:5", "/my\\040files", "btrfs", "e\\134f"),
    )
    table = read_mounts(tmp_path)
    found = [
        mount_of(Path(path), table).numbers
        for path in ("/data/x", "/datab", "/database/x", "/my files/x", "/my")
    ]
    assert found == ["1:3", "1:1", "1:4", "1:5", "1:1"]
    assert table[-1].source == "e\\f"


@pytest.mark.parametrize("text", ["", "\n\n", "1 2 3", "a - b", " - ", "1 1 8:1 / / rw - ext4", "\xff" * 100])
def test_garbled_mounts(tmp_path: Path, text: str) -> None:
    put(tmp_path, {"proc/self/mountinfo": text})
    found = storage_of(tmp_path, tmp_path)
    assert (found.file_system, found.device, found.kind) == ("unknown", "", "unknown")


def test_this_machine(tmp_path: Path) -> None:
    """The device under a path has the numbers that `stat` tells, where its file system has no own ones."""
    found = storage_of(tmp_path)
    assert os.path.ismount(found.mount_point)
    major = os.major(os.stat(tmp_path).st_dev)
    if major:
        numbers = f"{major}:{os.minor(os.stat(tmp_path).st_dev)}"
        device = Path(f"/sys/dev/block/{numbers}").resolve()
        assert found.device in (device.name, device.parent.name)


def test_a_folder_that_may_not_be_entered_counts_as_the_one_above(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    (closed / "inside").mkdir()
    was = os.geteuid()
    closed.chmod(0)
    try:
        if was == 0:
            os.seteuid(65534)  # root enters every folder
        found = storage_of(closed / "inside")
        assert closed.resolve().is_relative_to(found.folder)
        assert found.folder != closed.resolve() / "inside"
    finally:
        os.seteuid(was)
        closed.chmod(0o700)
