"""GPU: driver, torch's CUDA, and the PCIe link."""

from __future__ import annotations

import re
from pathlib import Path

from k2hybrid.hardware.checks.finding import Finding
from k2hybrid.hardware.sysfs import entries, read_text, whole_number

DEVICES = "sys/bus/pci/devices"
NVIDIA = "0x10de"
_DISPLAY = ("0x0300", "0x0302")  # PCI classes: VGA, 3D controller


def nvidia_cards(root: Path) -> list[Path]:
    """PCI devices that are NVIDIA GPUs, by address."""
    devices = (root / DEVICES / name for name in entries(root / DEVICES))
    return [
        device
        for device in devices
        if read_text(device / "vendor") == NVIDIA and read_text(device / "class").startswith(_DISPLAY)
    ]


def check_driver(
    root: Path, torch_cuda: str | None, driver_cuda: str | None, problem: str = ""
) -> list[Finding]:
    """Driver and torch.

    Args:
        torch_cuda: the CUDA that torch was built with, "12.8"; None for a build without.
        driver_cuda: the newest CUDA the driver speaks; None if it does not answer.
        problem: what it said instead.
    """
    cards = nvidia_cards(root)
    module = bool(read_text(root / "proc/driver/nvidia/version"))
    if not cards and not module and driver_cuda is None:
        return [Finding("GPU", "ok", "no NVIDIA card; everything runs on the CPU")]
    if driver_cuda is None:
        if module:
            fix = "in a container: docker run --gpus all, with NVIDIA's container toolkit; else reinstall it"
        else:
            fix = "sudo apt install nvidia-driver-580-open (or the newest there is), then restart the machine"
        return [
            Finding(
                "GPU driver",
                "warn",
                f"there is a card or its module, but the driver does not answer: {problem or 'none'}",
                "everything runs on the CPU",
                fix,
            )
        ]
    if torch_cuda is None:
        major = driver_cuda.split(".")[0]
        index = "cu130" if major.isdigit() and int(major) >= 13 else "cu126"
        return [
            Finding(
                "torch",
                "warn",
                f"the driver speaks CUDA {driver_cuda}, but torch is built without CUDA",
                "the dense part stays on the CPU",
                f"pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/{index}",
            )
        ]
    ours, theirs = _version(torch_cuda), _version(driver_cuda)
    if ours is None or theirs is None or ours <= theirs:
        return [Finding("torch", "ok", f"CUDA {torch_cuda}, the driver speaks {driver_cuda}")]
    fix = f"update the driver to one that speaks CUDA {torch_cuda}, or install torch for CUDA {theirs[0]}: "
    fix += "https://pytorch.org/get-started/locally"
    if ours[0] > theirs[0]:
        return [
            Finding(
                "torch",
                "bad",
                f"torch wants CUDA {torch_cuda}, the driver speaks {driver_cuda} at most",
                "the GPU cannot be used",
                fix,
            )
        ]
    return [
        Finding(
            "torch",
            "warn",
            f"torch has CUDA {torch_cuda}, the driver speaks {driver_cuda}",
            "it runs within one major version, except kernels that the driver itself must compile",
            fix,
        )
    ]


def _version(text: str) -> tuple[int, int] | None:
    match = re.match(r"([0-9]+)\.([0-9]+)", text)
    return (int(match[1]), int(match[2])) if match else None


def check_link(root: Path) -> list[Finding]:
    """PCIe width and speed of each card against what card and slot can do."""
    findings = []
    for card in nvidia_cards(root):
        width, most_width = (_lanes(card / f"{name}_link_width") for name in ("current", "max"))
        speed, most_speed = (_gt_s(card / f"{name}_link_speed") for name in ("current", "max"))
        if not width or not most_width or not speed or not most_speed:
            findings.append(Finding("PCIe", "ok", f"{card.name}: the kernel does not tell its link"))
            continue
        slot_speed = _gt_s(card.resolve().parent / "max_link_speed")
        found = f"{card.name}: ×{width} of ×{most_width} lanes, {speed:g} of {most_speed:g} GT/s"
        why = "the prompt's layers cross this link during prefill"
        if width < most_width:
            findings.append(
                Finding(
                    "PCIe",
                    "warn",
                    found,
                    why,
                    "the slot with all lanes wired to the CPU; no riser; BIOS: no bifurcation of this slot",
                )
            )
        elif slot_speed and slot_speed < most_speed:
            findings.append(
                Finding(
                    "PCIe",
                    "warn",
                    f"{found}; its slot does {slot_speed:g} at most",
                    why,
                    "a newer slot of the CPU; BIOS: PCIe link speed of the slot on Auto or the newest "
                    "generation",
                )
            )
        elif speed < most_speed:
            check = f"nvidia-smi -i {card.name} --query-gpu=pcie.link.gen.current --format=csv -l 1"
            findings.append(
                Finding(
                    "PCIe",
                    "ok",
                    f"{found}: cards at rest lower it",
                    fix=f"if it stays so under load ({check}): BIOS, PCIe link speed on Auto",
                )
            )
        else:
            findings.append(Finding("PCIe", "ok", found))
    return findings


def _lanes(path: Path) -> int:
    return whole_number(read_text(path)) or 0


def _gt_s(path: Path) -> float:
    match = re.match(r"([0-9]+(?:\.[0-9]+)?) GT/s", read_text(path))
    return float(match[1]) if match else 0.0
