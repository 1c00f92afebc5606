"""The machine that `k2hybrid plan` plans for: this one, measured, or what a file and options say instead."""

from __future__ import annotations

import dataclasses
import json
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2hybrid.checkpoint.spec import ModelSpec
from k2hybrid.errors import ConfigError, NativeError
from k2hybrid.experts.plan import GIB, SYSTEM_BYTES, MachineSpec
from k2hybrid.experts.prediction import Rates

# (option, key in a file, what it says); all numbers.
NUMBERS: tuple[tuple[str, str, str], ...] = (
    ("--ram", "ram_gib", "GiB of RAM in all"),
    ("--nodes", "nodes", "NUMA nodes, with equal shares of it"),
    ("--ram-gb-s", "ram_gb_s", "10⁹ bytes a second that all cores together read from RAM"),
    ("--channels", "channels", "memory channels in all, if its speed is not known"),
    ("--mts", "mts", "their transfers, in 10⁶ a second, such as 4800"),
    ("--cores", "cores", "cores, taken as equal to this machine's"),
    ("--nvme-gb-s", "nvme_gb_s", "10⁹ bytes a second of direct reads from the disk"),
    ("--vram", "vram_gib", "GiB of a GPU's memory"),
    ("--gpu-gb-s", "gpu_gb_s", "10⁹ bytes a second that the GPU reads from it"),
    ("--gpu-tflops", "gpu_tflops", "10¹² operations a second of its bf16 matrix products"),
    ("--pcie-gb-s", "pcie_gb_s", "10⁹ bytes a second between RAM and GPU"),
)
CHANNEL_BYTES = 8
# Of what channels promise: refreshes and turns of the bus cost some. An assumption, and printed as one.
CHANNEL_SHARE = 0.8
DISK_SECONDS = 3.0  # a shared disk changes its pace within a second
_WHOLE = ("nodes", "channels", "cores")
_LIMIT = 1e9
_WIDTHS = (
    *(f.name for f in dataclasses.fields(ModelSpec) if f.name.endswith(("_size", "_rank", "_dim"))),
    "num_heads",
    "num_experts",
    "num_shared_experts",
    "top_k",
)


@dataclass(frozen=True, slots=True)
class Description:
    """A machine, the rates of the kernels, and how they are known, a line each."""

    machine: MachineSpec
    rates: Rates
    notes: tuple[str, ...]

    def noting(self, note: str) -> Description:
        """The same, with a line more."""
        return dataclasses.replace(self, notes=(*self.notes, note))


