"""What doctor says of GPU drivers, torch's CUDA and PCIe links."""

from __future__ import annotations

from pathlib import Path

import pytest

from k2hybrid.hardware.checks.finding import Level
from k2hybrid.hardware.checks.gpu import check_driver, check_link
from tests.unit.hardware.judging import judged
from tests.unit.hardware.sysfs import put


def put_card(root: Path, link: tuple[str, str, str, str], slot: str = "32.0 GT/s PCIe") -> None:
    """A card behind a port, with the links that sysfs has."""
    place = "sys/devices/pci0000:00/0000:00:01.0"
    names = ("current_link_width", "max_link_width", "current_link_speed", "max_link_speed")
    card = {"vendor": "0x10de", "class": "0x030000", **dict(zip(names, link, strict=True))}
    put(root, {f"{place}/0000:01:00.0/{name}": f"{text}\n" for name, text in card.items()})
    put(
        root, {f"{place}/0000:01:00.1/vendor": "0x10de\n", f"{place}/0000:01:00.1/class": "0x040300\n"}
    )  # its sound
    put(root, {f"{place}/max_link_speed": f"{slot}\n", f"{place}/vendor": "0x8086\n"})
    (root / "sys/bus/pci/devices").mkdir(parents=True, exist_ok=True)
    for name in ("0000:01:00.0", "0000:01:00.1"):
        (root / f"sys/bus/pci/devices/{name}").symlink_to(root / place / name)


@pytest.mark.parametrize(
    ("link", "slot", "level", "words"),
    [
        (
            ("16", "16", "32.0 GT/s PCIe", "32.0 GT/s PCIe"),
            "32.0 GT/s PCIe",
            "ok",
            ("×16 of ×16", "32 of 32"),
        ),
        (
            ("8", "16", "32.0 GT/s PCIe", "32.0 GT/s PCIe"),
            "32.0 GT/s PCIe",
            "warn",
            ("×8 of ×16", "bifurcation"),
        ),
        (("16", "16", "16.0 GT/s PCIe", "32.0 GT/s PCIe"), "16.0 GT/s PCIe", "warn", ("16 at most",)),
        (("16", "16", "2.5 GT/s PCIe", "32.0 GT/s PCIe"), "32.0 GT/s PCIe", "ok", ("at rest", "nvidia-smi")),
        (("0", "255", "Unknown", "Unknown"), "Unknown", "ok", ("does not tell",)),
    ],
)
def test_links(
    tmp_path: Path, link: tuple[str, str, str, str], slot: str, level: Level, words: tuple[str, ...]
) -> None:
    put_card(tmp_path, link, slot)
    (found,) = check_link(tmp_path)
    judged(found, level, "0000:01:00.0", *words)


def test_drivers(tmp_path: Path) -> None:
    judged(check_driver(tmp_path, None, None)[0], "ok", "no NVIDIA card")
    put_card(tmp_path, ("16", "16", "32.0 GT/s PCIe", "32.0 GT/s PCIe"))
    judged(check_driver(tmp_path, None, None, "no libcuda.so.1")[0], "warn", "no libcuda.so.1", "apt install")
    put(tmp_path, {"proc/driver/nvidia/version": "NVRM version: x\n"})
    judged(check_driver(tmp_path, "12.8", None)[0], "warn", "--gpus all")
    judged(check_driver(tmp_path, None, "13.0")[0], "warn", "built without CUDA", "whl/cu130")
    judged(check_driver(tmp_path, None, "12.8")[0], "warn", "whl/cu126")
    assert check_driver(tmp_path, "12.8", "12.8")[0].level == "ok"
    assert check_driver(tmp_path, "12.6", "13.0")[0].level == "ok"
    judged(check_driver(tmp_path, "12.10", "12.8")[0], "warn", "12.10")  # ten is more than eight
    judged(check_driver(tmp_path, "13.0", "12.9")[0], "bad", "13.0", "12.9", "update the driver")
