"""Where a path lies: its file system, the block device under it, and what that device is."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from k2hybrid.hardware.sysfs import entries, read_int, read_text

Kind = Literal["nvme", "ssd", "rotational", "virtual", "memory", "network", "unknown"]

MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "hugetlbfs")
# Their bytes come from another machine, or, as 9p and virtiofs, from the host of a virtual one.
NETWORK_FILE_SYSTEMS = (
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "ceph", "lustre", "beegfs", "gpfs", "orangefs", "afs", "9p",
    "virtiofs", "glusterfs", "juicefs", "sshfs", "s3fs", "gcsfuse", "rclone", "ceph-fuse",
)  # fmt: skip
_VIRTUAL_VENDORS = ("QEMU", "VMware", "Msft", "VBOX", "Google", "Amazon")
_MOST_LAYERS = 8  # of device mapper and RAID below each other


@dataclass(frozen=True, slots=True)
class Storage:
    """What lies under a path.

    Attributes:
        folder: the path itself, or the nearest existing folder above it.
        file_system: "ext4", "tmpfs", …; "unknown" if the system does not tell.
        device: of the kernel, "nvme0n1"; empty if no block device is known.
        kind: "virtual" are disks of virtual machines, loops and such, of which only a measurement tells more.
        max_request_bytes: largest request that the kernel hands to the device at once; None if not told.
        free_bytes: that this user may still write there.
    """

    folder: Path
    file_system: str
    mount_point: str
    device: str
    kind: Kind
    max_request_bytes: int | None
    network: bool
    free_bytes: int


class Mount(NamedTuple):
    """A line of /proc/self/mountinfo."""

    numbers: str  # major:minor
    point: str
    file_system: str
    source: str


def storage_of(path: Path, root: Path = Path("/")) -> Storage:
    """What `path`, which need not exist yet, lies on. Reads proc/ and sys/ below `root`.

    Raises:
        OSError: the file system cannot be asked for its free space.
    """
    folder = existing_folder(path)
    mount = mount_of(folder, read_mounts(root))
    free = os.statvfs(folder)
    name = _device_name(mount, root)
    kind, device_request = _device_kind(name, root) if name else ("unknown", None)
    short = mount.file_system.removeprefix("fuse.")
    network = short in NETWORK_FILE_SYSTEMS
    if network:
        kind = "network"
    elif short in MEMORY_FILE_SYSTEMS:
        kind = "memory"
    return Storage(
        folder, mount.file_system, mount.point, name, kind, device_request, network,
        free.f_bavail * free.f_frsize,
    )  # fmt: skip


def existing_folder(path: Path) -> Path:
    """The path itself or the nearest one above it that exists, without links."""
    path = path.expanduser().absolute()
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    return path.resolve()


def read_mounts(root: Path = Path("/")) -> list[Mount]:
    """All mounts that this process sees; lines that make no sense are left out."""
    mounts = []
    for line in read_text(root / "proc/self/mountinfo").splitlines():
        before, separator, after = line.partition(" - ")
        left, right = before.split(" "), after.split(" ")
        if separator and len(left) >= 6 and len(right) >= 2:
            mounts.append(Mount(left[2], _unescaped(left[4]), right[0], _unescaped(right[1])))
    return mounts


def mount_of(path: Path, mounts: list[Mount]) -> Mount:
    """The mount that holds `path`: the longest mount point; of equal ones the last hides the others."""
    best = Mount("", "", "unknown", "")
    for mount in mounts:
        if path.is_relative_to(mount.point) and len(mount.point) >= len(best.point):
            best = mount
    return best


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _device_name(mount: Mount, root: Path) -> str:
    """The whole disk, not its partition; by its numbers, or by its source if the file system has its own."""
    candidates = [root / "sys/dev/block" / mount.numbers] if mount.numbers else []
    if mount.source.startswith("/dev/"):
        candidates.append(root / "sys/class/block" / Path(os.path.realpath(mount.source)).name)
    for candidate in candidates:
        if os.path.exists(candidate):
            device = candidate.resolve()
            return device.parent.name if os.path.exists(device / "partition") else device.name
    return ""


def _device_kind(name: str, root: Path, layers: int = _MOST_LAYERS) -> tuple[Kind, int | None]:
    folder = (root / "sys/class/block" / name).resolve()
    kilobytes = read_int(folder / "queue/max_sectors_kb")
    request = kilobytes * 1024 if kilobytes and kilobytes > 0 else None
    below = entries(folder / "slaves") if layers else []
    if below:
        kinds = {_device_kind(_whole_disk(slave, root), root, layers - 1)[0] for slave in below}
        return kinds.pop() if len(kinds) == 1 else "unknown", request
    if name.startswith("nvme"):
        return "nvme", request
    vendor = read_text(folder / "device/vendor")
    if re.match(r"(vd|xvd)[a-z]", name) or "/devices/virtual/" in f"{folder}/" or vendor in _VIRTUAL_VENDORS:
        return "virtual", request
    match read_int(folder / "queue/rotational"):
        case 0:
            return "ssd", request
        case 1:
            return "rotational", request
    return "unknown", request


def _whole_disk(name: str, root: Path) -> str:
    device = (root / "sys/class/block" / name).resolve()
    return device.parent.name if os.path.exists(device / "partition") else name