def read_description(path: Path) -> dict[str, Any]:
    """The keys of `NUMBERS`, and "rates", from a JSON or TOML file, or from what `plan --json` wrote.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        text = path.read_text("utf-8")
        found = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read the machine {path}: {error.strerror}") from None
    except ValueError as error:  # of either format, and of UTF-8
        raise ConfigError(f"the machine {path} is neither JSON nor TOML: {error}") from None
    if isinstance(found, dict) and isinstance(found.get("machine"), dict):
        found = found["machine"]
    if not isinstance(found, dict):
        raise ConfigError(f"the machine {path} must be an object of names and numbers")
    known = [key for _, key, _ in NUMBERS]
    unknown = sorted(set(found) - {*known, "rates"})
    if unknown:
        raise ConfigError(f"the machine {path} has unknown {', '.join(unknown)}; known: {', '.join(known)}")
    return found


def describe(spec: ModelSpec, said: Mapping[str, Any]) -> Description:
    """This machine, but for what is `said` of it.

    Args:
        said: keys of `NUMBERS`, and "rates" that were measured before. A disk of which nothing is said stays
            unknown, see `with_disk`.

    Raises:
        ConfigError: a number makes no sense, or contradicts another one.
    """
    numbers = {key: _number(key, said[key]) for _, key, _ in NUMBERS if said.get(key) is not None}
    if ("channels" in numbers) != ("mts" in numbers):
        raise ConfigError("channels and their transfers (--channels, --mts) are given together")
    if "channels" in numbers and "ram_gb_s" in numbers:
        raise ConfigError("give the speed of RAM (--ram-gb-s) or its channels, not both")
    notes = []
    if said.get("rates") is not None:
        rates = _rates(said["rates"], spec)
        notes.append("kernels: as the file says")
    else:
        rates = _measured(spec)
        notes.append(f"kernels: measured here, {rates.cores} threads, RAM {rates.ram_gb_s:.1f} GB/s")
    ram_gb_s, cores = numbers.get("ram_gb_s", rates.ram_gb_s), int(numbers.get("cores", rates.cores))
    if "channels" in numbers:
        promised = numbers["channels"] * numbers["mts"] * CHANNEL_BYTES / 1e3
        ram_gb_s = CHANNEL_SHARE * promised
        notes.append(f"RAM: the channels promise {promised:.1f} GB/s; {CHANNEL_SHARE:.0%} of that is assumed")
    if (ram_gb_s, cores) != (rates.ram_gb_s, rates.cores):
        notes.append("another machine: reads keep their share of its RAM's speed, its cores equal these")
    if said.get("rates") is None and "vram_gib" not in numbers:
        card, note = _card_here()
        numbers = card | numbers
        notes += [note] if note else []
    machine = MachineSpec(
        node_memory=_node_memory(numbers),
        cores=cores,
        ram_gb_s=ram_gb_s,
        disk_gb_s=numbers.get("nvme_gb_s"),
        vram_bytes=int(numbers.get("vram_gib", 0) * GIB),
        gpu_gb_s=numbers.get("gpu_gb_s"),
        pcie_gb_s=numbers.get("pcie_gb_s"),
        gpu_tflops=numbers.get("gpu_tflops"),
    )
    if len(machine.node_memory) > 1:
        notes.append("several nodes: reads at the sum of their speeds, as if all were local")
    return Description(machine, rates, tuple(notes))


def with_disk(described: Description, spec: ModelSpec, where: Path) -> Description:
    """The same with a disk measured, if nothing was said of it.

    Args:
        where: folder with shards, which are read, or another, where a file is written for it and removed.
    """
    machine = described.machine
    if machine.disk_gb_s is not None:
        return described
    from k2hybrid.hardware.disk import BLOCK, direct_read_gb_s

    # What fills a slot is mostly nibbles of one matrix, a node's rows of it.
    nibbles = spec.hidden_size * spec.moe_intermediate_size // 2 // len(machine.node_memory)
    try:
        rate = direct_read_gb_s(where, -(-nibbles // BLOCK) * BLOCK, seconds=DISK_SECONDS)
    except OSError as error:
        note = f"disk: not measured ({error.strerror}); give --nvme-gb-s"
    else:
        machine = dataclasses.replace(machine, disk_gb_s=rate.gb_s)
        note = f"disk: {rate.gb_s:.2f} GB/s of {rate.how} reads at {where}"
        note += f" ({rate.note})" if rate.note else ""
    return dataclasses.replace(described, machine=machine, notes=(*described.notes, note))


def as_said(machine: MachineSpec, rates: Rates, spec: ModelSpec) -> dict[str, Any]:
    """What `read_description` takes, of a machine as it is."""
    said = {
        "ram_gib": (machine.memory + SYSTEM_BYTES) / GIB,
        "nodes": len(machine.node_memory),
        "ram_gb_s": machine.ram_gb_s,
        "cores": machine.cores,
        "nvme_gb_s": machine.disk_gb_s,
        "vram_gib": machine.vram_bytes / GIB or None,
        "gpu_gb_s": machine.gpu_gb_s,
        "pcie_gb_s": machine.pcie_gb_s,
        "gpu_tflops": machine.gpu_tflops,
    }
    widths = {name: getattr(spec, name) for name in _WIDTHS}
    return {
        **{key: value for key, value in said.items() if value is not None},
        "rates": {**dataclasses.asdict(rates), "widths": widths},
    }


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LIMIT:
        raise ConfigError(f"{key} must be a number above 0, not {value!r}")
    if key in _WHOLE and value != int(value):
        raise ConfigError(f"{key} must be a whole number, not {value!r}")
    return float(value)


def _rates(said: Any, spec: ModelSpec) -> Rates:
    names = [field.name for field in dataclasses.fields(Rates)]
    if not isinstance(said, dict) or set(said) != {*names, "widths"}:
        raise ConfigError(f"rates must have exactly {', '.join(names)} and widths, as `plan --json` writes")
    widths = {name: getattr(spec, name) for name in _WIDTHS}
    if said["widths"] != widths:
        raise ConfigError("the rates were measured for a model of other widths; plan that one, or leave them")
    for name in names:
        value = said[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e18:
            raise ConfigError(f"rates: {name} must be a number of at least 0, not {value!r}")
    for name in ("cores", "ram_gb_s", "dense_gb_s", "mapped_gb_s", "arena_gb_s", "dense_ops", "expert_ops"):
        if not said[name]:
            raise ConfigError(f"rates: {name} must be above 0")
    if said["overlap"] > 1:
        raise ConfigError("rates: overlap lies between 0 and 1")
    return Rates(**{name: said[name] for name in names})


def _measured(spec: ModelSpec) -> Rates:
    from k2hybrid.native.machine import Machine
    from k2hybrid.runtime.probes import measure_rates

    print("measuring this machine; other work on it would count against it …", file=sys.stderr)
    return measure_rates(spec, Machine())


def _card_here() -> tuple[dict[str, float], str]:
    """Numbers of this machine's first GPU, and a note; neither: it has none that torch can use."""
    import torch

    if not torch.cuda.is_available():
        return {}, ""
    from k2hybrid.runtime.card_rates import measure_card

    try:
        memory, rates = measure_card(torch.device("cuda", 0))
    except (RuntimeError, NativeError) as error:  # no memory is left on it, or no kernels for it here
        said = str(error).partition("\n")[0]
        return {}, f"GPU: not measured ({said}); give --vram, --gpu-gb-s, --gpu-tflops and --pcie-gb-s"
    return {
        "vram_gib": memory / GIB,
        "gpu_gb_s": rates.memory_gb_s,
        "pcie_gb_s": rates.bus_gb_s,
        "gpu_tflops": rates.tflops,
    }, "GPU: measured here, with the memory that was free"


def _node_memory(numbers: Mapping[str, float]) -> dict[int, int]:
    if "ram_gib" in numbers:
        nodes = int(numbers.get("nodes", 1))
        room = max(0, int(numbers["ram_gib"] * GIB) - SYSTEM_BYTES)
        return dict.fromkeys(range(nodes), room // nodes)
    from k2hybrid.hardware.cgroup import read_limits
    from k2hybrid.hardware.topology import read_topology

    memory = {node.id: node.memory_bytes for node in read_topology().compute_nodes}
    total = sum(memory.values())
    limit = min(total, read_limits().memory_bytes or total)
    usable = max(0, limit - SYSTEM_BYTES)
    if "nodes" in numbers:
        nodes = int(numbers["nodes"])
        return dict.fromkeys(range(nodes), usable // nodes)
    return {node: nbytes * usable // total for node, nbytes in memory.items()}
